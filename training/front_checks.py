"""What is refused before any rank starts: by `check`, `train`, `prefetch` and `submit` alike.

In: a RunConfig. Out: nothing, or one error for people. Next: `prepare.py`.
"""

from __future__ import annotations

from training.config import RunConfig
from training.errors import ConfigError
from training.mlflow_store import missing_folder
from training.tracking import target_of


def check_start(config: RunConfig) -> None:
    """What the run file and the environment alone tell, with a look at the disk.

    Raises:
        ConfigError: one line; of raw DeepSpeed settings, one a mistake.
    """
    if config.deepspeed:  # else nothing of DeepSpeed's can be wrong
        from training.engine import deepspeed_settings

        deepspeed_settings(config, 1)
    if not config.tracking.enabled:
        return
    target = target_of(config.tracking, config.output_dir)
    if target.named and target.uri and (folder := missing_folder(target.uri)) is not None:
        said = "tracking.uri" if config.tracking.uri is not None else target.uri_from
        raise ConfigError(f"{said}: {target.uri}: there is no folder {folder}; make it, or name another place")
