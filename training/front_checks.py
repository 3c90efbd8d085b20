"""What is refused before any rank starts: by `check`, `train`, `prefetch` and `submit` alike.

In: a RunConfig. Out: nothing, or one error for people. Next: `prepare.py`.
"""

from __future__ import annotations

from training.config import RunConfig
from training.errors import ConfigError
from training.mlflow_store import missing_folder


def check_start(config: RunConfig) -> None:
    """What the run file alone tells, with a look at the disk.

    Raises:
        ConfigError: one line.
    """
    uri = config.tracking.uri
    if config.tracking.enabled and uri is not None and (folder := missing_folder(uri)) is not None:
        raise ConfigError(f"tracking.uri: {uri}: there is no folder {folder}; make it, or name another place")
