"""What is checked once, before a run's first update, and the outputs that an export is checked against.

In: a Run and its first micro-batches. Out: an error that names the rank or the setting, or nothing.
Next: `trainer.py`; `export.py` compares with `reference_outputs`.
"""

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
    """One forward of one token: ranks whose models differ are named before anything can wait for them."""
    idle = run.data.packer.idle().to(run.engine.device)
    with run.engine.evaluating(), same_modules_on_every_rank(run.engine.module, run.engine.device):
        run.objective.loss_terms(run.engine, idle)


def check_packing(run: Run, batch: Step) -> None:
    """The run's own first micro-batch: its packed loss must be its padded, sample-by-sample loss.

    Raises:
        ConfigError: the loss is no number in either layout, or samples see each other with this model and attention.
    """
    packer = run.data.packer
    if packer.layout == "padded":
        return
    packed = batch.micro_batches[0] if batch.micro_batches else packer.idle()
    padded = packer.one_by_one(packed)
    with run.engine.evaluating():
        losses = [
            run.objective.loss_terms(run.engine, each.to(run.engine.device)).label_losses.double().sum()
            for each in (packed, padded)
        ]
    one, other = all_sum(torch.stack(losses), run.engine.device).tolist()
    if not math.isfinite(other):
        raise ConfigError(
            f"model: its loss on the first samples is {other} before any update, however they lie in rows, though its "
            "weights are finite numbers; is precision right for it, or the model damaged?"
        )
    difference = abs(one - other) / max(abs(other), 1e-12)
    if not difference <= PACKING_TOLERANCE[run.config.precision]:
        raise ConfigError(
            f"data.layout: packed rows give a loss {difference:.1e} off the sample-by-sample one: samples see "
            "each other with this model and attention; set data.layout=padded"
        )


def reference_outputs(run: Run) -> dict[str, Tensor]:
    """A few tokens and the model's plain (unshifted, unmixed) logits on them: what an export must reproduce."""
    vocabulary = len(run.data.tokenizer)
    ids = (torch.arange(REFERENCE_TOKENS, device=run.engine.device) * 7919 % vocabulary)[None]
    with run.engine.evaluating():
        outputs = run.engine.forward(**reference_inputs(ids))
    return {"input_ids": ids.cpu(), "logits": reference_logits(outputs)}


def reference_setting(run: Run) -> dict[str, str]:
    """With which attention and number format, and where, the run computed them: an export is reopened alike."""
    attention = str(run.engine.module.config._attn_implementation)
    return {"attention": attention, "dtype": run.config.precision, "device": run.engine.device.type}


def reference_inputs(ids: Tensor) -> dict[str, Tensor]:
    """Arguments of that forward pass, the same for a run and for its export."""
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def reference_logits(outputs: Any) -> Tensor:
    """The first logits of a model's outputs, of the last tokens where there is one row a token; fp32, on CPU."""
    logits = outputs[0][0]
    return (logits[-4:] if logits.ndim > 1 else logits).float().cpu().contiguous()
