"""Going on from a checkpoint: whether it is still the same run, and the state made fit for this number of ranks.

In: the checkpoint that `search.py` found, on every rank. Out: a Trainer with its state. Next: `fit.py`.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import time
from pathlib import Path

from training import checkpoint
from training.assembly import Run
from training.distributed import barrier, rank
from training.errors import ConfigError
from training.prepare import POLL_SECONDS
from training.run_file import resolved
from training.run_state import RunState, differences
from training.saving import base_of
from training.trainer import Trainer

log = logging.getLogger(__name__)
SOURCE = Path(__file__).resolve().parent.parent


def go_on(trainer: Trainer, path: Path, accept_changes: bool) -> int:
    """Load a checkpoint of any number of ranks; the number of finished steps.

    Raises:
        ConfigError: data or config are not those of the checkpoint.
    """
    run, state = trainer.run, RunState.read(path)
    changes = differences(state, run.data.fingerprint, resolved(run.config))
    if changes and not accept_changes:
        listed = "; ".join(changes)
        raise ConfigError(f"{path}: cannot resume, since this is another run: {listed} (--accept-changes goes on)")
    if (met := len(state.totals.get("bad_rows", ()))) > (allowed := run.config.data.max_bad_rows):
        raise ConfigError(
            f"data.max_bad_rows: {allowed}, but {met} unusable rows were met before {path.name} was saved; "
            f"set data.max_bad_rows={met} or more"
        )
    if state.base is not None and (now := base_of(run)) != state.base and (now or {}).get("hash") != state.base["hash"]:
        raise ConfigError(
            f"{path}: holds adapters to the model that lay in {state.base['directory']}, not to that in {run.model_dir}"
        )
    if state.world_size == run.engine.world_size:
        return trainer.restore(path)
    if state.zero_stage != run.config.zero_stage:
        raise ConfigError(
            f"{path}: saved on {state.world_size} ranks under ZeRO-{state.zero_stage}; on {run.engine.world_size} "
            f"ranks it goes on under the same stage: set zero_stage={state.zero_stage}"
        )
    universal = _universal(run, path, state)
    start = trainer.restore(path, universal)
    barrier()
    if rank() == 0:
        shutil.rmtree(universal)
    return start


def _universal(run: Run, path: Path, state: RunState) -> Path:
    """The checkpoint in a form that any number of ranks can load; made by one process, the ranks wait for its marker.

    They wait for a file and not in a collective call, which would time out while a large model is converted.
    """
    output = checkpoint.universal_path(run.config.output_dir, state.step)
    marker = output / checkpoint.MARKER
    if rank() == 0:
        shutil.rmtree(output, ignore_errors=True)
    barrier()
    if rank() == 0:
        log.info(
            "%s was saved on %d ranks, this run has %d: converting it", path, state.world_size, run.engine.world_size
        )
        made = subprocess.run(
            [sys.executable, "-m", "training.engine_state", str(path), str(output)],
            cwd=SOURCE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if made.returncode:
            raise RuntimeError(f"{path}: could not be converted for another number of ranks:\n{made.stderr[-2000:]}")
        marker.touch()
    while not marker.is_file():
        time.sleep(POLL_SECONDS)
    return output
