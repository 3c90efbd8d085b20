"""Status exchange between the launchers of a run's nodes, over a TCPStore: failures, stops, stalls, exit statuses.

The launcher of node 0 holds the store, not rank 0: it outlives the ranks, so the last messages of a failing run still
arrive. A node cannot detect that a rank of another node is dead (NCCL waits until its timeout), so the launchers
exchange it, about once per second.
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
POLL_S = 0.5
CLOSE_TIMEOUT_S = 5.0
JOIN_TIMEOUT_S = 300.0  # how long other nodes wait for node 0


class NodeLost(Exception):
    """The launcher of node 0, which holds the store, cannot be reached."""


@dataclass(frozen=True, slots=True)
class NodePlace:
    """The index of this node, the number of nodes, and their rendezvous address."""

    nodes: int = 1
    node: int = 0
    rendezvous: str | None = None  # HOST:PORT of node 0; a single node chooses a free port

    def address(self) -> tuple[str, int]:
        """Host and port of the store.

        Raises:
            ConfigError: an invalid node rank or rendezvous address.
        """
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


class StatusExchange:
    """One launcher's connection to the store. A thread exchanges the messages, so no method blocks the launcher."""

    def __init__(self, place: NodePlace) -> None:
        self.place = place
        self.host, self.port = place.address()
        self.hostname = socket.gethostname()
        self.lost: str | None = None  # why the store cannot be reached any more
        self._messages: dict[tuple[Kind, int], Any] = {}  # by kind and node
        self._outbox: queue.SimpleQueue[tuple[Kind, Any]] = queue.SimpleQueue()
        self._store: TCPStore | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._exchange, name="status-exchange", daemon=True)

    def connect(self, cancelled: Callable[[], bool]) -> bool:
        """Open the store (node 0) or connect to it; False if `cancelled` returns True first.

        Raises:
            ConfigError: the port is in use.
            NodeLost: node 0 does not answer within `JOIN_TIMEOUT_S`.
        """
        errors: list[BaseException] = []

        def open_store() -> None:
            try:
                self._store = self._open()
            except BaseException as error:
                errors.append(error)

        # In a thread: while torch connects, the thread that it runs in handles no signals.
        connecting = threading.Thread(target=open_store, name="rendezvous", daemon=True)
        connecting.start()
        while connecting.is_alive():
            if cancelled():
                return False
            connecting.join(0.1)
        if errors:
            raise errors[0]
        assert self._store is not None
        self.port = self._store.port
        if self.place.nodes > 1:
            self._thread.start()
        return True

    def close(self) -> None:
        """Send what is queued and stop the thread: one that is still running when Python ends would abort it."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_TIMEOUT_S)

    def publish(self, kind: Kind, value: Any) -> None:
        """Set this node's message of a kind, replacing an earlier one. `value` must be serialisable as JSON."""
        if self._messages.get((kind, self.place.node)) != value:
            self._messages[kind, self.place.node] = value
            self._outbox.put((kind, value))

    def received(self, kind: Kind) -> dict[int, Any]:
        """The messages of a kind by node, this one's included."""
        messages = self._messages.copy()  # the thread adds to them
        return {node: value for (each, node), value in messages.items() if each == kind}

    def claim_line(self, line: str, nth: int) -> bool:
        """Whether this is the first rank of all nodes to print the line for the `nth` time.

        All ranks hit the same user error; only the first one prints it.
        """
        if self._store is None or self.lost is not None:
            return True
        try:
            return self._store.add(f"crosslift/printed/{stable_hash(line, nth)}", 1) == 1
        except RuntimeError:  # the store is closed: printing twice is better than not at all
            return True

    def _open(self) -> TCPStore:
        from torch.distributed import DistNetworkError, DistStoreError, TCPStore

        is_server = self.place.node == 0
        timeout = timedelta(seconds=JOIN_TIMEOUT_S)
        try:
            return TCPStore(self.host, self.port, is_master=is_server, wait_for_workers=False, timeout=timeout)
        except (DistNetworkError, DistStoreError, RuntimeError) as error:
            address = f"{self.host}:{self.port}"
            if is_server:
                why = str(error).splitlines()[0]
                raise ConfigError(
                    f"--rendezvous {address}: node 0 cannot listen there, give another port: {why}"
                ) from None
            raise NodeLost(
                f"node {self.place.node} ({self.hostname}): no answer from node 0 at {address} in "
                f"{JOIN_TIMEOUT_S:.0f} s; its launcher has not started, or the address cannot be reached from here"
            ) from None

    def _exchange(self) -> None:
        """The thread: sends this node's messages, and reads all messages when a counter shows new ones."""
        assert self._store is not None
        read = 0
        try:
            while True:
                try:
                    kind, value = self._outbox.get(timeout=0 if self._closing.is_set() else POLL_S)
                    self._store.set(f"crosslift/{kind}/{self.place.node}", json.dumps(value))
                    self._store.add("crosslift/messages", 1)
                except queue.Empty:
                    if self._closing.is_set():
                        return
                count = self._store.add("crosslift/messages", 0)
                if count != read:
                    read = count
                    self._read()
        except Exception as error:  # torch raises several types for a broken connection
            self.lost = str(error).splitlines()[0]

    def _read(self) -> None:
        assert self._store is not None
        others = [node for node in range(self.place.nodes) if node != self.place.node]
        for kind in KINDS:
            for node in others:
                key = f"crosslift/{kind}/{node}"
                if self._store.check([key]):
                    self._messages[kind, node] = json.loads(self._store.get(key))
