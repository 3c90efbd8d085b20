"""Checks before a run's first update, and the reference outputs that an export is compared with."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from data_pipeline.loader import Step
from training.assembly import Run
from training.distributed import all_sum, same_modules_on_every_rank
from training.errors import ConfigError

PACKING_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}  # relative, on the summed loss of one micro-batch
REFERENCE_TOKENS = 16


def warm_up(run: Run) -> None:
    """Runs a forward pass of one token, in which ranks with different models are reported instead of deadlocking."""
    idle = run.data.packer.idle().to(run.engine.device)
    with run.engine.evaluating(), same_modules_on_every_rank(run.engine.module, run.engine.device):
        run.objective.loss_terms(run.engine, idle)


def check_packing(run: Run, batch: Step) -> None:
    """Compares the packed loss of the first micro-batch with its padded loss, one sample per row.

    Raises:
        ConfigError: the loss is NaN or infinite, or samples of a row attend to each other with this model.
    """
    packer = run.data.packer
    if packer.layout == "padded":
        return
    packed = packer.batch(batch.micro_batches[0].samples)  # without contrast sets
    padded = packer.one_by_one(packed)
    with run.engine.evaluating():
        losses = [
            run.objective.loss_terms(run.engine, each.to(run.engine.device)).label_losses.double().sum()
            for each in (packed, padded)
        ]
    one, other = all_sum(torch.stack(losses), run.engine.device).tolist()
    if not math.isfinite(other):
        raise ConfigError(
            f"model: its loss on the first samples is {other} before any update, even with one sample "
            "per row, though its weights are finite; check precision, or whether the model is damaged"
        )
    difference = abs(one - other) / max(abs(other), 1e-12)
    if not difference <= PACKING_TOLERANCE[run.config.precision]:
        raise ConfigError(
            f"data.layout: packed rows give a loss {difference:.1e} off the sample-by-sample one: samples of a row "
            "attend to each other with this model and attention; set data.layout=padded"
        )


def reference_outputs(run: Run) -> dict[str, Tensor]:
    """A few tokens and the model's plain logits (without shift or mixing), which an export must reproduce."""
    vocabulary = len(run.data.tokenizer)
    ids = (torch.arange(REFERENCE_TOKENS, device=run.engine.device) * 7919 % vocabulary)[None]
    with run.engine.evaluating():
        outputs = run.engine.forward(**reference_inputs(ids))
    return {"input_ids": ids.cpu(), "logits": reference_logits(outputs)}


def reference_setting(run: Run) -> dict[str, str]:
    """Attention, number format and device of the reference outputs; an export is reopened with the same."""
    attention = str(run.engine.module.config._attn_implementation)
    return {"attention": attention, "dtype": run.config.precision, "device": run.engine.device.type}


def reference_inputs(ids: Tensor) -> dict[str, Tensor]:
    """Arguments of the reference forward pass, equal for a run and its export."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def reference_logits(outputs: Any) -> Tensor:
    """The first logits of a model's outputs; of the last tokens if there is one row per token. fp32, on CPU."""
    logits = outputs[0][0]
    return (logits[-4:] if logits.ndim > 1 else logits).float().cpu().contiguous()
