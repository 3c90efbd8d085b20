"""MLflow stores: addresses, names as MLflow accepts them, and the only function that opens a client.

Calls of the client end after a bounded time. Importing mlflow takes seconds, and so does creating a SQLite store; both
happen inside `open_client`, which a training process calls from a background thread only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import posixpath
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.atomic import atomic_file
from data_pipeline.secrets import without_login
from data_pipeline.sources.paths import expanded
from training.tracking.run_record import PARAMS_NAME

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
MAX_METRICS = 1000  # per request
MAX_KEY, MAX_PARAM, MAX_TAG = 250, 6000, 8000  # characters
# By default one call to a server that does not respond takes some 20 minutes, and MLflow prints and sends telemetry.
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
}
_BOUNDED = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
# File systems on which SQLite's locks are unreliable.
_SHARED_DISKS = re.compile(
    r"(nfs4?|cifs|smb3|smbfs|lustre|gpfs|beegfs|ceph|afs|glusterfs|panfs|orangefs|wekafs)$|fuse\.(?!portal|snap)"
)
# Without this tag MLflow 3 shows an experiment as an application's, with traces instead of runs.
EXPERIMENT_KIND = ("mlflow.experimentKind", "custom_model_development")
# MLflow's page sorts charts by the part of a metric's name before the last "/". To show the loss first, all that a
# training step reports is renamed to train/..., and what is measured on other data to a later group.
_GROUPS = {
    "data": "train/data", "guard": "train/guard", "memory": "train/memory", "ranks": "train/ranks",
    "shift": "train/shift",
    "eval": "validation", "score": "validation",
}  # fmt: skip
_INVALID = r"[^/\w.\- :]"  # characters in names
_NOT_SENT = "data/step_fingerprint"  # a hash, whose chart would be meaningless

_importing = threading.Lock()


class StoreError(Exception):
    """Why a store does not accept a run, and how to correct that, in one line."""


def open_client(uri: str) -> MlflowClient:
    """A client for the store at `uri`. Environment variables that the user has set are kept.

    mlflow has circular imports: two threads that import parts of it at the same time break it for the whole process.
    Hence it is imported here under a lock, and other functions import parts of it only after they have opened a client.
    """
    for name, value in {**QUIET, **_BOUNDED}.items():
        os.environ.setdefault(name, value)
    with _importing:
        from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic", "sqlalchemy"):  # crosslift reports their errors in one line
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if (database := _database(uri)) is not None:
        _create_once(database)
    client = MlflowClient(tracking_uri=uri)
    remove_misread(uri)
    return client


def remove_misread(uri: str) -> None:
    """Remove the empty folder that MLflow creates where it reads a SQLite address without its escapes."""
    database, misread = _database(uri), Path(uri.partition(":///")[2].partition("?")[0]).parent
    if database is not None and misread != database.parent:
        with contextlib.suppress(OSError):  # it does not exist, or is not empty
            os.removedirs(misread)


def _create_once(database: Path) -> None:
    """Create a SQLite store if there is none; one process at a time, under a temporary name until it is complete.

    MLflow creates the tables in dozens of migrations: two processes that do so at once, or one that is killed, would
    leave a store that cannot be opened.
    """
    from mlflow.tracking import MlflowClient

    if database.exists():
        return
    with database.with_name(f".{database.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if database.exists():
            return
        with atomic_file(database, exclusive=True) as unfinished:
            unfinished.with_name(f"{unfinished.name}-journal").unlink(missing_ok=True)
            address = _sqlite_address(unfinished)
            MlflowClient(tracking_uri=address).search_experiments(max_results=1)
            remove_misread(address)


def default_store(folder: Path) -> str:
    """The address of the SQLite store in a folder."""
    return _sqlite_address(folder.resolve() / "mlflow.db")


def _sqlite_address(file: Path) -> str:
    """The address of a SQLite file. In an address `?` begins the options and `%` an escape: both are escaped."""
    return "sqlite:///" + str(file).replace("%", "%25").replace("?", "%3F")


def checked_address(uri: str) -> str:
    """Validate a store's address and expand `~` and variables in the path of its file; no store is opened.

    Raises:
        ValueError: MLflow does not support such an address, or its host or file is missing.
    """
    shown = re.sub(r"//[^/@\s]*@", "//", uri)
    scheme, _, rest = uri.partition(":")
    kind = scheme.partition("+")[0]  # "postgresql+psycopg2"
    expected = "write http://HOST:PORT or sqlite:////absolute/path/mlflow.db"
    if kind == "databricks" or kind in {plugin.name for plugin in entry_points(group="mlflow.tracking_store")}:
        return uri
    if kind == "file" or not rest:
        if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):
            return expanded(uri)
        raise ValueError(f"{shown!r}: MLflow no longer writes to plain folders; {expected}")
    if kind not in _DATABASES and kind not in ("http", "https"):
        raise ValueError(f"{shown!r}: MLflow does not support such an address; {expected}")
    if kind == "sqlite":
        start, slashes, path = uri.partition(":///")
        if not slashes or path in ("", ":memory:"):
            raise ValueError(f"{shown!r}: names no file; write sqlite:////absolute/path/mlflow.db")
        path = expanded(path)
        if "?" in path and not re.fullmatch(r"[^?]+\?(?:\w+=[^?/&]*&?)+", path):
            raise ValueError(f"{shown!r}: options such as timeout=30 follow a ?; write %3F for a ? in a folder's name")
        return start + slashes + path
    try:
        address = urllib.parse.urlsplit(uri)
        complete = address.port != 0 and (address.hostname if kind in ("http", "https") else address.path.strip("/"))
    except ValueError as error:
        raise ValueError(f"{shown!r}: {error}") from None
    if not complete:
        form = "HOST:PORT" if kind in ("http", "https") else "USER@HOST:PORT/DATABASE"
        raise ValueError(f"{shown!r}: incomplete; write {scheme}://{form}")
    return uri


def missing_folder(uri: str) -> Path | None:
    """The folder of a SQLite store if it does not exist."""
    database = _database(uri)
    return None if database is None or database.parent.is_dir() else database.parent


def artifact_root(output_dir: Path, uri: str) -> str | None:
    """Where a new experiment stores its artifacts: beside a database; a server decides itself (None)."""
    if is_server(uri):
        return None
    database = _database(uri)
    return ((database.parent if database else output_dir).resolve() / "mlartifacts").as_uri()


def _database(uri: str) -> Path | None:
    """The file of a SQLite store; None for other kinds of stores."""
    scheme, _, rest = uri.partition(":///")
    return Path(urllib.parse.unquote(rest.partition("?")[0])) if scheme.startswith("sqlite") else None


def is_server(uri: str) -> bool:
    """Whether the address is a server's, not a database's or a folder's."""
    return uri.startswith(("http://", "https://"))


def runs_page(server: str, experiment_id: str) -> str:
    """Address of MLflow's list of an experiment's runs; valid on a browser's first visit too."""
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"


def combined_runs_page(server: str, experiment_ids: Sequence[str]) -> str:
    """Address of MLflow's list of the runs of several experiments."""
    numbers = urllib.parse.quote(json.dumps(list(experiment_ids), separators=(",", ":")))
    return f"{server.rstrip('/')}/#/compare-experiments/s?experiments={numbers}&workflowType=machine_learning"


def run_page(server: str, experiment_id: str, run_id: str) -> str:
    """Address of MLflow's page of one run."""
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def metric_name(name: str) -> str | None:
    """A metric's name in MLflow; None if it is not sent."""
    if name == _NOT_SENT:
        return None
    group, slash, rest = name.partition("/")
    return mlflow_key(f"{_GROUPS.get(group, group)}/{rest}" if slash else name)


def truncate(text: str, limit: int) -> str:
    """At most `limit` characters of a text; a truncated one names the artifact that holds it whole."""
    if len(text) <= limit:
        return text
    mark = f" ... [cut; whole in the artifact {PARAMS_NAME}]"
    return text[: limit - len(mark)] + mark


def mlflow_key(name: str) -> str:
    """The name of a metric, param or tag with invalid characters replaced by Latin letters, else by `_`."""
    if not name.isascii() and re.search(_INVALID, name):  # combining marks: two names must not become the same
        from anyascii import anyascii

        name = anyascii(name)
    clean = re.sub(_INVALID, "_", name)
    return posixpath.normpath(f"/{clean}").lstrip("/")[:MAX_KEY].rstrip("/") or "_"


def error_line(error: BaseException) -> str:
    """The root cause of an error in one line: MLflow wraps a refused connection three times."""
    if isinstance(error, StoreError):
        return str(error)
    seen = {id(error)}
    while (cause := error.__cause__ or error.__context__) is not None and id(cause) not in seen:
        seen.add(id(cause))  # causes may form a cycle
        error = cause
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]


def server_answers(uri: str, timeout: float = 3.0) -> bool:
    """Whether an MLflow server responds, even with an error."""
    if not is_server(uri):
        return False
    try:
        urllib.request.urlopen(f"{without_login(uri).rstrip('/')}/health", timeout=timeout).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def on_shared_disk(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """Whether the folder is on a network disk; False if that cannot be determined."""
    try:
        table = mounts.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    folder, depth, kind = folder.resolve(), -1, ""
    for line in table.splitlines():
        _, mount, mount_kind, *_ = line.split(" ")
        point = Path(mount.replace("\\040", " "))
        if folder.is_relative_to(point) and len(point.parts) >= depth:  # a later mount hides an earlier one
            depth, kind = len(point.parts), mount_kind
    return _SHARED_DISKS.match(kind) is not None
