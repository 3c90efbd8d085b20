"""What MLflow demands and how it is kept quiet: the one file that opens an MLflow client.

In: a store's address. Out: a client whose calls end in bounded time, names and addresses as MLflow takes
them. Next: `mlflow_feed.py`. mlflow takes seconds to import and a new SQLite store seconds to migrate, so
both happen inside `open_client`, which a training process calls from a thread only.
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
from data_pipeline.sources.paths import expanded

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
MAX_METRICS = 1000  # of one request
MAX_KEY, MAX_PARAM, MAX_TAG = 250, 6000, 8000  # characters
# MLflow's own defaults let one call to a silent server take some 20 minutes, print to stdout and phone home.
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
}
_BOUNDED = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
# Where SQLite's locks are not to be trusted.
_SHARED_DISKS = re.compile(
    r"(nfs4?|cifs|smb3|smbfs|lustre|gpfs|beegfs|ceph|afs|glusterfs|panfs|orangefs|wekafs)$|fuse\.(?!portal|snap)"
)


# MLflow 3 shows an experiment as an application's, with traces instead of runs, unless this tag says what it is of.
EXPERIMENT_KIND = ("mlflow.experimentKind", "custom_model_development")
# MLflow's page orders charts by the part of a metric's name before its last "/". The loss shall come first: what else a
# training step reports stands below train/ there, and what is measured on other data after it.
_GROUPS = {
    "data": "train/data", "guard": "train/guard", "memory": "train/memory", "ranks": "train/ranks",
    "shift": "train/shift",
    "eval": "validation", "score": "validation",
}  # fmt: skip
_NOT_TAKEN = r"[^/\w.\- :]"  # characters
_NO_CURVE = ("data/step_fingerprint",)  # a hash: the record has it, a chart of it says nothing

_importing = threading.Lock()


class StoreError(Exception):
    """What keeps a store from taking a run, and how to mend it, in one line."""


def open_client(uri: str) -> MlflowClient:
    """A client for the store at `uri`. Environment variables that the user has set are kept.

    mlflow imports itself in circles: two threads that import parts of it at once break it for the whole process. So
    it is imported here, by one at a time; whoever needs a part of it has opened a client before.
    """
    for name, value in {**QUIET, **_BOUNDED}.items():
        os.environ.setdefault(name, value)
    with _importing:
        from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic", "sqlalchemy"):  # said by us in one line, and set too late if already imported
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if (database := _database(uri)) is not None:
        _make_once(database)
    client = MlflowClient(tracking_uri=uri)
    remove_misread(uri)
    return client


def remove_misread(uri: str) -> None:
    """Removes the empty folder that MLflow makes where it reads a SQLite file's address without its escapes."""
    database, misread = _database(uri), Path(uri.partition(":///")[2].partition("?")[0]).parent
    if database is not None and misread != database.parent:
        with contextlib.suppress(OSError):  # not made, or not empty: somebody's own
            os.removedirs(misread)


def _make_once(database: Path) -> None:
    """A new SQLite store, made by one process, under another name until it is whole.

    MLflow makes the tables in dozens of migrations: two processes at it at once, or one that is killed, leave a store
    that nobody can open again.
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
    """The address of a SQLite file: in one, what follows `?` are options, and `%41` is the letter A."""
    return "sqlite:///" + str(file).replace("%", "%25").replace("?", "%3F")


def checked_address(uri: str) -> str:
    """A store's address with `~` and variables in the path of its file filled in; no store is opened.

    Raises:
        ValueError: MLflow takes no such address, or it lacks the host or the file.
    """
    shown = re.sub(r"//[^/@\s]*@", "//", uri)
    scheme, _, rest = uri.partition(":")
    kind = scheme.partition("+")[0]  # "postgresql+psycopg2"
    right = "write http://HOST:PORT or sqlite:////absolute/path/mlflow.db"
    if kind == "databricks" or kind in {plugin.name for plugin in entry_points(group="mlflow.tracking_store")}:
        return uri
    if kind == "file" or not rest:
        if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):
            return expanded(uri)
        raise ValueError(f"{shown!r}: MLflow writes to plain folders no more; {right}")
    if kind not in _DATABASES and kind not in ("http", "https"):
        raise ValueError(f"{shown!r}: MLflow takes no such address; {right}")
    if kind == "sqlite":
        start, slashes, path = uri.partition(":///")
        if not slashes or path in ("", ":memory:"):
            raise ValueError(f"{shown!r}: names no file; write sqlite:////absolute/path/mlflow.db")
        path = expanded(path)
        if "?" in path and not re.fullmatch(r"[^?]+\?(?:\w+=[^?/&]*&?)+", path):
            raise ValueError(f"{shown!r}: what follows ? are options such as timeout=30; write a folder's ? as %3F")
        return start + slashes + path
    try:
        address = urllib.parse.urlsplit(uri)
        named = address.port != 0 and (address.hostname if kind in ("http", "https") else address.path.strip("/"))
    except ValueError as error:
        raise ValueError(f"{shown!r}: {error}") from None
    if not named:
        form = "HOST:PORT" if kind in ("http", "https") else "USER@HOST:PORT/DATABASE"
        raise ValueError(f"{shown!r}: lacks a part; write {scheme}://{form}")
    return uri


def missing_folder(uri: str) -> Path | None:
    """The folder of a SQLite store, where it is not there."""
    database = _database(uri)
    return None if database is None or database.parent.is_dir() else database.parent


def artifact_root(output_dir: Path, uri: str) -> str | None:
    """Where a new experiment keeps its artifacts: a server decides itself, a database has them beside it."""
    if is_server(uri):
        return None
    database = _database(uri)
    return ((database.parent if database else output_dir).resolve() / "mlartifacts").as_uri()


def _database(uri: str) -> Path | None:
    """The file of a SQLite store; None: another kind of store."""
    scheme, _, rest = uri.partition(":///")
    return Path(urllib.parse.unquote(rest.partition("?")[0])) if scheme.startswith("sqlite") else None


def without_password(uri: str) -> str:
    """The address as it may be written down. A server's loses the user too: half a login would be tried."""
    address = urllib.parse.urlsplit(uri)
    user = f"{address.username}@" if address.username and not address.scheme.startswith("http") else ""
    return uri.replace(address.netloc, user + address.netloc.rpartition("@")[2], 1) if address.netloc else uri


def is_server(uri: str) -> bool:
    """True of a server's address; False of a database's or a folder's."""
    return uri.startswith(("http://", "https://"))


def runs_page(server: str, experiment_id: str) -> str:
    """Where MLflow's page lists an experiment's runs, on a browser's first visit too."""
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"


def runs_of_all(server: str, experiment_ids: Sequence[str]) -> str:
    """Where MLflow's page lists the runs of several experiments together."""
    numbers = urllib.parse.quote(json.dumps(list(experiment_ids), separators=(",", ":")))
    return f"{server.rstrip('/')}/#/compare-experiments/s?experiments={numbers}&workflowType=machine_learning"


def run_page(server: str, experiment_id: str, run_id: str) -> str:
    """Where MLflow's page shows one run."""
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def metric_name(name: str) -> str | None:
    """A metric's name in MLflow; None: it is not sent there."""
    if name in _NO_CURVE:
        return None
    group, slash, rest = name.partition("/")
    return mlflow_key(f"{_GROUPS.get(group, group)}/{rest}" if slash else name)


def cut(text: str, limit: int, whole: str) -> str:
    """At most `limit` characters of a text; a cut one ends with where it stands whole."""
    if len(text) <= limit:
        return text
    mark = f" ... [cut; whole in the artifact {whole}]"
    return text[: limit - len(mark)] + mark


def mlflow_key(name: str) -> str:
    """A metric's, param's or tag's name with what MLflow does not take replaced: by Latin letters, or by `_`."""
    if not name.isascii() and re.search(_NOT_TAKEN, name):  # a script with marks: two names may not become one
        from anyascii import anyascii

        name = anyascii(name)
    clean = re.sub(_NOT_TAKEN, "_", name)
    return posixpath.normpath(f"/{clean}").lstrip("/")[:MAX_KEY].rstrip("/") or "_"


def reason(error: BaseException) -> str:
    """The first cause in one line: MLflow wraps a refused connection three times."""
    if isinstance(error, StoreError):
        return str(error)
    seen = {id(error)}
    while (cause := error.__cause__ or error.__context__) is not None and id(cause) not in seen:
        seen.add(id(cause))  # a library may chain them in a ring
        error = cause
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]


def server_answers(uri: str, timeout: float = 3.0) -> bool:
    """True if an MLflow server is there, whatever it thinks of us."""
    if not is_server(uri):
        return False
    try:
        urllib.request.urlopen(f"{without_password(uri).rstrip('/')}/health", timeout=timeout).close()
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False
    return True


def on_shared_disk(folder: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """True if the folder lies on a network disk. False where the system does not tell."""
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
