"""Resuming from a checkpoint: checks that it belongs to the same run, and converts it to this number of ranks.

`permitted` compares configs and data before anything is loaded, also for `crosslift check`, without ranks.
`resume_from` loads the state into a Trainer.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from data_pipeline.config import RowKind
from modeling.architectures import ARCHITECTURE_OF, Architecture, auto_class
from modeling.loading import load_config as load_model_config
from modeling.loading import resolve_directory
from training.assembly import Run
from training.checkpoints import checkpoint
from training.checkpoints.run_state import Difference, RunState, differences
from training.config import RunConfig
from training.distributed import barrier, rank
from training.errors import ConfigError
from training.loop.trainer import Trainer
from training.objectives.scaling import learning_rate
from training.run_file import resolved, validate
from training.run_folder.prepare import POLL_SECONDS, Prepared

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

log = logging.getLogger(__name__)
SOURCE = Path(__file__).resolve().parents[2]


def permitted(
    path: Path, config: RunConfig, prepared: Prepared, fingerprint: Mapping[str, str], accept_changes: bool
) -> RunState:
    """The state of a checkpoint that a run of `config` resumes from, or that ends it.

    Args:
        fingerprint: of the current data.
        accept_changes: resume despite differences that affect the result; they are logged.

    Raises:
        ConfigError: there are differences; with `accept_changes`, only if they prevent loading.
    """
    state = RunState.read(path)
    if config.max_steps < state.step:
        raise ConfigError(
            f"max_steps: {config.max_steps}, but {state.step} steps are done in {path}; set max_steps={state.step} or "
            "more, or give another output_dir"
        )
    found = differences(_with_defaults(state), fingerprint, resolved(config))
    if not any(each.fixed for each in found):
        found += [Difference(line, fixed=True) for line in _other_shapes(path, config.data.kind, prepared.model_dir)]
    if fixed := [each for each in found if each.fixed]:
        what = "cannot be loaded with" if accept_changes else "belongs to another run"
        listed = "; ".join(map(str, fixed if accept_changes else found))
        raise ConfigError(f"{path}: {what}: {listed} (set it back, or give another output_dir)")
    if found and not accept_changes:
        listed = "; ".join(map(str, found))
        raise ConfigError(
            f"{path}: belongs to another run: {listed} (set it back, give another output_dir, or resume with "
            "--accept-changes)"
        )
    for each in found if rank() == 0 else ():
        log.warning("%s: accepted: %s", path, each)
    return state


def _with_defaults(state: RunState) -> RunState:
    """The state with the defaults of options that are newer than it; the run behaved like these defaults."""
    try:
        return replace(state, config=resolved(validate(state.config, "state.json")))
    except ConfigError:  # it has options that no longer exist
        return state


def _other_shapes(path: Path, kind: RowKind, model_dir: str) -> Iterator[str]:
    """A line if the weights of a checkpoint do not fit the shapes of the configured model."""
    head = ARCHITECTURE_OF[kind]
    saved = load_model_config(path / "model_config", head)
    now = load_model_config(resolve_directory(model_dir), head)
    if saved.to_diff_dict() == now.to_diff_dict():
        return
    one, other = (_shapes(each, head) for each in (saved, now))
    names = [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]
    if names:
        first = names[0]
        yield (
            f"the model has {len(names)} weights of other shapes, such as {first}: was {one.get(first)}, now "
            f"{other.get(first)}"
        )


def _shapes(config: PreTrainedConfig, head: Architecture) -> dict[str, list[int]]:
    with torch.device("meta"):
        model = auto_class(head).from_config(config)
    return {name: list(parameter.shape) for name, parameter in model.named_parameters()}


def schedule_change(state: RunState, config: RunConfig) -> str | None:
    """How a changed `max_steps` changes the learning rate of the remaining steps; None if it is unchanged."""
    try:
        before = validate(state.config, "state.json")
    except ConfigError:  # it has options that no longer exist
        return None
    if before.max_steps == config.max_steps:
        return None
    was, now = (
        learning_rate(min(state.step, each.max_steps), each.max_steps, each.optimizer.learning_rate, each.schedule)
        for each in (before, config)
    )
    name, steps = config.schedule.name, f"{config.max_steps} instead of {before.max_steps}"
    what = f"falls until step {steps} ({name})" if name != "constant" else f"warms up as a run of {steps} steps does"
    return (
        f"max_steps: was {before.max_steps}, now {config.max_steps}: the learning rate {what}; at step "
        f"{state.step + 1} it is {now:.3g}, instead of {was:.3g}"
    )


def resume_from(trainer: Trainer, path: Path) -> int:
    """Loads a `permitted` checkpoint, saved on any number of ranks; returns the number of finished steps.

    Raises:
        ConfigError: it has more unusable rows than are allowed, or holds adapters to another model.
    """
    run, state = trainer.run, RunState.read(path)
    if (met := len(state.totals.get("bad_rows", ()))) > (allowed := run.config.data.max_bad_rows):
        raise ConfigError(
            f"data.max_bad_rows: {allowed}, but {met} unusable rows before {path.name} was saved; "
            f"set data.max_bad_rows={met} or more"
        )
    saved = state.base
    if run.config.model.lora is not None and saved is not None and (run.base or {}).get("hash") != saved["hash"]:
        raise ConfigError(
            f"{path}: holds adapters to the model that lay in {saved['directory']}, not to that in {run.model_dir}"
        )
    if state.world_size == run.engine.world_size:
        return trainer.restore(path)
    universal = _universal(run, path, state)
    start = trainer.restore(path, universal)
    barrier()
    if rank() == 0:
        shutil.rmtree(universal)
    return start


def _universal(run: Run, path: Path, state: RunState) -> Path:
    """The checkpoint converted to DeepSpeed's universal format, which any number of ranks can load.

    One process converts it. The other ranks poll for its marker file, as a collective call would time out while a
    large model is converted.
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
            [sys.executable, "-m", "training.engine.state", str(path), str(output)],
            cwd=SOURCE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if made.returncode:
            raise RuntimeError(f"{path}: could not be converted for another number of ranks:\n{made.stderr[-2000:]}")
        marker.touch()
    while not marker.is_file():
        time.sleep(POLL_SECONDS)
    return output
