"""Checks an export: its weights bit by bit, its logits against the run's.

Comparing bits with the checkpoint finds a wrong tensor. Reopening the export in plain transformers, with the run's
attention and number format, and comparing logits on a few tokens finds a wrong config or a model class that computes
something else. In bf16 two correct implementations differ by rounding, by an amount that depends on the model, so the
bound is a multiple of what bf16 changes in this model's own logits.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from modeling.architectures import ARCHITECTURE_OF
from modeling.errors import ModelError
from modeling.loading import load_config, load_pretrained, resolve_attention
from modeling.weights.weight_files import one_line, stored_tensors
from training.checkpoints.checkpoint import REFERENCE_FILE
from training.config import RunConfig
from training.engine.engine import DTYPES
from training.engine.start_checks import reference_inputs, reference_logits

if TYPE_CHECKING:
    from modeling.architectures import Architecture

log = logging.getLogger(__name__)
FP32_TOLERANCE = 1e-4  # relative to the largest logit
BF16_STEP = 2.0**-8  # relative distance of neighbouring bf16 numbers, the least possible bound
NOISE_FACTOR = 4.0  # times the model's own bf16-to-fp32 difference


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The result of the check. Differences are relative to the run's largest logit; None if not computed."""

    problem: str | None = None  # one line; None: passed
    attention: str | None = None  # that the export was reopened with
    difference: float | None = None  # of the export's logits from the run's
    bound: float | None = None  # largest allowed difference
    noise: float | None = None  # difference between the export's logits in bf16 and in fp32, if it was measured

    @property
    def passed(self) -> bool:
        return self.problem is None


def check_export(
    checkpoint: Path, config: RunConfig, weights: Iterable[tuple[str, Tensor]], output: Path
) -> CheckResult:
    """Compare an export with its checkpoint.

    `weights` are the checkpoint's, in the export's number format. An error while the export is read or reopened is
    returned as its problem, not raised: a finished run keeps its export, marked as failed.
    """
    try:
        if (problem := _wrong_weight(weights, output)) is not None:
            return CheckResult(problem)
        return _check_logits(checkpoint, config, output)
    except Exception as error:
        log.debug("the export's check", exc_info=error)
        return CheckResult(f"it cannot be reopened: {type(error).__name__}: {one_line(error)}")


def _wrong_weight(weights: Iterable[tuple[str, Tensor]], output: Path) -> str | None:
    """The first weight that differs from the checkpoint's, and how. Holds one tensor of each in memory."""
    stored = stored_tensors(output)
    seen = set()
    for name, tensor in weights:
        seen.add(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return f"{name} holds values that are not finite, in the checkpoint too"
        if name not in stored:
            return f"{name} is missing"
        with safe_open(stored[name].file, framework="pt") as file:
            found = file.get_tensor(name)
        if found.dtype != tensor.dtype or found.shape != tensor.shape or not torch.equal(_bits(found), _bits(tensor)):
            return f"{name} differs from the checkpoint's"
    if extra := sorted(stored.keys() - seen):
        return f"{extra[0]} is not in the checkpoint"
    return None


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _check_logits(checkpoint: Path, config: RunConfig, output: Path) -> CheckResult:
    with safe_open(checkpoint / REFERENCE_FILE, framework="pt") as file:
        ids, expected = file.get_tensor("input_ids"), file.get_tensor("logits")
        recorded = file.metadata() or {}
    kind = ARCHITECTURE_OF[config.data.kind]
    wanted = recorded.get("attention", config.model.attention)  # older checkpoints don't record it
    attention = _attention(wanted, output, kind)
    scale = float(expected.abs().max())

    def logits(dtype: torch.dtype) -> Tensor:
        model = load_pretrained(output, dtype, attention, "cpu", kind)  # type: ignore[arg-type]
        with torch.no_grad():
            return reference_logits(model(**reference_inputs(ids)))

    def distance(one: Tensor, other: Tensor) -> float:
        return float((one - other).abs().max()) / scale

    found, noise = logits(DTYPES[config.precision]), None
    difference, bound = distance(found, expected), FP32_TOLERANCE
    if config.precision == "bf16":
        bound = BF16_STEP
        if not difference <= bound:
            noise = distance(found, logits(torch.float32))
            bound = max(bound, NOISE_FACTOR * noise)
    problem = None
    if not difference <= bound:
        own = f", {NOISE_FACTOR:g} times what bf16 changes in this model" if noise is not None else ""
        problem = (
            f"reopened with {attention} attention, its logits differ from the run's by {difference:.1e} of the "
            f"largest; {bound:.1e} is allowed{own}"
        )
    return CheckResult(problem, attention, difference, bound, noise)


def _attention(wanted: str, output: Path, kind: Architecture) -> str:
    """The run's own attention, or the nearest that runs on a CPU, where exports are reopened."""
    model_config = load_config(output, kind)
    if wanted in ("sdpa", "eager"):
        return resolve_attention(wanted, model_config, kind)
    try:
        chosen = resolve_attention("sdpa", model_config, kind)
    except ModelError:
        chosen = resolve_attention("eager", model_config, kind)
    if wanted != "auto":
        log.warning("the run's attention, %s, does not run on a CPU: the export is reopened with %s", wanted, chosen)
    return chosen
