"""Sweeps: `--array "seed=0,1,2"`, several of them multiplied, as run files' overrides and names of folders.

In: the options' texts. Out: a name and overrides for each element. Next: `submit.py`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from slurm.errors import SlurmError

LONGEST_NAME = 80
OPENING, CLOSING, QUOTES = "([{", ")]}", "\"'"
LARGEST = 1000  # Slurm's own default limit of an array (MaxArraySize)


@dataclass(frozen=True, slots=True)
class Point:
    """One element of a sweep."""

    name: str  # of its folder below the run's
    overrides: tuple[str, ...]


def points(texts: Sequence[str]) -> list[Point]:
    """The product of all `key=v1,v2` texts, in their order.

    Raises:
        SlurmError: a text is no such list, or a key is there twice.
    """
    axes: dict[str, list[str]] = {}
    for text in texts:
        key, equals, rest = text.partition("=")
        values = _split(rest)
        if not equals or not re.fullmatch(r"[\w.-]+", key) or not all(values):
            raise SlurmError(f"--array {text!r}: must be key.sub=value,value, such as seed=0,1,2")
        if key in axes:
            raise SlurmError(f"--array {text!r}: {key} is given twice; put all its values into one")
        if key == "output_dir":
            raise SlurmError(f"--array {text!r}: every element gets a folder of its own below output_dir")
        axes[key] = values
    found = []
    for number, chosen in enumerate(itertools.product(*axes.values())):
        overrides = tuple(f"{key}={value}" for key, value in zip(axes, chosen, strict=True))
        plain = re.sub(r"[^A-Za-z0-9_.=+-]", "_", "+".join(overrides))[:LONGEST_NAME]  # no comma: containers mount it
        found.append(Point(f"{number}-{plain}", overrides))
    if len(found) > LARGEST:
        raise SlurmError(f"--array: {len(found)} elements; at most {LARGEST}")
    return found


def _split(text: str) -> list[str]:
    """At commas outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in QUOTES:
            quote = letter
        elif letter in OPENING:
            depth += 1
        elif letter in CLOSING:
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    return [part.strip() for part in parts]
