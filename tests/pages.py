"""Pages of docs/ that quote values: their run file, calls, sentences, tables and blocks, to be compared with the code.

A value that the page no longer quotes, or quotes twice, is a failed assertion.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent / "distributed"))

from ranks import SOURCE, checked, run_ranks
from steps import load

if TYPE_CHECKING:
    from data_pipeline.loader import Step
    from data_pipeline.order.plan import StepPlan
    from training.assembly import DataParts
    from training.config import RunConfig
    from training.run_folder.prepare import Prepared

NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
ROUNDING = 1e-6  # most of fp32, relative to the largest number; the errors differ between processors


class Page:
    """A page that follows a sample through a run."""

    def __init__(self, name: str) -> None:
        self.name = f"docs/{name}"
        self.text = (SOURCE / self.name).read_text(encoding="utf-8")
        self.words = " ".join(self.text.split())  # sentences without their line breaks

    def quoted(self, sentence: str) -> list[Any]:
        """The numbers at the `{}` of a sentence: whole ones exactly, others to the digits quoted.

        A `~` stands for any words without a digit, so that wording may change around the numbers.
        """
        parts = [r"\D{1,100}?".join(map(re.escape, part.split("~"))) for part in sentence.split("{}")]
        found = re.findall(rf"(?<![\w.])(?:{f'({NUMBER})'.join(parts)})(?!\d|\.\d)", self.words)
        assert len(found) == 1, f"{self.name} says {len(found)} times: {sentence}"
        return [number(each) for each in found[0]] if isinstance(found[0], tuple) else [number(found[0])]

    def says(self, sentence: str) -> None:
        """Asserts that the sentence is on the page."""
        assert sentence in self.words, f"{self.name} does not say: {sentence}"

    def rounding(self, sentence: str, found: float) -> None:
        """Asserts that the number quoted for `{}` and the one found are both rounding errors."""
        (quoted,) = self.quoted(sentence)
        assert max(quoted.expected, found) < ROUNDING

    def block(self, beginning: str) -> str:
        """The fenced block whose first line begins so."""
        found = re.findall(rf"^```\w*\n({re.escape(beginning)}.*?)^```", self.text, re.MULTILINE | re.DOTALL)
        assert len(found) == 1, f"{self.name} has {len(found)} blocks that begin with: {beginning}"
        return str(found[0])

    def table(self, *columns: str) -> list[dict[str, str]]:
        """The rows of the table whose first columns these are: cells by column."""
        lines = self.text.splitlines()
        heads = [number for number, line in enumerate(lines) if _cells(line)[: len(columns)] == list(columns)]
        assert len(heads) == 1, f"{self.name} has {len(heads)} tables of {columns}"
        names, rows = _cells(lines[heads[0]]), []
        for line in lines[heads[0] + 2 :]:
            if not line.startswith("|"):
                break
            rows.append(dict(zip(names, _cells(line), strict=True)))
        return rows

    def make_data(self, function: Callable[..., None], folder: Path) -> None:
        """Runs the call of this function that the page shows, with its paths below the folder."""
        (call,) = re.findall(rf"`({function.__name__}\(.*?\))`", self.words)
        eval(call, {**vars(sys.modules[function.__module__]), "Path": folder.joinpath})

    def train(self, folder: Path) -> RunConfig:
        """Runs the page's run file on one rank, its paths below the folder."""
        from training.run_file import load_config

        (text,) = re.findall(r"^```yaml\n(.*?)^```", self.text, re.MULTILINE | re.DOTALL)
        file = folder / "walk.yaml"
        file.write_text(text, encoding="utf-8")
        values = yaml.safe_load(text)
        overrides = [f"{key}={folder / values[key]}" for key in ("data_dir", "output_dir")]
        checked(run_ranks(["-m", "training", str(file), *overrides], 1))
        return load_config(file, overrides)

    @contextmanager
    def walk(self, write_data: Callable[..., None], folder: Path) -> Iterator[Walk]:
        """The page's run on the data that the page's call of this function writes."""
        from training.assembly import assemble_data
        from training.run_folder.prepare import prepare_read_only

        self.make_data(write_data, folder)
        config = self.train(folder)
        events = [json.loads(line) for line in (config.output_dir / "record.jsonl").read_text().splitlines()]
        metrics = [event["values"] for event in events if event["kind"] == "metrics"]
        with prepare_read_only(config) as prepared:
            data = assemble_data(config, prepared)
            yield Walk(folder, config, prepared, data, data.planner.step(0), load(data.loader(), 0), metrics)


@dataclass(frozen=True)
class Walk:
    """A page's run after its last step, its data as its rank read them, and step 0."""

    folder: Path
    config: RunConfig
    prepared: Prepared
    data: DataParts
    plan: StepPlan
    step: Step
    metrics: list[dict[str, float]]  # of each step


class PlainEngine:
    """Runs a model for an objective as `training.engine` does, without DeepSpeed: to look into one forward pass."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.device = module.device

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        import torch

        with torch.no_grad():
            yield


def number(text: str) -> Any:
    """A whole number as it is; another one approximately: to the digits quoted, or to 1e-5 of it."""
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    unit = 10.0 ** int(Decimal(text).as_tuple().exponent)
    return pytest.approx(float(text), rel=1e-5, abs=0.6 * unit)


def numbers(text: str) -> list[Any]:
    """All numbers of a text."""
    return [number(each) for each in re.findall(rf"(?<![\w.-]){NUMBER}", text)]


def unwrapped(block: str) -> list[str]:
    """The lines of a block; one that begins with a space continues the line before it."""
    return re.sub(r"\n(?= )", "", block).splitlines()


def listed_files(block: str) -> set[str]:
    """The files below the first line of a listing: two spaces, `folder/  a, b` or `a, b`, wide space, remarks.

    `x_model.pt, ..._optim.pt` is short for a second name that begins like the first.
    """
    files: list[str] = []
    for line in re.findall(r"^  (?! )(.*)", block, re.MULTILINE):
        name, *rest = re.split(r"\s{2,}", line)
        folder = name if name.endswith("/") else ""
        for each in (rest[0] if folder else name).split(", "):
            end = each.removeprefix("...")
            files.append(folder + each if end == each else files[-1][: -len(end)] + end)
    return set(files)


def files_below(folder: Path) -> set[str]:
    """Paths of all files of a folder, relative to it."""
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def named(cell: str) -> list[str]:
    """The names in a table's cell; one that begins with a dot belongs to the object of the name before it."""
    names: list[str] = []
    for name in re.findall(r"`([\w.]+)`", cell):
        names.append(names[-1].rpartition(".")[0] + name if name.startswith(".") else name)
    return names


def of_each(found: Sequence[str], n: int) -> list[str]:
    """As many values as there are names: one for all, or one for each."""
    return list(found) * n if len(found) == 1 else list(found)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
