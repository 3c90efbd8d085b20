"""Every optimizer that is offered, as part of `zero_cells.py`: its steps, its resume, and that on other ranks.

A cell runs four steps under ZeRO-3, beside the same optimizer of plain torch on the whole gradients, and is saved after
two. The report has the largest difference of the weights after each step. A resumed cell has its own moments, so only
its losses are compared: with those of the run that was not interrupted.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training.engine.engine import deepspeed
from training.objectives.scaling import learning_rate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from training.loop.trainer import Trainer

STEPS, SAVED = 4, 2
CHANGES: dict[str, Any] = {
    "max_steps": STEPS,
    "checkpoint": {"every": SAVED, "keep": 9},
    "optimizer": {"learning_rate": 1e-2, "weight_decay": 0.3, "betas": [0.8, 0.95], "eps": 1e-5, "max_grad_norm": 0.5},
}
OFFLOAD = {"device": "cpu", "pin_memory": False}
CELLS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adam": {"optimizer.name": "adam"},
    "radam": {"optimizer.name": "radam"},
    "unfused": {"deepspeed.optimizer": {"params": {"fused": False}}},
    "offloaded": {"deepspeed.zero_optimization.offload_optimizer": OFFLOAD, "precision": "bf16"},
    "offloaded-torch": {
        "deepspeed.zero_optimization.offload_optimizer": OFFLOAD,
        "deepspeed.optimizer": {"params": {"torch_adam": True}},
        "precision": "bf16",
    },
}
# Cells that are also resumed with another implementation of the same optimizer.
OTHER = {"offloaded": "offloaded-torch", "offloaded-torch": "offloaded", "unfused": "adamw", "adamw": "unfused"}
PLAIN: dict[str, Any] = {
    "adam": torch.optim.Adam,
    "radam": lambda groups, **options: torch.optim.RAdam(groups, decoupled_weight_decay=True, **options),
}


@contextmanager
def compared(trainer: Trainer) -> Iterator[dict[str, Any]]:
    """Context in which a plain optimizer does the same steps; yields the report that is filled."""
    engine, optimizer = trainer.run.engine, trainer.config.optimizer
    report: dict[str, Any] = {"optimizer": type(engine._optimizer.optimizer).__name__, "differences": [], "losses": []}
    weights = master_weights(trainer)
    groups = [
        {"params": [each for each in weights.values() if each.ndim > 1], "weight_decay": optimizer.weight_decay},
        {"params": [each for each in weights.values() if each.ndim < 2], "weight_decay": 0.0},
    ]
    plain = PLAIN.get(optimizer.name, torch.optim.AdamW)(
        groups, lr=1.0, betas=optimizer.betas, eps=optimizer.eps, foreach=False
    )
    train_step, accumulate = trainer.train_step, trainer.accumulate

    def with_gradients(step: int, batch: Any) -> Any:
        found = accumulate(step, batch)
        gradients = engine.full_gradients()
        norm = torch.stack([each.double().norm() for each in gradients.values()]).norm().item()
        for name, weight in weights.items():
            weight.grad = gradients[name] * min(optimizer.max_grad_norm / (norm + 1e-6), 1)
        for group in plain.param_groups:
            group["lr"] = learning_rate(
                step, trainer.config.max_steps, optimizer.learning_rate, trainer.config.schedule
            )
        plain.step()
        return found

    def beside(step: int, batch: Any) -> dict[str, float]:
        metrics = train_step(step, batch)
        now = master_weights(trainer)
        report["differences"].append(max(float((now[name] - weights[name]).abs().max()) for name in weights))
        report["losses"].append(metrics["train/loss"])
        return metrics

    trainer.train_step, trainer.accumulate = beside, with_gradients  # type: ignore[method-assign]
    yield report


def master_weights(trainer: Trainer) -> dict[str, Tensor]:
    """Whole fp32 weights by name, as the optimizer has them."""
    return {
        name: deepspeed.utils.safe_get_full_fp32_param(parameter).detach().clone()
        for name, parameter in trainer.run.engine.module.named_parameters()
    }


def starts(mode: str) -> Iterator[tuple[str, int, str]]:
    """(cell, ranks of the run that was saved, cell whose implementation runs) of a mode of `zero_cells.py`."""
    for name in CELLS:
        for ranks in {"short": (1,), "train": (2,), "resume": (1, 2)}[mode]:
            yield name, ranks, name
    for name, other in OTHER.items() if mode == "resume" else ():
        yield name, 2, other


def folder(name: str, ranks: int) -> str:
    return f"optimizer-{name}-{ranks}"


def report_file(work: Path, name: str, what: str) -> Path:
    return work / f"optimizer-{name}-{what}.json"
