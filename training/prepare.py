"""Everything a run needs before its first step: index, tokenizer, starting weights.

In: a RunConfig. Out: Prepared, files under `output_dir`. Next: `trainer.py`.

Each artefact is written under a temporary name and renamed, and keyed by what it was made from, so a second
start finds it, and a changed config makes a new one. Rank 0 makes, the others wait for files, not in a
collective: nothing times out while a large corpus is indexed.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.index import DataIndex, build_index
from data_pipeline.order import row_at
from data_pipeline.records import BadRow, stable_hash
from training.checkpoint import checkpoint_root
from training.config import RunConfig
from training.errors import ConfigError

if TYPE_CHECKING:
    from modeling.architectures import Architecture

POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `prepare` made."""

    index: DataIndex
    tokenizer_dir: str  # directory or hub name
    model_dir: str  # directory or hub name; starting weights


def prepare(config: RunConfig, rank: int = 0) -> Prepared:
    """Index the data, train the tokenizer, initialise the weights, as far as the config asks for it.

    Raises:
        DataError, ConfigError: with one line, before anything is trained.
    """
    if rank == 0:
        index = open_index(config)
        tokenizer_dir = _tokenizer(config, index)
        model_dir = _starting_weights(config, tokenizer_dir)
        _ready_file(config).parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(_ready_file(config), json.dumps([tokenizer_dir, model_dir]))
        return Prepared(index, tokenizer_dir, model_dir)
    while not _ready_file(config).is_file():
        time.sleep(POLL_SECONDS)
    tokenizer_dir, model_dir = json.loads(_ready_file(config).read_text(encoding="utf-8"))
    return Prepared(open_index(config), tokenizer_dir, model_dir)


def forget_preparation(config: RunConfig) -> None:
    """Rank 0, before a barrier: the others shall wait for this start's preparation, not take an earlier one's."""
    _ready_file(config).unlink(missing_ok=True)


def open_index(config: RunConfig) -> DataIndex:
    """The index of the run's sources, built where it is missing."""
    data = config.data
    try:
        config.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output_dir: {config.output_dir}: cannot be written to ({error.strerror}); name a folder of your own"
        ) from None
    return build_index(
        data.sources, data.languages, config.data_dir, config.output_dir / "index",
        heldout_items=data.heldout_items, seed=config.seed, max_bad_rows=data.max_bad_rows, task=data.task,
        patience=data.patience_seconds,
    )  # fmt: skip


def sample_rows(index: DataIndex, language: int, n: int, seed: int) -> list[int]:
    """`n` usable training rows of a language, spread over its whole order; fewer where it has fewer.

    Items that several languages have come first and are the same in all of them, since they are ranked by a
    hash of the item: probe sets are as parallel as the data allow.
    """
    rows = index.rows(language)
    usable = [int(row) for row in rows if not index.bad[row]]
    usable.sort(key=lambda row: stable_hash(seed, "probe", int(index.group[row])))
    return usable[:n]


def training_texts(config: RunConfig, index: DataIndex, n: int) -> Iterator[str]:
    """Up to `n` texts for tokenizer training, the same number from every language, held-out items left out."""
    each = max(n // len(config.data.languages), 1)
    for number, language in enumerate(config.data.languages):
        rows = index.rows(number)
        for cursor in range(min(each, len(rows))):
            row = row_at(rows, cursor, config.seed, language)
            try:
                record = index.read(row)
            except BadRow:
                continue  # counted and bounded when the index was built
            yield from record.texts


def train_tokenizer_of(config: RunConfig, index: DataIndex, output: Path) -> None:
    """Train the tokenizer that `tokenizer.train` describes and save it as a Hugging Face tokenizer."""
    from data_pipeline.tokenizer import train_tokenizer

    settings = config.tokenizer.train
    if settings is None:
        raise ConfigError("tokenizer.train: missing; it says how large a vocabulary to train")
    train_tokenizer(training_texts(config, index, settings.max_sentences), output, settings)


def _tokenizer(config: RunConfig, index: DataIndex) -> str:
    if config.tokenizer.train is None:
        path = config.tokenizer.path or config.model.path
        assert path is not None  # the config model requires one
        return path
    made_from = {
        "train": config.tokenizer.train.model_dump(mode="json"), "seed": config.seed,
        "data": index.fingerprint, "heldout": config.data.heldout_items,
    }  # fmt: skip
    return str(
        _made_once(config.output_dir / "tokenizer", made_from, lambda path: train_tokenizer_of(config, index, path))
    )


def _starting_weights(config: RunConfig, tokenizer_dir: str) -> str:
    """The directory or hub name that weights are loaded from; an encoder's gets its task's head there."""
    task = config.data.task
    start = config.model.path or _from_scratch(config, tokenizer_dir)
    if task is None:
        return start
    if task.kind == "text" and config.model.path is None:
        return start  # made with that head

    def write(path: Path) -> None:
        from modeling.encoders import write_task_start

        write_task_start(start, task.kind, task.labels, path, config.seed)

    made_from = {"start": start, "kind": task.kind, "labels": list(task.labels), "seed": config.seed}
    return str(_made_once(config.output_dir / "task_model", made_from, write))


def architecture(config: RunConfig) -> Architecture:
    """The head that the run's model has."""
    from modeling.encoders import TASK_ARCHITECTURES

    return "causal-lm" if config.data.task is None else TASK_ARCHITECTURES[config.data.task.kind]


def _from_scratch(config: RunConfig, tokenizer_dir: str) -> str:
    init = config.model.init
    assert init is not None  # the config model requires one
    head: Architecture = "causal-lm" if config.data.task is None else "masked-lm"

    def write(path: Path) -> None:
        from modeling.loading import write_initial_model
        from modeling.untrusted import read_tokenizer

        tokenizer = read_tokenizer(tokenizer_dir)
        write_initial_model(init, tokenizer, path, config.seed, architecture=head)

    made_from = {"init": init, "seed": config.seed, "tokenizer": _identity(tokenizer_dir), "head": head}
    return str(_made_once(config.output_dir / "initial_model", made_from, write))


def _identity(tokenizer_dir: str) -> Any:
    file = Path(tokenizer_dir) / "tokenizer.json"
    return stable_hash(file.read_text(encoding="utf-8")) if file.is_file() else tokenizer_dir


def _made_once(path: Path, made_from: dict[str, Any], make: Callable[[Path], None]) -> Path:
    """`path`, made by `make` unless it is there already from the same ingredients.

    What checkpoints rest on is never made anew: whether they may go on with other ingredients is decided, with
    the difference, when one is loaded.
    """
    note = path / "made_from.json"
    if note.is_file() and any(checkpoint_root(path.parent).glob("step-*")):
        return path
    wanted = json.dumps(made_from, sort_keys=True)
    if note.is_file() and note.read_text(encoding="utf-8") == wanted:
        return path
    temporary = path.with_name(f".incomplete-{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    make(temporary)
    (temporary / note.name).write_text(wanted, encoding="utf-8")
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)
    return path


def _ready_file(config: RunConfig) -> Path:
    key = stable_hash(json.dumps(config.model_dump(mode="json"), sort_keys=True))
    return config.output_dir / f".prepared-{key:016x}.json"


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
