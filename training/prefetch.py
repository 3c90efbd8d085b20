"""Downloads everything that a run reads from the hub into a cache that compute nodes without a network can read.

The cache is that of HF_HOME. A line for each model, tokenizer and data set names its place; each is then opened by a
separate process with HF_HUB_OFFLINE=1, as a job will open it. `python -m training.prefetch` is that process: it reads
the run's config as JSON from stdin.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from training.checks.front import check_model_files, check_start
from training.config import RunConfig
from training.errors import ConfigError
from training.hub_errors import error_chain, one_line, redacted
from training.run_file import validate
from training.run_folder.prepare import CACHE

if TYPE_CHECKING:
    from data_pipeline.config import SourceConfig

OFFLINE = {"HF_HUB_OFFLINE": "1"}
# Variables that override HF_HOME in the hub's libraries.
CACHE_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_DATASETS_CACHE", "HF_XET_CACHE")
HUB_PREFIXES = ("HF_", "HUGGINGFACE_")  # of the variables that the hub's libraries read


def use_variables(variables: Mapping[str, str]) -> None:
    """Set those of a job's variables that the hub's libraries read.

    Must be called before the hub's libraries are imported; later calls with the same variables have no effect.
    """
    chosen = {name: value for name, value in variables.items() if name.startswith(HUB_PREFIXES)}
    if any(os.environ.get(name) != value for name, value in chosen.items()):
        _not_imported()
        os.environ.update(chosen)


def use_caches(variables: Mapping[str, str]) -> None:
    """Use the cache of jobs with these variables; otherwise as `use_hf_home`."""
    _keep_login()
    use_variables({name: variables[name] for name in ("HF_HOME", *CACHE_VARIABLES) if name in variables})


def use_hf_home(folder: Path) -> None:
    """Use `folder` as the cache. Must be called before the hub's libraries are imported.

    The token stays in its place, as it must not be in a shared folder.

    Raises:
        ConfigError: `folder` cannot be written.
    """
    _not_imported()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--hf-home {folder}: cannot be written ({error.strerror}); choose another folder") from None
    _keep_login()
    os.environ["HF_HOME"] = str(folder.resolve())
    for name in CACHE_VARIABLES:
        os.environ.pop(name, None)


def _keep_login() -> None:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    os.environ.setdefault("HF_TOKEN_PATH", str(home / "token"))


def _not_imported() -> None:
    if "huggingface_hub" in sys.modules:
        raise RuntimeError("huggingface_hub is imported already, and has read HF_HOME")


def prefetch(config: RunConfig) -> Iterator[str]:
    """Downloads what the run needs; yields a line for each part: kind, name, origin, size, folder.

    Raises:
        ConfigError, DataError, ModelError: a part is not on the hub, not permitted, not readable, or too large.
    """
    from huggingface_hub.constants import HF_HOME

    # The hub's warning about a disk that is too small would repeat its error.
    warnings.filterwarnings("ignore", category=UserWarning, module="huggingface_hub")
    if not sys.stderr.isatty():
        import datasets
        from huggingface_hub.utils import disable_progress_bars

        datasets.disable_progress_bars()
        disable_progress_bars()
    check_start(config)
    if config.model.path is not None:
        yield _model(config.model.path)
    tokenizer = config.tokenizer.path
    if tokenizer is not None and tokenizer != config.model.path:
        yield _tokenizer(tokenizer)
    for source in config.data.all_sources:
        yield from _source(source, config.data_dir, config.output_dir / CACHE)
    _check_offline(config)
    yield "opened again with HF_HUB_OFFLINE=1: model, tokenizer, data"
    yield f"jobs need: HF_HOME={HF_HOME} HF_HUB_OFFLINE=1"


def open_all(config: RunConfig) -> None:
    """Opens model, tokenizer and data, as a run does, without reading weights or rows. Raises as a run would."""
    from data_pipeline.sources.sources import open_source

    check_model_files(config)
    for source in config.data.all_sources:
        open_source(source, config.data_dir, config.output_dir / CACHE)


def _model(path: str) -> str:
    from modeling.loading import HUB_FILES, HUB_IGNORED
    from modeling.weights.weight_files import stored_tensors

    if Path(path).is_dir():
        directory = Path(path)
        stored_tensors(directory)
        return _line("model", path, "local", directory)
    return _line("model", path, "hub", _snapshot("model.path", path, HUB_FILES, HUB_IGNORED))


def _tokenizer(path: str) -> str:
    from modeling.loading import HUB_FILES, HUB_IGNORED

    if Path(path).is_dir():
        return _line("tokenizer", path, "local", Path(path))
    return _line(
        "tokenizer", path, "hub", _snapshot("tokenizer.path", path, HUB_FILES, (*HUB_IGNORED, "*.safetensors"))
    )


def _snapshot(key: str, name: str, wanted: tuple[str, ...], ignored: tuple[str, ...]) -> Path:
    """The folder of a repository's downloaded files. Raises ConfigError, in one line, if that fails."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HOME

    patterns = {"allow_patterns": list(wanted), "ignore_patterns": list(ignored)}
    try:
        planned = snapshot_download(name, dry_run=True, **patterns)  # type: ignore[call-overload]
        needed = sum(file.file_size for file in planned if file.will_download)
        home = Path(HF_HOME).absolute()
        free = shutil.disk_usage(next(each for each in (home, *home.parents) if each.exists())).free
        if needed > free:
            raise ConfigError(
                f"{key} {name!r}: {_size(needed)} are to be fetched, but {HF_HOME} has {_size(free)} left; "
                "free some, or give another --hf-home"
            )
        return Path(snapshot_download(name, **patterns))  # type: ignore[call-overload]
    except (OSError, ValueError) as error:  # every hub error is one of the two
        raise ConfigError(f"{key} {name!r}: {_why(error)}") from None


def _source(source: SourceConfig, data_dir: Path | None, cache: Path) -> Iterator[str]:
    """Lines about one source; hub data sets are downloaded and prepared, in `cache`."""
    from data_pipeline.records import DataError
    from data_pipeline.sources.sources import open_source
    from data_pipeline.sources.tables import HubSplit, load_hub

    what = f"data {source.name!r}"
    try:
        shards = open_source(source, data_dir, cache)
    except DataError as error:
        if source.hub is None or Path(data_dir or "", source.hub).is_dir():
            raise
        cause: BaseException | None = error.__cause__
        while cause is not None and not isinstance(cause, OSError | ValueError):  # datasets wraps a full disk's error
            cause = cause.__cause__
        reason = _why(cause) if cause is not None else redacted(str(error))
        raise ConfigError(f"data.sources {source.name!r}: {source.hub}: {reason}") from None
    for shard in shards:
        if isinstance(shard, HubSplit):
            files = [Path(each["filename"]) for each in load_hub(shard.path, shard.config, shard.split).cache_files]
            where = "local" if Path(shard.path).is_dir() else "hub"
            yield f"{what}: {shard.name}, {where}, {_size(_bytes(files))} in {files[0].parent if files else shard.path}"
    remote = [shard.address for shard in shards if "://" in shard.address]
    local = [Path(shard.address) for shard in shards if "://" not in shard.address and not isinstance(shard, HubSplit)]
    for path in local:
        try:
            path.open("rb").close()
        except OSError as error:
            raise ConfigError(f"{path}: source {source.name!r}: cannot be read ({error.strerror})") from None
    if local:
        yield f"{what}: {len(local)} files, local, {_size(_bytes(local))} in {local[0].parent}"
    if remote:
        yield f"{what}: {len(remote)} files such as {remote[0]}: not fetched; the job itself needs to reach them"


def _check_offline(config: RunConfig) -> None:
    """Opens everything in a separate process, as the hub's libraries read HF_HUB_OFFLINE when they are imported."""
    done = subprocess.run(
        [sys.executable, "-m", "training.prefetch"],
        input=config.model_dump_json(),  # with logins, which must not be written to a file
        env={**os.environ, **OFFLINE}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"fetched, but with HF_HUB_OFFLINE=1: {redacted(last.removeprefix('crosslift: '))}")


def _why(error: BaseException) -> str:
    """What a hub error means, and how to correct it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        DryRunError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    causes = error_chain(error)
    if any(isinstance(each, OSError) and each.errno == errno.ENOSPC for each in causes):
        return f"no space left in {constants.HF_HOME}; free some, or give another --hf-home"
    for each in causes:
        if isinstance(each, GatedRepoError):
            return "gated: accept its terms on its page, then set HF_TOKEN to a token of that account"
        if isinstance(each, RepositoryNotFoundError | HFValidationError):
            return f"no directory here, and no such repository at {constants.ENDPOINT}; if it is private, set HF_TOKEN"
        if isinstance(each, HfHubHTTPError) and each.response.status_code in (401, 403):
            return "not allowed: set HF_TOKEN to a token that may read it"
    if any(isinstance(each, OfflineModeIsEnabled) for each in causes):
        return "HF_HUB_OFFLINE is set, so nothing can be fetched; unset it"
    if any(isinstance(each, LocalEntryNotFoundError | DryRunError) for each in causes):
        return f"{constants.ENDPOINT} cannot be reached ({one_line(causes[-1])}); fetch where there is a network"
    return one_line(error)


def _line(what: str, name: str, origin: str, directory: Path) -> str:
    files = [path for path in directory.iterdir() if path.is_file()]
    return f"{what}: {name}, {origin}, {_size(_bytes(files))} in {len(files)} files in {directory}"


def _bytes(files: list[Path]) -> int:
    return sum(path.stat().st_size for path in files)


def _size(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.2f} MB"


def main() -> int:
    """`python -m training.prefetch`: returns 0 if everything opens, otherwise 2 after one line."""
    try:
        open_all(validate(json.load(sys.stdin), "stdin"))
    except Exception as error:
        print(f"crosslift: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
