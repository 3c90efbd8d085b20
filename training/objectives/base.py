"""Base classes of objectives: the section of the run file that selects a method, and the class that computes its loss.

An objective is one module of this package with two classes:

- a subclass of `ObjectiveConfig`: the `objective:` section, and the method's requirements on data and model;
- a subclass of `Objective`: its hooks on the model, its loss on a micro-batch, its state in checkpoints.

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

    sum: Tensor  # scalar, before normalisation
    denominator: str  # name of the step's count that it is divided by
    weight: float  # 0: reported only
    # what this rank adds to the reported sum over ranks, if several ranks compute the same part of the term
    reported: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LossTerms:
    """Sums over one micro-batch, before normalisation.

    Label losses (of answer tokens, or of the labels of target texts) are reported by language. `terms` are optimised,
    or reported only if their weight is 0.
    """

    label_losses: Tensor  # (N,) fp32, 0 at the placeholder of a micro-batch without labels
    label_weights: Tensor  # (N,) 1, or 0 for labels that do not contribute to the loss
    label_languages: Tensor  # (N,) int64
    terms: Mapping[str, LossTerm]


@dataclass(frozen=True, slots=True)
class ObjectiveParts:
    """The inputs of `ObjectiveConfig.build` besides the model."""

    kind: RowKind  # of the training rows
    languages: tuple[str, ...]
    dominant: str
    special_ids: tuple[int, ...] = ()  # of the tokenizer
    probe: Sequence[Any] = ()  # micro-batches of this rank's share of the probe set, `ObjectiveConfig.probe_size`
    parallel: bool = False  # there are pairs of a parallel corpus, also in the probe set


class ObjectiveConfig(Section):
    """Base of the `objective:` section. A subclass declares its method's requirements; by default there are none."""

    name: str

    kinds: ClassVar[tuple[RowKind, ...]]  # supported kinds of rows
    terms: ClassVar[tuple[str, ...]]  # names of the loss terms, in order
    fixed_keys: ClassVar[tuple[str, ...]] = ()  # keys of the run file that its state in a checkpoint depends on

    @classmethod
    def method(cls) -> str:
        """The `name` that selects this section."""
        return str(get_args(cls.model_fields["name"].annotation)[0])

    def pairing(self) -> PairingRule:
        """How samples are paired with translations."""
        return PairingRule()

    def probe_size(self) -> int:
        """Samples per language in a fixed probe set; 0: none."""
        return 0

    @property
    def wants_area(self) -> bool:
        """Whether the layer area is left to the probe (`layers: auto`, training/layer_area.py)."""
        return False

    def mistakes(self, languages: Sequence[str], has_pairs: bool) -> Iterator[str]:
        """Conflicts with `data.languages` and the pairs of translations that the data give, one line each."""
        return iter(())

    def model_mistakes(self, n_layers: int) -> Iterator[str]:
        """Conflicts with a model of this number of layers, one line each."""
        return iter(())

    @abstractmethod
    def build(self, model: PreTrainedModel, parts: ObjectiveParts) -> Objective:
        """Builds the objective and adds its hooks and parameters to `model`. Called before the engine is built."""

    def export(self, checkpoint: Path, output: Path) -> None:
        """Writes the method's state of a checkpoint to `output`, the folder of the exported weights."""

    def description(self) -> dict[str, Any]:
        """Entries of the export's `crosslift.json`."""
        return {}

    def is_own_weight(self, name: str) -> bool:
        """Whether a weight of this name was added by the method, so that the exported model does not have it."""
        return False


class Objective(ABC):
    """Computes the loss, with one forward pass per micro-batch and the same modules on all ranks."""

    @abstractmethod
    def loss_terms(self, engine: Engine, batch: Any) -> LossTerms:
        """Runs one forward pass and returns its loss terms, named as in `ObjectiveConfig.terms`.

        Also called without gradients.
        """

    def before_step(self, engine: Engine, step: int) -> dict[str, float]:
        """Called before step `step` (from 0), for example to refresh the language vectors; returns metrics."""
        return {}

    def save(self, engine: Engine, directory: Path) -> None:  # noqa: B027 - most objectives keep nothing
        """Writes the state that a resume or an export needs besides the weights. Called on all ranks, rank 0 writes."""

    def load(self, directory: Path) -> None:  # noqa: B027
        """Restores the state written by `save`."""

    def saved_loss(self, engine: Engine, batch: Any) -> Tensor:
        """A scalar for counting activations on the meta device; it saves the same large tensors as `loss_terms`.

        Must be overridden if `loss_terms` reads values, which meta tensors do not have.
        """
        import torch

        return torch.stack([term.sum for term in self.loss_terms(engine, batch).terms.values()]).sum()

    def loss_memory(self, labels: int) -> tuple[int, int] | None:
        """`LabelHead.loss_memory` of a micro-batch; None for losses that are computed from whole logits."""
        return None
