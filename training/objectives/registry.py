"""The registry of objectives: each method is one module of this package and one entry of `METHODS`."""

from __future__ import annotations

from importlib import import_module

from training.objectives.base import ObjectiveConfig

METHODS = (
    "sft",
    "shifcon",
    "align",
    "mlm",
    "finetune",
    "xmixup",
)


def _section(method: str) -> type[ObjectiveConfig]:
    """The `ObjectiveConfig` that the module of this name defines."""
    module = import_module(f"training.objectives.{method}")
    (section,) = (
        each
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, ObjectiveConfig) and each.__module__ == module.__name__
    )
    return section


OBJECTIVES: tuple[type[ObjectiveConfig], ...] = tuple(map(_section, METHODS))


def fixed_keys(name: str) -> tuple[str, ...]:
    """Keys of the run file that must not change for the objective `name` to load its state from a checkpoint."""
    return next((each.fixed_keys for each in OBJECTIVES if each.method() == name), ())
