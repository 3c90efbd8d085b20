"""Prepares what a run needs before its first step: index, tokenizer, starting weights.

A run (`prepare`) makes `tokenizer/`, `initial_model/` and `task_model/` in its folder, each atomically and with a note
of what it was made from: a second start finds them, and a changed config makes new ones, unless checkpoints depend on
them. Rank 0 makes them. The other ranks wait for files, not in a collective call, which would time out while a large
corpus is indexed.

Commands that only look (`look`) never write these. What they share with runs is in `index/`, in folders named by a hash
of everything they depend on: the index, and trained tokenizers.
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
from data_pipeline.records import BadRow, stable_hash
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
# What of it a start with checkpoints may not change, beside which data and seed do not matter: they are kept.
SETTLED = {"tokenizer": ("train",), "initial_model": ("init", "head"), "task_model": ("kind", "labels")}


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `prepare` made."""

    index: DataIndex
    tokenizer_dir: str  # directory or hub name
    model_dir: str  # directory or hub name; starting weights


def prepare(config: RunConfig, rank: int = 0) -> Prepared:
    """For a run: index the data, train the tokenizer, initialise the weights, as far as the config asks for it.

    Raises:
        DataError, ConfigError: with one line, before anything is trained.
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
    """Rank 0, before a barrier: the others shall wait for this start's preparation, not take an earlier one's."""
    _ready_file(config).unlink(missing_ok=True)


@contextmanager
def look(config: RunConfig) -> Iterator[Prepared]:
    """For a command that only looks: what a run would be prepared with; what the run's folder holds stays as it is.

    Inside, a model from scratch and a task's model are their config without weights where the run has not made them.
    Raises as `prepare`.
    """
    with cache_folder(config.output_dir) as cache, TemporaryDirectory(prefix="crosslift-") as scratch:
        index = open_index(config, cache)
        tokenizer_dir = _tokenizer(config, index, cache)
        yield Prepared(index, tokenizer_dir, _starting_weights(config, tokenizer_dir, Path(scratch)))


@contextmanager
def cache_folder(output_dir: Path) -> Iterator[Path]:
    """Where a command that only looks keeps its index: with the run, or where that folder is read-only, for a while.

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
    """The index of the run's sources, built where it is missing: in the run's folder, or in `cache`."""
    data = config.data
    return build_index(
        data.sources, data.languages, config.data_dir, cache or config.output_dir / CACHE,
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


def training_texts(index: DataIndex, n: int, seed: int) -> Iterator[str]:
    """Up to `n` texts for tokenizer training, the same number from every language, held-out items left out."""
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
    """Train the tokenizer that `tokenizer.train` describes and save it as a Hugging Face tokenizer."""
    from data_pipeline.text.tokenizer import train_tokenizer

    if settings is None:
        raise ConfigError("tokenizer.train: missing; it says how large a vocabulary to train")
    train_tokenizer(training_texts(index, settings.max_sentences, seed), output, settings)


def _tokenizer(config: RunConfig, index: DataIndex, cache: Path | None = None) -> str:
    """The run's own tokenizer, or with `cache` one for a command that only looks."""
    settings = config.tokenizer.train
    if settings is None:
        path = config.tokenizer.path or config.model.path
        assert path is not None  # the config model requires one
        return path
    made_from = {
        "train": settings.model_dump(mode="json"), "seed": config.seed,
        "data": index.fingerprint, "heldout": config.data.heldout_items,
    }  # fmt: skip
    trained = (cache or config.output_dir / CACHE) / f"tokenizer-{_key(made_from)}"
    own = config.output_dir / "tokenizer"

    def train(path: Path) -> None:
        train_tokenizer_of(settings, index, path, config.seed)

    def copy(path: Path) -> None:
        _made_by_key(trained, train)
        shutil.copytree(trained, path, dirs_exist_ok=True)

    if cache is None:
        return str(_made_once(own, made_from, copy))
    if _is_kept(own, made_from):
        return str(own)
    return str(_made_by_key(trained, train))


def _starting_weights(config: RunConfig, tokenizer_dir: str, scratch: Path | None = None) -> str:
    """The directory or hub name that weights are loaded from; an encoder's gets its task's head there.

    With `scratch`, for a command that only looks, the run's own or a config without weights.
    """
    task = config.data.task
    start = config.model.path or _from_scratch(config, tokenizer_dir, scratch)
    if task is None:
        return start
    if task.kind == "text" and config.model.path is None:
        return start  # made with that head

    def write(path: Path) -> None:
        from modeling.tasks.encoders import write_task_config, write_task_start

        if scratch is None:
            write_task_start(start, task.kind, task.labels, path, config.seed)
        else:
            write_task_config(start, task.kind, task.labels, path, pretrained=config.model.path is not None)

    made_from = {"start": start, "kind": task.kind, "labels": list(task.labels), "seed": config.seed}
    return str(_made_once(config.output_dir / "task_model", made_from, write, scratch))


def _from_scratch(config: RunConfig, tokenizer_dir: str, scratch: Path | None) -> str:
    init = config.model.init
    assert init is not None  # the config model requires one
    head: Architecture = "causal-lm" if config.data.kind == "chat" else "masked-lm"

    def write(path: Path) -> None:
        from modeling.weights.initial_model import write_initial_model
        from modeling.weights.untrusted import read_tokenizer

        tokenizer = read_tokenizer(tokenizer_dir)
        write_initial_model(init, tokenizer, path, config.seed, architecture=head, weights=scratch is None)

    made_from = {"init": init, "seed": config.seed, "tokenizer": _identity(tokenizer_dir), "head": head}
    return str(_made_once(config.output_dir / "initial_model", made_from, write, scratch))


def _identity(tokenizer_dir: str) -> Any:
    file = Path(tokenizer_dir) / "tokenizer.json"
    return stable_hash(file.read_text(encoding="utf-8")) if file.is_file() else tokenizer_dir


def _made_once(
    path: Path, made_from: Mapping[str, Any], make: Callable[[Path], None], scratch: Path | None = None
) -> Path:
    """`path`, made by `make` unless it is there already from the same ingredients; with `scratch`, made there instead.

    What checkpoints depend on is never made again: whether they may be used with other ingredients is decided, with
    the difference, when one is loaded.
    """
    if _is_kept(path, made_from):
        return path
    if scratch is not None:
        make(scratch / path.name)
        return scratch / path.name
    if (path / NOTE).is_file() and _has_checkpoints(path.parent):
        return path
    with atomic_folder(path, exists="replace", exclusive=True) as temporary:
        make(temporary)
        (temporary / NOTE).write_text(json.dumps(made_from, sort_keys=True), encoding="utf-8")
    return path


def _is_kept(path: Path, made_from: Mapping[str, Any]) -> bool:
    """Whether a run with these ingredients uses what lies at `path`."""
    try:
        noted = json.loads((path / NOTE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    wanted = json.loads(json.dumps(made_from))
    if noted == wanted:
        return True
    settled = SETTLED.get(path.name, ())
    return _has_checkpoints(path.parent) and all(noted.get(name) == wanted[name] for name in settled)


def _has_checkpoints(output_dir: Path) -> bool:
    return bool(step_folders(output_dir))


def _made_by_key(path: Path, make: Callable[[Path], None]) -> Path:
    """`path`, whose name says what it is made from; processes that make it at once do no harm."""
    if not path.is_dir():
        with atomic_folder(path, exists="keep") as temporary:
            make(temporary)
    return path


def _key(made_from: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]


def _link_all(source: Path, target: Path) -> None:
    """`target` as a folder of links to what lies in `source`, folders named `arrow` left out."""
    target.mkdir(exist_ok=True)
    for entry in source.iterdir() if source.is_dir() else ():
        if entry.name != "arrow":
            (target / entry.name).symlink_to(entry.absolute())


def _ready_file(config: RunConfig) -> Path:
    key = stable_hash(json.dumps(config.model_dump(mode="json"), sort_keys=True))
    return config.output_dir / f".prepared-{key:016x}.json"
