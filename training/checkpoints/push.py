"""Uploads an export to a repository of the Hugging Face hub, in one commit: a repository never holds half an export."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from modeling.export_info import ADAPTER_FOLDER, EXPORT_FILE, RUN_EXPORT, ExportInfo
from training.errors import ConfigError
from training.hub_errors import error_chain, one_line, redacted

log = logging.getLogger(__name__)
OPTION = "--push-to-hub"
WEIGHTS = (".safetensors", ".safetensors.index.json")


def check_push(repository: str) -> None:
    """Checks what can be known without the network, before an export is made.

    Raises:
        ConfigError: not a repository's name; the hub is offline; there is no token.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        well_formed = repository.count("/") == 1
    except HFValidationError:
        well_formed = False
    if not well_formed:
        raise ConfigError(f"{OPTION} {repository}: not a repository's name; give OWNER/NAME, such as me/llama-sw")
    if constants.HF_HUB_OFFLINE:
        raise ConfigError(f"{OPTION} {repository}: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it")
    if get_token() is None:
        raise ConfigError(f"{OPTION} {repository}: no token; set HF_TOKEN to one that may write, or call hf auth login")


def export_at(path: Path) -> Path:
    """The export at `path`, or that of the run at `path`.

    Raises:
        ConfigError: there is none.
    """
    for folder in (path, path / RUN_EXPORT):
        if (folder / EXPORT_FILE).is_file():
            return folder
    raise ConfigError(f"{path}: no export here; --output DIR makes one of a checkpoint or of a run")


def push(export: Path, repository: str, *, private: bool = False, revision: str | None = None) -> str:
    """Uploads an export's files and deletes weight files of an earlier one. Returns the address of what it made.

    Args:
        private: a new repository is made private; one that exists must be.
        revision: a branch, made if it does not exist; by default the main one.

    Raises:
        ConfigError: the export's check failed; the hub refused or cannot be reached. The export stays as it is.
    """
    if ExportInfo.read(export).check_failed:
        raise ConfigError(f"{export}: this export did not pass its check, so it is not uploaded; export again")
    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    _warn_of_local_base(export)
    try:
        return _push(export, repository, private, revision)
    except ConfigError:
        raise
    except Exception as error:
        if (reason := _why(error)) is None:
            raise
        again = f"crosslift export {export} {OPTION} {repository}"
        raise ConfigError(f"{OPTION} {repository}: {reason}; the export is kept, and `{again}` uploads it") from error


def _push(export: Path, repository: str, private: bool, revision: str | None) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    address = str(api.create_repo(repository, private=True if private else None, exist_ok=True))
    if private and not api.model_info(repository).private:
        raise ConfigError(f"{OPTION} {repository}: exists and is public; change that on its page, or drop --private")
    if revision is not None:
        api.create_branch(repository, branch=revision, exist_ok=True)
        address = f"{address}/tree/{revision}"
    files = {path.relative_to(export).as_posix(): path for path in sorted(export.rglob("*")) if path.is_file()}
    there = api.list_repo_files(repository, revision=revision)
    stale = [name for name in there if name.endswith(WEIGHTS) and name not in files]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(name, path) for name, path in files.items()),
        *(CommitOperationDelete(name) for name in stale),
    ]
    api.create_commit(repository, operations, commit_message="Export of crosslift", revision=revision)
    return address


def _warn_of_local_base(export: Path) -> None:
    file = export / ADAPTER_FOLDER / "adapter_config.json"
    base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"] if file.is_file() else ""
    if Path(base).is_absolute():
        log.warning("%s: names the base model by its folder here, %s, which is uploaded with it", file, base)


def _why(error: Exception) -> str | None:
    """What the hub's error means, and how to correct it; None: not an error of the hub."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    causes = error_chain(error)
    if isinstance(error, ValueError) and not isinstance(error, HfHubHTTPError):  # such as refused metadata of the card
        return one_line(error)
    for each in causes:
        if isinstance(each, HfHubHTTPError):
            status = each.response.status_code
            if status in (401, 403):
                return f"not allowed ({status}): set HF_TOKEN to a token that may write to it"
            # Not the whole message: it has the address, which may be a signed one.
            return redacted(f"the hub answered {status} ({each.server_message or each.response.reason_phrase})")
    if any(type(each).__module__.startswith(("httpx", "httpcore")) for each in causes):
        return f"{constants.ENDPOINT} cannot be reached ({one_line(causes[-1])}); upload where there is a network"
    return one_line(error) if isinstance(error, OSError | ValueError | RuntimeError) else None
