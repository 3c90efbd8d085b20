"""What a run's launchers tell each other: who is here, who failed, who was stopped, who stands still, who is done.

In: node 0's address. Out: a store that every launcher and every rank talks to. Next: `launcher.py`, `watchdog.py`.

Node 0's launcher, not rank 0, holds the store: it outlives ranks, so the last words of a dying run still get
through. A node cannot see by itself that another one's rank is dead (NCCL waits out its timeout), hence the news
passed here, once and a bit a second.
"""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from data_pipeline.records import stable_hash
from training.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

Kind = Literal["failed", "stopped", "stalled", "ended"]
KINDS: tuple[Kind, ...] = ("failed", "stopped", "stalled", "ended")
POLL_SECONDS = 0.5
CLOSE_SECONDS = 5.0
COME_SECONDS = 300.0  # how long node 0 is waited for


class NodeLost(Exception):
    """Node 0's launcher, which holds the store, cannot be reached."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a launcher stands among the run's nodes."""

    nodes: int = 1
    node: int = 0
    rendezvous: str | None = None  # HOST:PORT of node 0; one node finds a port by itself

    def address(self) -> tuple[str, int]:
        """Host and port of the store. Raises ConfigError where they cannot be what is meant."""
        if self.nodes < 1 or not 0 <= self.node < self.nodes:
            raise ConfigError(f"--node-rank {self.node}: must be 0 to {self.nodes - 1}, as --nodes is {self.nodes}")
        if self.rendezvous is None:
            if self.nodes > 1:
                raise ConfigError("--rendezvous: missing; with --nodes above 1 give HOST:PORT of node 0")
            return "127.0.0.1", 0
        host, colon, port = self.rendezvous.rpartition(":")
        if not (colon and host and port.isdigit() and 0 < int(port) < 2**16):
            raise ConfigError(f"--rendezvous {self.rendezvous!r}: must be HOST:PORT, such as node-1:29400")
        return host.strip("[]"), int(port)


class Nodes:
    """One launcher's end of the store; other nodes' news arrive in a thread, so nothing here blocks its loop."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.host, self.port = place.address()
        self.name = socket.gethostname()
        self.lost: str | None = None  # why the store cannot be reached any more
        self._news: dict[Kind, dict[int, Any]] = {kind: {} for kind in KINDS}
        self._outbox: queue.SimpleQueue[tuple[Kind, Any]] = queue.SimpleQueue()
        self._store: TCPStore | None = None
        self._noting = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._exchange, name="nodes", daemon=True)

    def connect(self, still_wanted: Callable[[], bool]) -> bool:
        """Open the store (node 0) or reach it; False where `still_wanted` says no before that is done.

        Raises:
            ConfigError: the port is taken; NodeLost: node 0 does not answer in time.
        """
        outcome: list[BaseException] = []

        def run() -> None:
            try:
                self._store = self._open()
            except BaseException as error:
                outcome.append(error)

        # In a thread, since torch's connecting holds up the signals of the thread that it runs in.
        opening = threading.Thread(target=run, name="rendezvous", daemon=True)
        opening.start()
        while opening.is_alive():
            if not still_wanted():
                return False
            opening.join(0.1)
        if outcome:
            raise outcome[0]
        assert self._store is not None
        self.port = self._store.port
        if self.place.nodes > 1:
            self._thread.start()
        return True

    def close(self) -> None:
        """Send what is still to be sent, and be silent: a thread that talks at the interpreter's end would abort it."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_SECONDS)

    def tell(self, kind: Kind, value: Any) -> None:
        """This node's word of a kind, in the place of what it said before; `value` is of JSON."""
        if self._news[kind].get(self.place.node) != value:
            self._note(kind, self.place.node, value)
            self._outbox.put((kind, value))

    def heard(self, kind: Kind) -> dict[int, Any]:
        """What has been said of a kind, by node, this one included."""
        return self._news[kind]

    def first_to_say(self, line: str, nth: int) -> bool:
        """Whether no rank of any node has said this line `nth` times yet: all meet the same user error, one says it."""
        if self._store is None or self.lost is not None:
            return True
        try:
            return self._store.add(f"crosslift/said/{stable_hash(line, nth)}", 1) == 1
        except RuntimeError:  # the store is gone: better twice than never
            return True

    def _open(self) -> TCPStore:
        from torch.distributed import DistNetworkError, DistStoreError, TCPStore

        server = self.place.node == 0
        try:
            return TCPStore(
                self.host, self.port, is_master=server, wait_for_workers=False, timeout=timedelta(seconds=COME_SECONDS)
            )
        except (DistNetworkError, DistStoreError, RuntimeError) as error:
            at = f"{self.host}:{self.port}"
            if server:
                why = str(error).splitlines()[0]
                raise ConfigError(f"--rendezvous {at}: node 0 cannot listen there, give another port: {why}") from None
            raise NodeLost(
                f"node {self.place.node} ({self.name}): no answer from node 0 at {at} in {COME_SECONDS:.0f} s; "
                "its launcher has not started, or the address cannot be reached from here"
            ) from None

    def _exchange(self) -> None:
        """The thread: sends this node's words, and reads all when a counter says that there are new ones."""
        assert self._store is not None
        known = 0
        try:
            while True:
                try:
                    kind, value = self._outbox.get(timeout=0 if self._closing.is_set() else POLL_SECONDS)
                    self._store.set(f"crosslift/{kind}/{self.place.node}", json.dumps(value))
                    self._store.add("crosslift/news", 1)
                except queue.Empty:
                    if self._closing.is_set():
                        return
                count = self._store.add("crosslift/news", 0)
                if count != known:
                    known = count
                    self._read()
        except Exception as error:  # whatever torch raises for a connection that is gone
            self.lost = str(error).splitlines()[0]

    def _read(self) -> None:
        assert self._store is not None
        others = [node for node in range(self.place.nodes) if node != self.place.node]
        for kind in KINDS:
            for node in others:
                key = f"crosslift/{kind}/{node}"
                if self._store.check([key]):
                    self._note(kind, node, json.loads(self._store.get(key)))

    def _note(self, kind: Kind, node: int, value: Any) -> None:
        with self._noting:  # by the launcher's loop and by the thread: neither may undo the other's
            self._news[kind] = {**self._news[kind], node: value}
