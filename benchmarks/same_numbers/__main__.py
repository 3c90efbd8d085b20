"""Proof that a change alters no number: the same runs on two revisions, on this machine, compared to the last digit.

    python -m benchmarks.same_numbers REV_A REV_B                     all cases, about 25 minutes on two cores
    python -m benchmarks.same_numbers REV_A REV_B --only sft resumed  some of them

Compared are: `data plan` of every run file in configs/ on 1, 2 and 8 ranks; every metric of every step (losses by
language, gradient norms, shift norms) of SFT, ShifCon, LoRA, masked words, X-Mixup and plain fine-tuning on three kinds
of tasks, on two ranks under ZeRO-3 in fp32 with dropout; a run that is killed and resumed; the hash of every exported
tensor; generated answers; XTREME predictions and scores. Not compared: times and memory.

Both revisions are used through their command line only, so their code may be laid out differently. Results are kept in
--work by commit: a revision that was compared before is not run again, unless a package or this benchmark changed.
Exit status: 0 equal (values that only REV_B has are listed, not counted), 1 different, 2 a revision or command failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from benchmarks.same_numbers import cases
from benchmarks.same_numbers.cases import CASES, Facts
from benchmarks.same_numbers.revision import SOURCE, Revision, SameNumbersError
from data_pipeline.atomic import write_text

WORK = SOURCE / "runs" / "same_numbers"
SHOWN = 8  # differences of a case that are printed
# A LoRA export may differ in its last digits when the way of merging changes: reported, not counted as different.
ROUNDED = {"lora": "tensor "}


@dataclass(frozen=True, slots=True)
class Comparison:
    """What differs between two revisions' facts of one case."""

    same: int
    different: list[str]
    missing: list[str]  # in B
    new: list[str]  # only in B
    rounded: list[str]  # different, but allowed to be

    @property
    def equal(self) -> bool:
        return not self.different and not self.missing


def compare(a: Facts, b: Facts, may_round: str | None = None) -> Comparison:
    """Facts by name; names that begin with `may_round` may differ."""
    unequal = [name for name, value in a.items() if name in b and b[name] != value]
    rounded = [name for name in unequal if may_round is not None and name.startswith(may_round)]
    return Comparison(
        same=len(a.keys() & b.keys()) - len(unequal),
        different=[name for name in unequal if name not in rounded],
        missing=[name for name in a if name not in b],
        new=[name for name in b if name not in a],
        rounded=rounded,
    )


def facts_of(revision: Revision, name: str, data: Path) -> Facts:
    """A case's facts, from an earlier comparison with the same packages and cases if there is one."""
    file = revision.folder / "facts" / f"{name}.json"
    if not file.exists():
        facts = CASES[name](revision, data)
        write_text(file, json.dumps(facts, ensure_ascii=False, indent=0))
    found: Facts = json.loads(file.read_text(encoding="utf-8"))
    return found


def _conditions() -> str:
    """A hash of this benchmark's files and of the installed packages."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    installed = sorted(f"{each.name} {each.version}" for each in distributions())
    return hashlib.sha256(b"".join(f.read_bytes() for f in files) + "\n".join(installed).encode()).hexdigest()[:12]


def report(name: str, a: Revision, b: Revision, found: Comparison, facts: tuple[Facts, Facts]) -> list[str]:
    """Lines about one case."""
    lines = [
        f"{name}: {found.same:,} values equal, {len(found.different)} different, {len(found.missing)} missing"
        + (f", {len(found.new)} new" if found.new else "")
    ]
    for each in found.different[:SHOWN]:
        lines.append(f"  {each}: {_short(facts[0][each])} became {_short(facts[1][each])}")
    lines += [f"  {each}: missing" for each in found.missing[:SHOWN]]
    if (left := max(len(found.different) - SHOWN, 0) + max(len(found.missing) - SHOWN, 0)) > 0:
        lines.append(f"  ... and {left} more")
    if found.rounded:
        lines.append(
            f"  {len(found.rounded)} tensors may differ, and do by {_distance(name, a, b):.1e} of the largest value"
        )
    if found.new:
        lines.append(f"  new: {', '.join(found.new[:SHOWN])}{' ...' if len(found.new) > SHOWN else ''}")
    return lines


def _distance(name: str, a: Revision, b: Revision) -> float:
    """Largest difference between two exports, relative to the largest value of its tensor."""
    of_b = dict(cases.tensors(b.folder / name / "model"))
    return max(
        float(abs(tensor - of_b[key]).max() / abs(tensor).max())
        for key, tensor in cases.tensors(a.folder / name / "model")
        if key in of_b
    )


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.same_numbers", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("rev_a", metavar="REV_A", help="commit, tag or branch before the change")
    parser.add_argument("rev_b", metavar="REV_B", help="commit, tag or branch after the change")
    parser.add_argument("--only", nargs="+", choices=list(CASES), metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for trees, data and runs")
    options = parser.parse_args(arguments)
    try:
        work = options.work.absolute() / _conditions()
        a, b = (Revision.check_out(name, work) for name in (options.rev_a, options.rev_b))
        data = cases.write_inputs(work / "data")
        equal = True
        for name in options.only or CASES:
            started = time.monotonic()
            facts = facts_of(a, name, data), facts_of(b, name, data)
            found = compare(*facts, ROUNDED.get(name))
            equal = equal and found.equal
            first, *rest = report(name, a, b, found, facts)
            print("\n".join([f"{first} ({time.monotonic() - started:.0f} s)", *rest]), flush=True)
    except SameNumbersError as error:
        print(f"same_numbers: {error}", file=sys.stderr)
        return 2
    print(f"{a.commit[:12]} and {b.commit[:12]}: {'equal to the last digit' if equal else 'DIFFERENT'}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
