"""What a run optimises: the `objective:` section of a run file, one class a method.

In: nothing. Out: frozen, checked models. Next: `config.py`, which puts them into the whole.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from data_pipeline.config import merged
from data_pipeline.settings import Section


def refuse(mistakes: Iterable[str]) -> None:
    """In a validator: raises ValueError with all mistakes, a line each, if there are any."""
    if lines := list(mistakes):
        raise ValueError("\n".join(lines))


class SFTConfig(Section):
    """Supervised fine-tuning: token-weighted cross-entropy on the answers (MSFT, the baseline)."""

    name: Literal["sft"]


class ContrastiveConfig(Section):
    """The multilingual contrastive loss (docs/methods.md, section 1.3)."""

    weight: float = Field(ge=0, description="b of loss = a * SFT + b * contrastive")
    scale: float = Field(gt=0, description="what the cosine similarities are multiplied by; b means nothing without it")
    set_size: int = Field(16, gt=1, description="pairs in a contrast set; a set stays in one micro-batch")


AUTHORS_SHIFCON = {
    "sft_weight": 0.5,
    "contrastive": {"weight": 2.0, "scale": 1.0, "set_size": 12},
    "layers": (12, 15),
}


class ShifConConfig(Section):
    """ShifCon (arXiv 2410.19453): shift, contrast, shift back."""

    name: Literal["shifcon"]
    preset: Literal["authors"] | None = Field(
        None, description="'authors': their weights, scale, pairs and layers (12 to 15 of Llama-2-7B's 32)"
    )
    layers: tuple[int, int] = Field(
        description="[toward, back): states entering `toward` are shifted, `back` shifts back"
    )
    sft_weight: float = Field(1.0, ge=0, description="a of loss = a * SFT + b * contrastive")
    contrastive: ContrastiveConfig
    probe_items: int = Field(64, gt=0, description="samples a language that the language vectors are estimated on")
    refresh_every: int = Field(100, gt=0, description="steps between two estimates of the language vectors")
    shift_first_token: bool = Field(True, description="also shift a sequence's first token, an attention sink")

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("preset") == "authors":
            return merged(AUTHORS_SHIFCON, values)
        return values

    @model_validator(mode="after")
    def _learns(self) -> ShifConConfig:
        if not self.sft_weight and not self.contrastive.weight:
            raise ValueError("'sft_weight' and 'contrastive.weight' are both 0: nothing would be learned")
        return self

    @field_validator("layers")
    @classmethod
    def _ordered(cls, layers: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= layers[0] < layers[1]:
            raise ValueError(f"must be [toward, back] with 0 <= toward < back, not {list(layers)}")
        return layers


class MaskedLMConfig(Section):
    """Masked language modelling: what an encoder is first trained with, from raw text."""

    name: Literal["mlm"]


class FineTuneConfig(Section):
    """A task's loss on its own samples: English only (zero-shot transfer), or with translations (translate-train)."""

    name: Literal["finetune"]


class XMixupConfig(Section):
    """X-Mixup (arXiv 2205.04182): states of the target text mixed with those of its source at one layer.

    The paper's ablations and the baseline translate-train + consistency are settings of it: `mix`, `ratio`,
    `source_schedule`, `consistency_weight`.
    """

    name: Literal["xmixup"]
    layer: int = Field(ge=0, description="the encoder layer that mixes, 0-based; 0, 3, 15 for XLM-R large in the paper")
    alpha: float = Field(ge=0, le=1, description="loss = alpha * task(source) + (1 - alpha) * task(target) + ...")
    mix: bool = Field(True, description="false: both sides run, nothing is mixed (translate-train with consistency)")
    ratio: Literal["learned"] | float = Field(
        "learned", description="share of the cross-attention: learned from its entropy, or a fixed number"
    )
    max_ratio: float = Field(0.5, gt=0, le=1, description="lambda_0, which the learned ratio stays below")
    entropy: Literal["true", "authors"] = Field(
        "true", description="'authors': their masked-score form, which padding changes; only for comparison"
    )
    source_schedule: float | None = Field(
        1000.0,
        gt=0,
        description="k of scheduled sampling: a step's sources are gold with k / (k + exp(step / k)); null: always",
    )
    consistency_weight: float = Field(1.0, ge=0, description="of the consistency between both sides; 0: none")

    @field_validator("ratio")
    @classmethod
    def _a_share(cls, ratio: str | float) -> str | float:
        if isinstance(ratio, float) and not 0 <= ratio <= 1:
            raise ValueError("must be 'learned' or a number from 0 to 1")
        return ratio


TaskObjectiveConfig = MaskedLMConfig | FineTuneConfig | XMixupConfig
