"""What every objective is: a section of the run file that describes a method, and an object that computes its loss.

An objective is one file of this folder. The file holds two classes:

- a subclass of `ObjectiveConfig`: the `objective:` section, and what the method needs of data and model;
- a subclass of `Objective`: its hooks on the model, its loss on a micro-batch, what a checkpoint keeps of it.

`registry.py` lists the sections. Run files are read without torch, so these files import torch, transformers and
`modeling` inside functions.

Shapes: N label positions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from data_pipeline.config import RowKind
from data_pipeline.order.pairing import PairingRule
from data_pipeline.settings import Section

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from training.engine.engine import Engine


@dataclass(frozen=True, slots=True)
class LossTerm:
    """One term of the loss on one micro-batch."""

    sum: Tensor  # scalar, not yet divided by anything
    denominator: str  # the name of the count of the step that divides it
    weight: float  # 0: only reported


@dataclass(frozen=True, slots=True)
class LossTerms:
    """Sums over one micro-batch, not yet divided by anything.

    The label losses are reported by language: those of answer tokens, or of the target texts' labels. `terms` are
    optimised, or only reported where their weight is 0.
    """

    label_losses: Tensor  # (N,) fp32, 0 at the stand-in of a micro-batch without labels
    label_weights: Tensor  # (N,) 1, or 0 where the label does not count
    label_languages: Tensor  # (N,) int64
    terms: Mapping[str, LossTerm]


@dataclass(frozen=True, slots=True)
class ObjectiveParts:
    """What an objective is built from, beside its section and the model."""

    kind: RowKind  # of the rows it learns from
    languages: tuple[str, ...]
    dominant: str
    special_ids: tuple[int, ...] = ()  # of the tokenizer
    probe: Sequence[Any] = ()  # micro-batches of this rank's share of the probe set, `ObjectiveConfig.probe_size`


class ObjectiveConfig(Section):
    """Base of the `objective:` section. A subclass declares what its method needs; each default means "nothing"."""

    name: str

    kinds: ClassVar[tuple[RowKind, ...]]  # of rows that it learns from
    terms: ClassVar[tuple[str, ...]]  # names of its loss terms, in order
    fixed_keys: ClassVar[tuple[str, ...]] = ()  # keys of the run file that what a checkpoint keeps of it depends on

    @classmethod
    def method(cls) -> str:
        """The `name` that chooses this section."""
        return str(get_args(cls.model_fields["name"].annotation)[0])

    def pairing(self) -> PairingRule:
        """How samples meet their translations."""
        return PairingRule()

    def probe_size(self) -> int:
        """Samples per language in a fixed probe set; 0: none."""
        return 0

    def mistakes(self, languages: Sequence[str], pairing: str) -> Iterator[str]:
        """Conflicts with `data.languages` and `data.mixture.pairing`, one line each."""
        return iter(())

    def model_mistakes(self, n_layers: int) -> Iterator[str]:
        """Conflicts with a model of this number of layers, one line each."""
        return iter(())

    @abstractmethod
    def build(self, model: PreTrainedModel, parts: ObjectiveParts) -> Objective:
        """The objective, its hooks and parameters placed on `model`. Called before the engine is made."""

    def export(self, checkpoint: Path, output: Path) -> None:
        """Write beside the exported weights in `output` what the method keeps of a checkpoint."""

    def description(self) -> dict[str, Any]:
        """Entries of the export's `crosslift.json`."""
        return {}

    def is_own_weight(self, name: str) -> bool:
        """Whether a weight of this name was added by the method, so that the exported model does not have it."""
        return False


class Objective(ABC):
    """Computes the loss. Runs one forward pass a micro-batch, with the same modules on every rank."""

    @abstractmethod
    def loss_terms(self, engine: Engine, batch: Any) -> LossTerms:
        """One forward pass and its loss terms, named as in `ObjectiveConfig.terms`; with and without gradients."""

    def before_step(self, engine: Engine, step: int) -> dict[str, float]:
        """What is due before step `step` (from 0), such as a refresh of the language vectors; its metrics."""
        return {}

    def save(self, engine: Engine, directory: Path) -> None:  # noqa: B027 - most objectives keep nothing
        """Write what a resume or an export needs beside the weights. Every rank calls it, rank 0 writes."""

    def load(self, directory: Path) -> None:  # noqa: B027
        """Restore what `save` wrote."""

    def saved_loss(self, engine: Engine, batch: Any) -> Tensor:
        """A scalar for counting activations on the meta device: keeps for backward what `loss_terms` keeps of size.

        To be overridden where `loss_terms` reads values, which tensors without data do not have.
        """
        import torch

        return torch.stack([term.sum for term in self.loss_terms(engine, batch).terms.values()]).sum()
