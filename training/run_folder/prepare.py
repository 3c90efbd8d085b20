"""Prepares what a run needs before its first step: index, tokenizer, starting weights.

A run (`prepare`) creates `tokenizer/`, `initial_model/` and `task_model/` in its folder, each atomically and with a
note of its inputs: a second start reuses them, and a changed config replaces them, unless checkpoints depend on them.
Rank 0 creates them. The other ranks poll for files instead of waiting in a collective call, which would time out while
a large corpus is indexed.

Commands that do not train (`prepare_read_only`) never write these. They share `index/` with runs: the index and trained
tokenizers, in folders named by a hash of everything they depend on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from data_pipeline.atomic import atomic_folder, write_text
from data_pipeline.order.order import row_at
from data_pipeline.records import BadRow, Split, stable_hash
from data_pipeline.sources.index import DataIndex, build_index
from training.checkpoints.checkpoint import step_folders
from training.checks.pairs import refuse_unpaired
from training.config import RunConfig
from training.errors import ConfigError
from training.run_folder import lock as run_lock

if TYPE_CHECKING:
    from data_pipeline.text.tokenizer import TokenizerTrainingConfig
    from modeling.architectures import Architecture

POLL_SECONDS = 0.2
CACHE = "index"
NOTE = "made_from.json"
# The inputs in the note that must not change once there are checkpoints. Others, such as data and seed, may.
FIXED_INPUTS = {"tokenizer": ("train",), "initial_model": ("init", "head"), "task_model": ("kind", "labels")}


@dataclass(frozen=True, slots=True)
class Prepared:
    """The results of `prepare`."""

    index: DataIndex
    tokenizer_dir: str  # directory or hub name
    model_dir: str  # directory or hub name; starting weights


def prepare(config: RunConfig, rank: int = 0) -> Prepared:
    """For a run: index the data, train the tokenizer and initialise the weights, as far as the config requires.

    Raises:
        DataError, ConfigError: before anything is trained.
    """
    if rank == 0:
        run_lock.make_folder(config.output_dir)
        index = open_index(config)
        refuse_unpaired(config.data, config.objective, index)
        tokenizer_dir = _tokenizer(config, index)
        model_dir = _starting_weights(config, tokenizer_dir)
        write_text(_ready_file(config), json.dumps([tokenizer_dir, model_dir]), exclusive=True)
        return Prepared(index, tokenizer_dir, model_dir)
    while not _ready_file(config).is_file():
        time.sleep(POLL_SECONDS)
    tokenizer_dir, model_dir = json.loads(_ready_file(config).read_text(encoding="utf-8"))
    return Prepared(open_index(config), tokenizer_dir, model_dir)


def forget_preparation(config: RunConfig) -> None:
    """Remove the file of an earlier start's preparation, so that other ranks wait for that of this start.

    Called by rank 0, before a barrier.
    """
    _ready_file(config).unlink(missing_ok=True)


@contextmanager
def prepare_read_only(config: RunConfig) -> Iterator[Prepared]:
    """Context with the preparation of a run for commands that do not train; the run's files are not changed.

    A model from scratch or a task's model is only a config, without weights, if the run has not created it. Raises the
    errors of `prepare`.
    """
    with cache_folder(config.output_dir) as cache, TemporaryDirectory(prefix="crosslift-") as scratch:
        index = open_index(config, cache)
        tokenizer_dir = _tokenizer(config, index, cache)
        yield Prepared(index, tokenizer_dir, _starting_weights(config, tokenizer_dir, Path(scratch)))


@contextmanager
def cache_folder(output_dir: Path) -> Iterator[Path]:
    """Context with the index folder for commands that do not train: the run's, or a temporary one if that is read-only.

    Raises:
        ConfigError: `output_dir` cannot be a folder.
    """
    cache = output_dir / CACHE
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="probe-", dir=cache):
            pass
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise run_lock.cannot_write(output_dir, error) from None
    else:
        yield cache
        return
    with TemporaryDirectory(prefix="crosslift-") as scratch:
        _link_all(cache, Path(scratch))
        _link_all(cache / "arrow", Path(scratch, "arrow"))
        yield Path(scratch)


def open_index(config: RunConfig, cache: Path | None = None) -> DataIndex:
    """The index of the run's sources, built if it is missing: in the run's folder, or in `cache`."""
    data = config.data
    return build_index(
        data.sources, data.languages, config.data_dir, cache or config.output_dir / CACHE,
        heldout_items=data.heldout_items, seed=config.seed, max_bad_rows=data.max_bad_rows, task=data.task,
        pairs=data.parallel_sources, patience=data.patience_seconds,
    )  # fmt: skip


def sample_rows(index: DataIndex, language: int, n: int, seed: int, split: Split = Split.TRAIN) -> list[int]:
    """`n` usable rows of a language, by default of training, or all if there are fewer.

    Rows are ranked by a hash of their item, so languages that share items get the same ones: probe sets are as parallel
    as the data allow.
    """
    rows = index.rows(language, split)
    usable = [int(row) for row in rows if not index.bad[row]]
    usable.sort(key=lambda row: stable_hash(seed, "probe", int(index.group[row])))
    return usable[:n]


def training_texts(index: DataIndex, n: int, seed: int) -> Iterator[str]:
    """Up to `n` texts for tokenizer training, the same number from every language, without held-out items."""
    each = max(n // len(index.languages), 1)
    for number, language in enumerate(index.languages):
        rows = index.rows(number)
        for cursor in range(min(each, len(rows))):
            row = row_at(rows, cursor, seed, language)
            try:
                record = index.record(row)
            except BadRow:
                continue  # counted and bounded when the index was built
            yield from record.texts


def train_tokenizer_of(settings: TokenizerTrainingConfig | None, index: DataIndex, output: Path, seed: int) -> None:
    """Train a tokenizer by `tokenizer.train` and save it as a Hugging Face tokenizer."""
    from data_pipeline.text.tokenizer import train_tokenizer

    if settings is None:
        raise ConfigError("tokenizer.train: missing; set tokenizer.train.vocab_size")
    train_tokenizer(training_texts(index, settings.max_sentences, seed), output, settings)


def _tokenizer(config: RunConfig, index: DataIndex, cache: Path | None = None) -> str:
    """The directory or hub name of the run's tokenizer. With `cache`, for commands that do not train."""
    settings = config.tokenizer.train
    if settings is None:
        path = config.tokenizer.path or config.model.path
        assert path is not None  # the config model requires one
        return path
    inputs = {
        "train": settings.model_dump(mode="json"), "seed": config.seed,
        "data": index.fingerprint, "heldout": config.data.heldout_items,
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]
    shared = (cache or config.output_dir / CACHE) / f"tokenizer-{key}"
    own = config.output_dir / "tokenizer"

    def trained() -> Path:
        if not shared.is_dir():
            with atomic_folder(shared, exists="keep") as temporary:  # several processes may train it at once
                train_tokenizer_of(settings, index, temporary, config.seed)
        return shared

    if cache is None:
        return str(_created_once(own, inputs, lambda path: shutil.copytree(trained(), path, dirs_exist_ok=True)))
    return str(own if _is_reusable(own, inputs) else trained())


def _starting_weights(config: RunConfig, tokenizer_dir: str, scratch: Path | None = None) -> str:
    """The directory or hub name that weights are loaded from; those of an encoder include its task's head.

    With `scratch`, for commands that do not train: the run's own, or a config without weights created there.
    """
    task = config.data.task
    start = config.model.path or _from_scratch(config, tokenizer_dir, scratch)
    if task is None:
        return start
    if task.kind == "text" and config.model.path is None:
        return start  # created with that head

    def write(path: Path) -> None:
        from modeling.tasks.encoders import write_task_config, write_task_start

        if scratch is None:
            write_task_start(start, task.kind, task.labels, path, config.seed)
        else:
            write_task_config(start, task.kind, task.labels, path, pretrained=config.model.path is not None)

    inputs = {"start": start, "kind": task.kind, "labels": list(task.labels), "seed": config.seed}
    return str(_created_once(config.output_dir / "task_model", inputs, write, scratch))


def _from_scratch(config: RunConfig, tokenizer_dir: str, scratch: Path | None) -> str:
    init = config.model.init
    assert init is not None  # the config model requires one
    head: Architecture = "causal-lm" if config.data.kind == "chat" else "masked-lm"

    def write(path: Path) -> None:
        from modeling.weights.initial_model import write_initial_model
        from modeling.weights.untrusted import read_tokenizer

        tokenizer = read_tokenizer(tokenizer_dir)
        write_initial_model(init, tokenizer, path, config.seed, architecture=head, weights=scratch is None)

    file = Path(tokenizer_dir, "tokenizer.json")
    tokenizer_id = stable_hash(file.read_text(encoding="utf-8")) if file.is_file() else tokenizer_dir
    inputs = {"init": init, "seed": config.seed, "tokenizer": tokenizer_id, "head": head}
    return str(_created_once(config.output_dir / "initial_model", inputs, write, scratch))


def _created_once(
    path: Path, inputs: Mapping[str, Any], create: Callable[[Path], object], scratch: Path | None = None
) -> Path:
    """`path`, created by `create` unless it exists with the same inputs; with `scratch`, created there instead.

    It is not replaced if checkpoints depend on it: loading a checkpoint reports the difference of the inputs.
    """
    if _is_reusable(path, inputs):
        return path
    if scratch is not None:
        create(scratch / path.name)
        return scratch / path.name
    if (path / NOTE).is_file() and step_folders(path.parent):
        return path
    with atomic_folder(path, exists="replace", exclusive=True) as temporary:
        create(temporary)
        (temporary / NOTE).write_text(json.dumps(inputs, sort_keys=True), encoding="utf-8")
    return path


def _is_reusable(path: Path, inputs: Mapping[str, Any]) -> bool:
    """Whether a run with these inputs uses the existing files at `path`."""
    try:
        noted = json.loads((path / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    wanted = json.loads(json.dumps(inputs))
    if noted == wanted:
        return True
    fixed = FIXED_INPUTS.get(path.name, ())
    return bool(step_folders(path.parent)) and all(noted.get(name) == wanted[name] for name in fixed)


def _link_all(source: Path, target: Path) -> None:
    """Creates `target` as a folder of links to the entries of `source`, except folders named `arrow`."""
    target.mkdir(exist_ok=True)
    for entry in source.iterdir() if source.is_dir() else ():
        if entry.name != "arrow":
            (target / entry.name).symlink_to(entry.absolute())


def _ready_file(config: RunConfig) -> Path:
    key = stable_hash(json.dumps(config.model_dump(mode="json"), sort_keys=True))
    return config.output_dir / f".prepared-{key:016x}.json"
