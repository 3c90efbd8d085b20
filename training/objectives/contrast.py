"""Fine-tuning with a contrastive loss on translations: the common part of ShifCon and `align`.

The states of a sample's own words are averaged at some layers during the forward pass of the fine-tuning loss, and
those of translations are compared in the plan's contrast sets (docs/methods.md, section 1.3).

Shapes: S segments (samples), K layers, C contrast sets of P pairs, H hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from data_pipeline.config import RowKind
from data_pipeline.order.pairing import PairingRule
from data_pipeline.settings import Section
from training.objectives.base import LossTerm, LossTerms, ObjectiveConfig, ObjectiveParts
from training.objectives.sft import SupervisedFineTuning

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from data_pipeline.batching.batch import ChatBatch, ContrastSets
    from modeling.shifcon.normalisation import Normalisation, PooledMoments
    from training.engine.engine import Engine

log = logging.getLogger(__name__)
MIN_SENTENCES = 16  # probe samples of a language, for a mean to centre by
MOMENTS_FILE = "pooled_moments.safetensors"  # in a checkpoint
CHECKED_STEPS = 8  # of a start: their contrast sets show whether the loss can tell translations from other pairs
CHANCE = 0.01  # p-value above which it cannot


class ContrastiveConfig(Section):
    """The multilingual contrastive loss (docs/methods.md, section 1.3)."""

    weight: float = Field(ge=0, description="b of loss = a * SFT + b * contrastive")
    scale: float = Field(gt=0, description="factor of the cosine similarities; b is meaningful only together with it")
    set_size: int = Field(16, gt=1, description="pairs in a contrast set, whose samples may lie on several ranks")
    normalise: Literal["standardised", "centred", "none"] = Field(
        "standardised",
        description="of pooled states, by moments of the probe set; 'none': raw states",
    )


class ContrastiveObjectiveConfig(ObjectiveConfig):
    """Keys of every objective with a contrastive loss on translations."""

    sft_weight: float = Field(1.0, ge=0, description="a of loss = a * SFT + b * contrastive")
    contrastive: ContrastiveConfig
    probe_items: int = Field(64, gt=0, description="samples per language in the probe set, for language means")
    refresh_every: int = Field(100, gt=0, description="steps between two passes over the probe set")

    kinds: ClassVar[tuple[RowKind, ...]] = ("chat",)
    terms: ClassVar[tuple[str, ...]] = ("sft", "contrastive", "retrieval")

    @property
    def normalises(self) -> bool:
        """Whether pooled states are normalised by moments of the probe set."""
        return bool(self.contrastive.weight) and self.contrastive.normalise != "none"

    def pairing(self) -> PairingRule:
        return PairingRule(
            set_size=self.contrastive.set_size,
            needed=bool(self.contrastive.weight),
            min_probe_samples=MIN_SENTENCES if self.normalises else 0,
        )

    def mistakes(self, languages: Sequence[str], has_pairs: bool) -> Iterator[str]:
        if not has_pairs and self.contrastive.weight:
            yield "the contrastive loss needs pairs: set 'data.mixture.pairing' to 'reuse' or 'fill', or 'data.pairs'"
        if len(languages) < 2:
            yield f"objective {self.name!r} needs the dominant language and at least one other in 'data.languages'"
        if self.normalises and self.probe_items < MIN_SENTENCES:
            yield (
                f"objective.probe_items: {self.probe_items}, but a language needs {MIN_SENTENCES} probe samples for "
                f"contrastive.normalise={self.contrastive.normalise}"
            )


class ContrastiveFineTuning(SupervisedFineTuning):
    """Supervised fine-tuning, and the contrastive loss over the plan's contrast sets."""

    def __init__(
        self, model: PreTrainedModel, config: ContrastiveObjectiveConfig, layers: Sequence[int], parts: ObjectiveParts
    ) -> None:
        """Installs the pooling hooks.

        Args:
            layers: numbers `l` of the states `h[l]` that are compared.
        """
        from modeling.shifcon.contrastive import ContentPooling

        super().__init__(model)
        self.sft_weight = config.sft_weight
        self.contrastive = config.contrastive
        self.languages, self.dominant, self.probe = parts.languages, parts.dominant, parts.probe
        self._parallel = parts.parallel
        self.normalisation: Normalisation | None = None
        self.pooling = ContentPooling(model, layers)
        self._normalises = config.normalises
        self._refresh_every = config.refresh_every
        self._check = _RetrievalCheck() if config.contrastive.weight else None

    def loss_terms(self, engine: Engine, batch: ChatBatch) -> LossTerms:
        with self._pooled(batch) as pooled:
            fine_tuning = super().loss_terms(engine, batch)
        if self.normalisation is not None:
            populations = self._populations(batch)
            self.normalisation = self.normalisation.to(populations.device)  # loaded ones are on the CPU
            pooled = self.normalisation.apply(pooled, populations)
        terms, retrieved = contrastive_terms(pooled, batch.targets.contrast, self.contrastive)
        if self._check is not None and retrieved is not None:
            self._check.add(retrieved)
        return replace(fine_tuning, terms={**fine_tuning.terms, **terms})

    def before_step(self, engine: Engine, step: int) -> dict[str, float]:
        if self._check is not None and self._check.is_due(step):
            self._check.warn_by_chance(engine, self.pooling.layers)
            self._check = None
        return self.refresh(engine) if self._is_stale or step % self._refresh_every == 0 else {}

    def refresh(self, engine: Engine) -> dict[str, float]:
        """Measures what is needed on the probe set, over all ranks; returns metrics."""
        if self._normalises:
            moments = self._moments()
            self.over_probe(engine, lambda batch: self._adding(batch, moments))
            self._normalise_by(moments, engine)
        return {}

    @property
    def _is_stale(self) -> bool:
        """Whether something that a step needs was not measured or loaded yet."""
        return self._normalises and self.normalisation is None

    def over_probe(self, engine: Engine, *measures: Callable[[ChatBatch], AbstractContextManager[object]]) -> None:
        """One forward pass without gradients over every rank's share of the probe set.

        Args:
            measures: contexts that each micro-batch, on the device, runs in.
        """
        import torch

        first = torch.zeros(1, dtype=torch.int64, device=engine.device)
        with engine.evaluating(), self.head.select(first):  # the logits are not used: one position is enough
            for batch in self.probe:
                on_device = batch.to(engine.device)
                with ExitStack() as contexts:
                    for measure in measures:
                        contexts.enter_context(measure(on_device))
                    engine.forward(**on_device.model_inputs())

    def save(self, engine: Engine, directory: Path) -> None:
        from training.distributed import rank

        if self.normalisation is not None and rank() == 0:
            self.normalisation.save(directory / MOMENTS_FILE)

    def load(self, directory: Path) -> None:
        from modeling.shifcon.normalisation import Normalisation

        if self._normalises:
            self.normalisation = Normalisation.load(directory / MOMENTS_FILE)

    def _pooled(self, batch: ChatBatch) -> AbstractContextManager[list[Tensor]]:
        targets = batch.targets
        return self.pooling.batch(targets.segment_ids, targets.content, targets.n_segments)

    def _moments(self) -> PooledMoments:
        from modeling.shifcon.normalisation import PooledMoments

        n_populations = (1 + self._parallel) * len(self.languages)
        return PooledMoments(n_populations, len(self.pooling.layers), self.pooling.hidden_size)

    def _populations(self, batch: ChatBatch) -> Tensor:
        """(S,) int64: what each sample's state is normalised among; -1 for one without content.

        These are the samples of its language, and numbered behind them the texts of its language in the parallel
        corpus, whose states differ from those of training samples as their domains do.
        """
        languages = batch.targets.segment_languages
        in_corpus = batch.targets.segment_parallel & (languages >= 0)
        return languages + len(self.languages) * in_corpus if self._parallel else languages

    @contextmanager
    def _adding(self, batch: ChatBatch, moments: PooledMoments) -> Iterator[None]:
        with self._pooled(batch) as pooled:
            yield
        moments.add(pooled, self._populations(batch))

    def _normalise_by(self, moments: PooledMoments, engine: Engine) -> None:
        from modeling.shifcon.normalisation import Normalisation
        from training.distributed import all_sum

        summed = moments.over_ranks(lambda values: all_sum(values, engine.device))
        kind = self.contrastive.normalise
        self.normalisation = Normalisation.of(summed, self.languages, self.dominant, self.pooling.layers, kind)


def contrastive_terms(
    pooled: Sequence[Tensor], sets: ContrastSets | None, config: ContrastiveConfig
) -> tuple[Mapping[str, LossTerm], Tensor | None]:
    """The terms of the sets in which this rank has a sample; each set is reported by one rank.

    The loss depends on every pooled state, if only by a zero, so that all ranks have the same graph.

    Args:
        pooled: K tensors (S, H), normalised or not.
        sets: None: the micro-step has none.

    Returns:
        "contrastive", and "retrieval": the share of pairs found among their candidates, reported only.
        (3,) pairs found, expected by chance, and counted, of the sets that this rank reports; None without sets.
    """
    import torch

    from modeling.shifcon.contrastive import contrastive_losses, pair_cosines, retrieval
    from training.objectives.members import gather_members

    total = reported = torch.stack(list(pooled)).sum() * 0.0
    retrieved, found = None, torch.zeros_like(total)
    if sets is not None:
        cosines_KCPP = pair_cosines(gather_members(pooled, sets), sets.pairs)
        losses_C = contrastive_losses(cosines_KCPP, sets.excluded, config.scale)
        total, reported = total + losses_C.sum(), (losses_C * sets.is_reported).sum()
        counts_3C = torch.stack(retrieval(cosines_KCPP, sets.excluded))
        retrieved = (counts_3C * sets.is_reported).sum(dim=1)
        found = retrieved[0]
    terms = {
        "contrastive": LossTerm(total, "pairs", config.weight, reported),
        "retrieval": LossTerm(found, "pairs", 0.0),
    }
    return terms, retrieved


class _RetrievalCheck:
    """Warns if the pairs in the contrast sets of a start's first steps are found no more often than by chance."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (3,) of `contrastive_terms`, on the device
        self._end: int | None = None

    def add(self, retrieved: Tensor) -> None:
        self._sums = retrieved.double() if self._sums is None else self._sums + retrieved

    def is_due(self, step: int) -> bool:
        """Whether enough steps were taken before this one."""
        if self._end is None:
            self._end = step + CHECKED_STEPS
        return step >= self._end

    def warn_by_chance(self, engine: Engine, layers: Sequence[int]) -> None:
        """Called on all ranks; waits for the device."""
        import torch
        from scipy.stats import binomtest

        from training.distributed import all_sum, rank

        own = torch.zeros(3) if self._sums is None else self._sums
        found, by_chance, pairs = all_sum(own, engine.device).tolist()
        if not pairs or rank() != 0:
            return
        p = binomtest(round(found), round(pairs), by_chance / pairs, alternative="greater").pvalue
        if p > CHANCE:
            log.warning(
                "the contrastive loss cannot tell translations from other pairs: in the first %d steps %.0f of %.0f "
                "pairs were nearest to their own translation at the layers %d to %d, %.0f would be by chance "
                "(p = %.2g); try other layers or objective.contrastive.normalise=standardised",
                CHECKED_STEPS, found, pairs, layers[0], layers[-1], by_chance, p,
            )  # fmt: skip
