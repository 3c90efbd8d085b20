"""One log for people and one for machines, of all ranks' parts.

In: `logs/parts/*.jsonl`, written by ranks and launchers of all nodes. Out: `run.log` (rank 0, and warnings of the
others) and `events.jsonl` (all). Next: people, `crosslift logs`, and whatever reads JSON lines.

One process merges, node 0's launcher (or rank 0, where there is no launcher), so no line is torn on a network disk;
there, other nodes' lines come as late as the disk shows them. How far each part is merged is kept beside the parts:
a restart goes on there. After a kill -9 at the wrong instant, a second's lines may come twice, and none is lost.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.atomic import write_text
from training.launch.logs import TERMINAL, Appender, log_to_files, logs_folder, make_logs_folder, read_lines

MERGE_SECONDS = 1.0
PLACES = "merged.json"


@contextmanager
def kept_logs(output_dir: Path, rank: int) -> Iterator[None]:
    """Inside, a rank's messages go into its logs; rank 0 merges them where no launcher of ours does.

    Raises ConfigError where the folder of logs cannot be made.
    """
    make_logs_folder(output_dir)
    log_to_files(output_dir, rank)
    merged = MergedLogs(output_dir) if rank == 0 and TERMINAL not in os.environ else None
    try:
        yield
    finally:
        if merged is not None:
            merged.close()


class MergedLogs:
    """Merges in a thread, until closed."""

    def __init__(self, output_dir: Path) -> None:
        folder = logs_folder(output_dir)
        self._parts = folder / "parts"
        self._run_log = Appender(folder / "run.log")
        self._events = Appender(folder / "events.jsonl")
        self._places = self._read_places()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._merge_until_closed, name="merged-logs", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The last lines, then the end."""
        self._closing.set()
        self._thread.join()

    def _merge_until_closed(self) -> None:
        closing = False
        while not closing:
            closing = self._closing.wait(MERGE_SECONDS)
            try:
                self._merge()
            except OSError as error:
                logging.getLogger(__name__).warning("%s: %s; the ranks' own logs go on", self._parts, error)

    def _merge(self) -> None:
        places = dict(self._places)
        merged: list[dict[str, Any]] = []
        for part in sorted(self._parts.glob("*.jsonl")):
            lines, places[part.name] = read_lines(part, places.get(part.name, 0))
            merged += [event for line in lines if (event := read_event(line)) is not None]
        if not merged:
            return
        merged.sort(key=lambda event: event["time"])  # stable: a part's own order stays
        self._events.write("".join(json.dumps(event, ensure_ascii=False) + "\n" for event in merged))
        self._run_log.write("".join(_for_people(event) for event in merged if _is_for_people(event)))
        self._places = places
        write_text(self._parts / PLACES, json.dumps(places), exclusive=True)

    def _read_places(self) -> dict[str, int]:
        try:
            places = json.loads((self._parts / PLACES).read_text(encoding="utf-8"))
            return {name: int(place) for name, place in places.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError, TypeError):  # torn: lines come twice rather than never
            return {}


def read_event(line: bytes) -> dict[str, Any] | None:
    """A line of `events.jsonl`; None for what a kill left of a line."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("time"), int) else None


def _is_for_people(event: dict[str, Any]) -> bool:
    return event["rank"] in (0, None) or event["level"] not in ("DEBUG", "INFO")


def _for_people(event: dict[str, Any]) -> str:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"] / 1000))
    who = f"launcher on {event['host']}" if event["rank"] is None else f"rank {event['rank']}"
    return f"{at} {who} {event['level']} {event['message']}\n"
