"""Exports a checkpoint as a plain Hugging Face directory, and checks it (`export_check.py`).

An export holds safetensors shards; config, generation config and tokenizer as they were trained (`export_text.py`); and
`crosslift.json`: objective, languages, template, the result of the check. An objective may add files of its own, and
`model_card.py` describes it all in README.md.

It runs in one process, after the ranks have ended. Weights are read one by one, never the whole model twice.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from data_pipeline.atomic import atomic_folder, recover
from data_pipeline.config import RowKind
from data_pipeline.console import track
from modeling.export_info import ADAPTER_FOLDER, EXPORT_FILE, FORMAT, ExportInfo
from training.checkpoints.checkpoint import ALL_CONTENT, MARKER, defect
from training.checkpoints.export_text import GENERATION_FILE, fixed_response_language, set_text_files
from training.checkpoints.model_card import write_baked_card, write_card
from training.checkpoints.run_state import RunState
from training.checkpoints.search import checkpoint_at
from training.config import DataConfig, RunConfig
from training.errors import ConfigError, ExportCheckFailed
from training.objectives.base import ObjectiveConfig
from training.run_file import validate

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from training.checkpoints.export_check import CheckResult

log = logging.getLogger(__name__)


def export_checkpoint(checkpoint: Path, output: Path) -> Path:
    """Write `checkpoint` as a Hugging Face directory to `output`.

    Written under a temporary name, checked against the checkpoint, then renamed.

    Raises:
        ConfigError: `checkpoint` is not complete or not what was saved, or `output` exists.
        ExportCheckFailed: `output` is there, but it did not pass its check; its `crosslift.json` says so.
    """
    if output.exists():
        raise ConfigError(f"{output}: exists already; give a new folder")
    with atomic_folder(output, exclusive=True) as temporary:
        result = _write_checked(checkpoint, temporary)
    _refuse_failed(result, output)
    return output


def export_baked(path: Path, language: str, output: Path) -> Path:
    """Writes a model for one language, whose shift is in its weights, to `output`.

    Args:
        path: an export, or a checkpoint or run's folder, which is exported first.

    Raises:
        ConfigError: as `export_checkpoint`.
        ModelError: the model cannot carry the shift.
    """
    from modeling.shifcon.bake import bake

    if output.exists():
        raise ConfigError(f"{output}: exists already; give a new folder")
    with atomic_folder(output, exclusive=True) as temporary, TemporaryDirectory(dir=temporary.parent) as scratch:
        export = path
        if not (path / "config.json").is_file():
            export = export_checkpoint(checkpoint_at(path, content=False), Path(scratch, "model"))
        difference = bake(export, language, temporary)
        write_baked_card(export, language, temporary)
    log.info("logits agree with those of the shifted model to %.1e of the largest, in fp32", difference)
    return output


def export_newest(checkpoint: Path, output: Path) -> bool:
    """Make `output` the export of this checkpoint, unless it is already; returns whether it was made now.

    An older export stays in place until the new one is made and checked. If the new one fails its check, an older one
    that passed is kept beside it.

    Raises:
        ConfigError: `output` exists and is not an export, so it must not be replaced.
        ExportCheckFailed: as `export_checkpoint`.
    """
    recover(output)
    if output.exists():
        if not (output / EXPORT_FILE).is_file():
            raise ConfigError(f"{output}: exists and is not an export; move it and start again")
        if _is_of(checkpoint, output):
            return False
    with atomic_folder(output, exists="replace", exclusive=True) as temporary:
        result = _write_checked(checkpoint, temporary)
        if not result.passed and output.exists() and not (older := ExportInfo.read(output)).check_failed:
            kept = output.with_name(f"{output.name}-step-{older.step or 0:08d}")
            shutil.rmtree(kept, ignore_errors=True)
            output.rename(kept)
            log.warning("the export of an earlier step, which passed its check, is kept as %s", kept)
    _refuse_failed(result, output)
    log.info("exported to %s", output)
    return True


def _refuse_failed(result: CheckResult, output: Path) -> None:
    if not result.passed:
        raise ExportCheckFailed(f"{output}: the export is kept, but its check failed: {result.problem}")


def _is_of(checkpoint: Path, output: Path) -> bool:
    """Whether an export passed its check, has the checkpoint's step and is not older: a resume may repeat a step."""
    description, marker = output / EXPORT_FILE, checkpoint / MARKER
    info = ExportInfo.read(output)
    same_step = info.step == RunState.read(checkpoint).step and not info.check_failed
    return same_step and description.stat().st_mtime_ns >= marker.stat().st_mtime_ns


def _write_checked(checkpoint: Path, output: Path) -> CheckResult:
    """Write the export of `checkpoint` into the folder `output`, with the result of its check."""
    from training.checkpoints.export_check import check_export

    if (reason := defect(checkpoint, ALL_CONTENT)) is not None:
        raise ConfigError(f"{checkpoint}: not a complete checkpoint: {reason}")
    state = RunState.read(checkpoint)
    config = validate(state.config, str(checkpoint / "state.json"))
    _write(checkpoint, config, state, output)
    result = check_export(checkpoint, config, _expected_weights(checkpoint, config, state), output)
    description = json.loads((output / EXPORT_FILE).read_text(encoding="utf-8"))
    _write_json(output / EXPORT_FILE, {**description, "check": {"passed": result.passed, **asdict(result)}})
    if result.difference is not None and result.passed:
        log.info(
            "reopened the export with %s attention: its weights are the checkpoint's, and its logits agree with the "
            "run's to %.1e of the largest; %.1e is allowed", result.attention, result.difference, result.bound,
        )  # fmt: skip
    return result


def _write(checkpoint: Path, config: RunConfig, state: RunState, output: Path) -> None:
    from modeling.adapters import save_adapter
    from modeling.weights.untrusted import read_config, read_tokenizer
    from modeling.weights.weight_writing import write_weights
    from training.engine.engine import DTYPES

    planned, adapted = _planned(checkpoint, config.data.kind, config.precision), _adapted(checkpoint, config, state)
    if adapted is not None:
        base = state.base or {}
        name = config.model.path or base["directory"]
        save_adapter(adapted, output / ADAPTER_FOLDER, name, base["hash"], config.model.quantise)
    weights = _weights(checkpoint, config.objective, planned, adapted)
    write_weights(track(weights, len(planned), "export", "weights"), planned, output)
    model_config = read_config(checkpoint / "model_config")
    model_config.dtype = DTYPES[config.precision]
    model_config.use_cache = config.data.task is None
    tokenizer = read_tokenizer(checkpoint / "model_config", local_files_only=True)
    if config.data.task is None:
        own = config.tokenizer.of_model
        generation = set_text_files(config.data, checkpoint / "model_config", model_config, tokenizer, of_model=own)
        _write_json(output / GENERATION_FILE, generation)
    model_config.save_pretrained(output)
    tokenizer.save_pretrained(output)
    _write_json(output / EXPORT_FILE, _description(config.data, config.objective, state.step))
    config.objective.export(checkpoint, output)
    write_card(checkpoint, config, state, output)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def _planned(checkpoint: Path, kind: RowKind, precision: str) -> dict[str, torch.Tensor]:
    """The export's weights by name on the meta device, in its number format; a tied weight has one name."""
    import torch

    from modeling.architectures import ARCHITECTURE_OF, auto_class
    from modeling.weights.untrusted import read_config
    from training.engine.engine import DTYPES

    with torch.device("meta"):
        model = auto_class(ARCHITECTURE_OF[kind]).from_config(read_config(checkpoint / "model_config"))
    tied = model.all_tied_weights_keys
    return {
        name: tensor.to(DTYPES[precision]) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
        if name not in tied
    }


def _weights(
    checkpoint: Path, objective: ObjectiveConfig, planned: Mapping[str, torch.Tensor], adapted: PeftModel | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the plain model, in the number formats and the order of `planned`; merges `adapted`."""
    from training.engine.state import consolidated

    weights: Iterable[tuple[str, torch.Tensor]]
    if adapted is None:
        weights = consolidated(checkpoint, planned)
    else:
        merged = adapted.merge_and_unload().state_dict()
        weights = ((name, merged[name]) for name in planned)
    for name, tensor in weights:
        if not objective.is_own_weight(name):  # those are in the objective's own file
            yield name, tensor.to(planned[name].dtype) if name in planned else tensor


def _expected_weights(checkpoint: Path, config: RunConfig, state: RunState) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that the export must hold, computed from the checkpoint again."""
    planned, adapted = _planned(checkpoint, config.data.kind, config.precision), _adapted(checkpoint, config, state)
    weights = _weights(checkpoint, config.objective, planned, adapted)
    yield from track(weights, len(planned), "check", "weights")


def _adapted(checkpoint: Path, config: RunConfig, state: RunState) -> PeftModel | None:
    """The base model of a LoRA run with the adapters of a checkpoint; None if all weights are trained.

    Raises:
        ConfigError: the base model, whose weights are frozen, is missing or has changed.
    """
    from modeling.adapters import adapted_model
    from modeling.architectures import ARCHITECTURE_OF
    from modeling.loading import load_pretrained
    from modeling.quantisation.linear import FORMATS, round_weights
    from modeling.weights.weight_files import directory_hash
    from training.engine.engine import DTYPES
    from training.engine.state import consolidated

    if (lora := config.model.lora) is None:
        return None
    saved = state.base or {}
    directory = Path(saved["directory"])
    if not directory.is_dir() or directory_hash(directory) != saved["hash"]:
        raise ConfigError(f"{checkpoint}: holds adapters to the model in {directory}, which is gone or has changed")
    head = ARCHITECTURE_OF[config.data.kind]
    base = load_pretrained(directory, DTYPES[config.precision], "eager", "cpu", head)
    if (quantise := config.model.quantise) is not None:  # the run's adapters belong to the quantised weights
        if (lacking := FORMATS[quantise].missing()) is not None:
            raise ConfigError(f"{checkpoint}: was trained with model.quantise: its export needs {lacking}")
        round_weights(base, quantise)
    weights = consolidated(checkpoint)
    trained = {name: tensor for name, tensor in weights if not config.objective.is_own_weight(name)}
    return adapted_model(base, head, lora, trained)


def _description(data: DataConfig, objective: ObjectiveConfig, step: int) -> dict[str, Any]:
    """The content of `crosslift.json`, which `modeling.export_info` reads."""
    described: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "objective": objective.name,
        "languages": list(data.languages),
        "dominant": data.dominant,
    }
    if data.task is not None:
        return {**described, "task": data.task.model_dump(mode="json"), "sequence_length": data.sequence_length}
    return {
        **described,
        "template": data.template.model_dump(mode="json"),
        "response_language": fixed_response_language(data.sources),
        "shift_first_token": True,
        **objective.description(),
    }
