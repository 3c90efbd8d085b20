"""A run stands still: every node shows what it knows, and one of them names the rank that the others wait for.

In: a node's watchdog and the other nodes' evidence. Out: a report on the culprit's node, all stacks in the ranks'
logs, `logs/stall-node-R.json`. Next: `launcher.py` kills the ranks and ends with status 1.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from training.launch.logs import Appender, Secrets, event, logs_folder, part, rank_log
from training.launch.nodes import Nodes
from training.launch.watchdog import Evidence, Watchdog, from_json, furthest_behind, to_json, write_evidence

OTHERS_SECONDS = 20.0  # in which the other nodes look at their ranks too
POLL_SECONDS = 0.1


def find_culprit(nodes: Nodes, watchdog: Watchdog, output_dir: Path | None, secrets: Secrets) -> Evidence | None:
    """Gather the evidence of all nodes; the rank furthest behind, None where no rank has shown a sign of life."""
    mine = watchdog.evidence()
    if output_dir is not None:
        _keep(mine, watchdog, nodes.place.node, output_dir, secrets)
    nodes.tell("stalled", to_json(mine))
    until = time.monotonic() + OTHERS_SECONDS
    while len(nodes.heard("stalled")) < nodes.place.nodes and nodes.lost is None and time.monotonic() < until:
        time.sleep(POLL_SECONDS)
    everybody = [each for node in nodes.heard("stalled").values() for each in from_json(node)]
    return furthest_behind(everybody) if everybody else None


def report(culprit: Evidence, nodes: Nodes, output_dir: Path | None, secrets: Secrets) -> None:
    """For people, on the culprit's node: at the terminal, in `run.log` and in the events."""
    text = culprit.told()
    missing = sorted(set(range(nodes.place.nodes)) - set(nodes.heard("stalled")))
    if missing:
        text += f"\n    no word from node(s) {missing} in {OTHERS_SECONDS:.0f} s: the cause may be there"
    if output_dir is not None:
        text += f"\n    all stacks: {rank_log(output_dir, culprit.rank)} and the other ranks' logs"
    text = secrets.hidden(text)
    print(f"crosslift: {text}", file=sys.stderr, flush=True)
    if output_dir is not None:
        events = Appender(part(output_dir, f"launcher-{nodes.place.node}"))
        events.write(event(None, "CRITICAL", culprit.step, text))


def _keep(mine: Sequence[Evidence], watchdog: Watchdog, node: int, output_dir: Path, secrets: Secrets) -> None:
    for each in mine:
        stacks = watchdog.all_stacks(each.rank - watchdog.first_rank)
        Appender(rank_log(output_dir, each.rank)).write(secrets.hidden(f"{each.told()}\nall threads:\n{stacks}\n"))
    try:
        write_evidence(logs_folder(output_dir), node, mine)
    except OSError as error:
        print(f"{logs_folder(output_dir)}: {error.strerror}; the evidence is shown, but not kept", file=sys.stderr)
