"""Trains a run file with ranks on this machine: for `crosslift train` and other commands that train a model."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

from training.checks.front import check_model_files, check_start, check_starting_model
from training.checks.quantised import refuse_quantised_here
from training.distributed import visible_gpus
from training.errors import ExportCheckFailed, TrainingEnded
from training.launch.launcher import launch
from training.run_file import load_config
from training.run_folder.lock import held
from training.run_folder.prepare import prepare


def train(
    config: Path,
    overrides: Sequence[str] = (),
    nproc: int | None = None,
    resume: str = "auto",
    accept_changes: bool = False,
    profile: int | None = None,
) -> int:
    """Check, prepare and run a run file; returns the exit status.

    Args:
        nproc: ranks; default: the visible GPUs, or 1.
        resume: "auto", "never", or the path of a checkpoint or run.
        accept_changes: resume even if data or config have changed.
        profile: steps of which rank 0 writes a profile.

    Raises:
        ConfigError, DataError, ModelError: user errors found before any rank starts.
    """
    settings = load_config(config, overrides)
    check_start(settings)
    refuse_quantised_here(settings.model)
    check_model_files(settings)
    options = ["--resume", resume, *(["--accept-changes"] if accept_changes else [])]
    options += ["--profile", str(profile)] if profile else []
    with held(settings.output_dir):
        check_starting_model(settings.model, settings.data, settings.objective, prepare(settings))
        return launch(config, overrides, nproc or visible_gpus() or 1, options)


def train_to_end(config: Path, overrides: Sequence[str] = (), nproc: int | None = None) -> None:
    """`train`, for a caller that needs the trained model, even if its export failed the check.

    Raises:
        TrainingEnded: training ended before its last step or without an export.
        KeyboardInterrupt: training was interrupted.
    """
    status = train(config, overrides, nproc)
    if status == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    if status not in (0, ExportCheckFailed.exit_status):
        raise TrainingEnded(config, status)
