"""The config of a run: all sections of a run file, composed from the config models of the packages.

`run_file.py` reads it from YAML. No large library is imported here, so that `crosslift --help` and `crosslift check`
start quickly.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import Field, field_validator, model_validator

from data_pipeline.config import Overlong, RowKind, SourceConfig, merged
from data_pipeline.order.mixture import MixtureConfig, PairSharesConfig
from data_pipeline.settings import PathText, Plain, Raw, RunPath, Section, refuse
from data_pipeline.tasks.config import WINDOWED, TaskConfig
from data_pipeline.text.templates import TemplateConfig
from data_pipeline.text.tokenizer import TokenizerTrainingConfig
from training.checks.metric_names import metric_names, unknown_metric
from training.checks.quantised import unfit_for_packed
from training.engine.settings import contradictions, own_settings
from training.launch.watchdog import WatchdogConfig
from training.loop.guard import GuardConfig
from training.objectives.base import ObjectiveConfig
from training.objectives.registry import OBJECTIVES
from training.tracking.config import TrackingConfig

if TYPE_CHECKING:
    AnyObjective = ObjectiveConfig
else:
    AnyObjective = Annotated[Union[OBJECTIVES], Field(discriminator="name")]  # noqa: UP007


class LoraSettings(Section):
    """Low-rank adapters instead of all weights; an export holds the merged weights and a peft adapter directory."""

    rank: int = Field(gt=0, description="r: the inner size of each adapter")
    alpha: int = Field(gt=0, description="adapters are multiplied by alpha / rank; see use_rslora")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the inputs of adapters")
    targets: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="names of linear layers, such as [q_proj, v_proj]; all-linear, the default: all of every block",
    )
    use_dora: bool = Field(
        False, description="DoRA: also train the magnitude of each output of an adapted layer; slower, more memory"
    )
    use_rslora: bool = Field(False, description="rsLoRA: multiply adapters by alpha / sqrt(rank), for large ranks")

    @field_validator("targets", mode="before")
    @classmethod
    def _all(cls, targets: Any) -> Any:
        if isinstance(targets, str):  # peft's name for all
            if targets != "all-linear":
                raise ValueError(f"write all-linear, or a list of names: [{targets}]")
            return None
        return targets


class ModelConfig(Section):
    """Which model is trained: a directory or hub name, or `init:`, a Hugging Face config, from scratch."""

    path: PathText | None = Field(None, description="Hugging Face directory (safetensors) or hub name")
    init: Plain[dict[str, Any]] | None = Field(None, description="model config to start from scratch, with model_type")
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto", description="auto: flash-attn where it runs, else sdpa, else eager"
    )
    lora: LoraSettings | None = Field(None, description="train low-rank adapters (LoRA), all else frozen")
    quantise: Literal["nf4"] | None = Field(
        None,
        description="QLoRA: hold the frozen weights of the blocks' linear layers in 4 bits, by bitsandbytes; needs "
        "lora and a GPU",
    )

    @model_validator(mode="after")
    def _one_start(self) -> ModelConfig:
        if (self.path is None) == (self.init is None):
            raise ValueError("give exactly one of 'path' (a model to fine-tune) and 'init' (a config from scratch)")
        if self.init is not None and self.lora is not None:
            raise ValueError("'lora' adapts a trained model: it needs 'path' and cannot be combined with 'init'")
        if self.quantise is not None and self.lora is None:
            raise ValueError(
                "'quantise' holds frozen weights in 4 bits: it needs 'lora', which trains adapters to them"
            )
        return self


class TokenizerConfig(Section):
    """The tokenizer: the model's own by default, another directory or hub name, or trained from the sources."""

    path: PathText | None = Field(None, description="Hugging Face directory or hub name; default: the model's own")
    train: TokenizerTrainingConfig | None = Field(None, description="train one from the run's own sources")

    @model_validator(mode="after")
    def _one_origin(self) -> TokenizerConfig:
        if self.path is not None and self.train is not None:
            raise ValueError("give 'path' or 'train', not both")
        return self

    @property
    def of_model(self) -> bool:
        """Whether the tokenizer is the model's own."""
        return self.path is None and self.train is None


class PairsConfig(Section):
    """A parallel corpus: texts without labels, whose translations the contrastive loss compares."""

    sources: tuple[SourceConfig, ...] = Field(
        min_length=1,
        description="files of translations: `files: {en: a.txt, sw: b.txt}` with parallel lines, or rows with a column "
        "`text` and a `group` that is the same in translations",
    )
    per_step: int = Field(gt=0, description="pairs in a step's global batch, over all ranks, beside those of the slots")
    longest: int | None = Field(
        None, gt=1, description="tokens of a text, above which its pair is left out; by default data.sequence_length"
    )
    mixture: PairSharesConfig = PairSharesConfig()


RESERVED_LANGUAGES = ("auto", "none")  # values of `crosslift generate --language` that are not codes


class DataConfig(Section):
    """The data of a run: sources, mixture, and how samples are packed into batches."""

    languages: tuple[str, ...] = Field(min_length=1, description="all languages of the run, in a fixed order")
    dominant: str = Field("en", description="the language that the others are shifted into, or translated to")
    task: TaskConfig | None = Field(None, description="the task of an encoder; without it, rows are conversations")
    sources: tuple[SourceConfig, ...] = Field(min_length=1, description="files or data sets, read as one corpus")
    pairs: PairsConfig | None = Field(None, description="translations without labels, for the contrastive loss")
    template: TemplateConfig = TemplateConfig()
    mixture: MixtureConfig = MixtureConfig()
    slots_per_step: int = Field(gt=0, description="labelled samples in a step's global batch, over all ranks")
    sequence_length: int = Field(gt=1, description="longest sample in tokens; longer ones are handled by `overlong`")
    overlong: Overlong = Field(
        "drop",
        description="handling of samples longer than sequence_length. error: the run ends; drop: the slot stays "
        "empty; truncate: the prompt is cut from the left, never the answer. With a task the default is truncate: "
        "classification cuts texts at the end; tagging, qa and text read them in windows and take no other value",
    )
    micro_batch_tokens: int = Field(gt=1, description="rows x row length of one forward pass on one rank")
    layout: Literal["auto", "packed", "padded"] = Field(
        "auto", description="packed: several samples per row; padded: one; auto: packed if a check finds no leakage"
    )
    max_bad_rows: int = Field(
        0, ge=0, description="limit of unusable rows; each counts once, however often a run reads it"
    )
    heldout_items: int = Field(0, ge=0, description="items held out of training, in every language")
    patience_seconds: float = Field(300.0, ge=0, description="how long reading an unreadable source file is retried")
    workers: int = Field(1, gt=0, le=256, description="background threads per rank that read, tokenise and pack")

    @property
    def parallel_sources(self) -> tuple[SourceConfig, ...]:
        """The sources of the parallel corpus."""
        return self.pairs.sources if self.pairs is not None else ()

    @property
    def all_sources(self) -> tuple[SourceConfig, ...]:
        """Those of the rows, and of the parallel corpus."""
        return (*self.sources, *self.parallel_sources)

    @property
    def kind(self) -> RowKind:
        """Kind of the rows: those of the task, or conversations."""
        return "chat" if self.task is None else self.task.kind

    @model_validator(mode="before")
    @classmethod
    def _task_defaults(cls, values: Any) -> Any:
        """Sets the defaults for tasks: no contrast sets, which only conversations have, and truncation."""
        if isinstance(values, dict) and values.get("task") is not None:
            return merged({"mixture": {"pairing": "none"}, "overlong": "truncate"}, values)
        return values

    @model_validator(mode="after")
    def _consistent(self) -> DataConfig:
        refuse(self._mistakes())
        return self

    @field_validator("languages")
    @classmethod
    def _codes(cls, languages: tuple[str, ...]) -> tuple[str, ...]:
        for language in languages:
            if not re.fullmatch(r"[\w.@-]+", language) or language in RESERVED_LANGUAGES:
                raise ValueError(f"{language!r} is not a language code; use one such as sw, zh-Hant or eng_Latn")
        return languages

    def _mistakes(self) -> Iterator[str]:
        """Conflicts between keys, and languages of any section that are not declared."""
        known = f"'languages' has {', '.join(self.languages)}"
        if len(set(self.languages)) < len(self.languages):
            yield "'languages' names a language twice"
        if self.dominant not in self.languages:
            yield f"'dominant' is {self.dominant!r}, which is not among 'languages'"
        for language in self.mixture.weights or ():
            if language not in self.languages:
                yield f"'mixture.weights' names {language!r}; {known}"
        if self.sequence_length > self.micro_batch_tokens:
            yield (
                f"'sequence_length' ({self.sequence_length}) is above 'micro_batch_tokens' "
                f"({self.micro_batch_tokens}): the longest sample would fit no micro-batch"
            )
        if self.kind in WINDOWED and self.overlong != "truncate":
            yield (
                f"'overlong' is {self.overlong!r}, but kind {self.kind!r} reads long texts in windows: none is "
                "too long; leave it out"
            )
        parallel = self.parallel_sources
        names = [source.name for source in self.all_sources]
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"two sources have the name {name!r}"
        for source in self.all_sources:
            for key in ("language", "response_language"):
                if (language := getattr(source, key)) is not None and language not in self.languages:
                    yield f"source {source.name!r} has {key} {language!r}; {known}"
            for language in (*(source.languages or ()), *(source.file_languages or ())):
                if language not in self.languages:
                    yield f"source {source.name!r} has the language {language!r}; {known}"
        for source in parallel:
            if source.columns.kind != "text":
                yield f"source {source.name!r} of 'pairs' needs the column 'text', not those of {source.columns.kind}"
        if self.task is not None and parallel:
            yield "'pairs' are for conversations, not for a 'task'"
        for language in self.pairs.mixture.weights or () if self.pairs is not None else ():
            if language not in self.languages:
                yield f"'pairs.mixture.weights' names {language!r}; {known}"
        for source in self.sources:
            if source.columns.kind != self.kind:
                expected = "there is no 'task'" if self.kind == "chat" else f"'task.kind' is {self.kind!r}"
                yield f"source {source.name!r} has columns of kind {source.columns.kind!r}, but {expected}"


Share = Annotated[float, Field(ge=0, lt=1)]


# Keys, and optimizers of torch and DeepSpeed, that are not offered, and why.
_TWO_MOMENTS = "DeepSpeed converts a checkpoint to another number of ranks only with Adam's two moments"
NOT_OFFERED = {
    "torch_compile": "under ZeRO-3 a graph breaks at every module, where weights are gathered, and a step took "
    "twice as long; under ZeRO-2 torch reached its limit of recompilations (tried on CPUs, with equal losses)",
}
OPTIMIZERS_NOT_OFFERED = {
    "sgd": _TWO_MOMENTS,
    "nadam": _TWO_MOMENTS,
    "muon": _TWO_MOMENTS,
    "lion": f"{_TWO_MOMENTS}, and its own has no CPU version without offloading",
    "adagrad": "DeepSpeed's ZeRO fails if it has groups of weights, with and without weight decay",
}


class OptimizerConfig(Section):
    """Adam and its variants."""

    name: Literal["adamw", "adam", "radam"] = Field(
        "adamw",
        description="adamw; adam: weight decay is added to the gradient (L2); radam: rectified, decay as adamw's",
    )
    learning_rate: float = Field(gt=0, description="peak learning rate of the schedule")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="decay of the two running moments")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.0, ge=0, description="on matrices only, not on biases and norms")
    max_grad_norm: float = Field(1.0, ge=0, description="0 turns clipping off")

    @field_validator("name", mode="before")
    @classmethod
    def _offered(cls, name: Any) -> Any:
        if isinstance(name, str) and (reason := OPTIMIZERS_NOT_OFFERED.get(name.lower())) is not None:
            raise ValueError(f"{name!r} is not offered: {reason}; use adamw, adam or radam")
        return name


class ScheduleConfig(Section):
    """Learning rate as a function of the step: linear warm-up, then one of three shapes."""

    name: Literal["cosine", "linear", "constant"] = Field("cosine", description="shape after the warm-up")
    warmup_ratio: float = Field(0.01, ge=0, lt=1, description="share of max_steps")
    final_ratio: float = Field(
        0.0, ge=0, le=1, description="cosine and linear: final learning rate as a fraction of the peak"
    )

    @model_validator(mode="after")
    def _has_final_ratio(self) -> ScheduleConfig:
        if self.name == "constant" and self.final_ratio:
            raise ValueError("'final_ratio' is for cosine and linear; 'constant' does not decay")
        return self


class CheckpointConfig(Section):
    """When checkpoints are saved, and which are kept."""

    every: int = Field(100, gt=0, description="steps between two checkpoints; the last step is always saved")
    keep: int = Field(2, gt=0, description="newest complete checkpoints kept")
    keep_every: int = Field(0, ge=0, description="also kept: checkpoints of steps divisible by this; 0: none")
    best: str | None = Field(None, description="also kept: the best by this metric, such as eval/loss or eval/loss/sw")
    best_mode: Literal["min", "max"] = Field("min", description="which value of that metric is best")
    local_dir: str | None = Field(
        None, min_length=1,
        description="folder on each node's own disk, such as $TMPDIR/run-a, for all checkpoints but the last: a run "
        "then resumes with the same ranks on the same nodes only; variables are expanded on the node"
    )  # fmt: skip
    background: bool = Field(
        True, description="write while training continues; takes as much host memory as the state of a rank's GPU"
    )


class EvaluationConfig(Section):
    """Held-out loss per language during training; reads `data.heldout_items`."""

    every: int = Field(0, ge=0, description="steps between two evaluations; 0: none")
    items: int = Field(64, gt=0, description="held-out samples per language")
    swapped_prompts: bool = Field(
        False,
        description="also report the loss with prompts swapped between items, to see whether the model uses the prompt",
    )


class RunConfig(Section):
    """A whole run."""

    data_dir: RunPath | None = Field(None, description="folder of relative source files")
    output_dir: RunPath = Field(description="the run folder, which holds everything that the run writes")
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="seed of all random choices: order of samples, held-out items, initial weights, dropout",
    )
    max_steps: int = Field(gt=0, description="optimiser steps")
    model: ModelConfig
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig
    objective: AnyObjective
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="of weights and activations; gradients are always summed in fp32"
    )
    gradient_checkpointing: bool = Field(False, description="recompute layers in backward: less memory, slower steps")
    zero_stage: Literal[1, 2, 3] = Field(
        3, description="sharded over ranks: 1 the optimiser's state, 2 also gradients, 3 also weights"
    )
    deepspeed: Raw[dict[str, Any]] = Field(
        {}, description="raw DeepSpeed settings, merged last; settings that other keys determine are errors"
    )
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    guard: GuardConfig = GuardConfig()
    tracking: TrackingConfig = TrackingConfig()
    watchdog: WatchdogConfig = WatchdogConfig()

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        refuse(self._mistakes())
        return self

    def _mistakes(self) -> Iterator[str]:
        """Conflicts between sections."""
        own = own_settings(self.optimizer, self.precision, self.zero_stage, world_size=0, on_gpu=False)
        yield from contradictions(self.deepspeed, own)
        if self.model.quantise is not None:
            yield from unfit_for_packed(self.deepspeed)
        if self.model.init is not None and self.tokenizer.of_model:
            yield "'model.init' starts from scratch, so 'tokenizer' needs 'path' or 'train'"
        if self.evaluation.every and not self.data.heldout_items:
            yield "'evaluation.every' needs held-out samples: set 'data.heldout_items'"
        if self.evaluation.swapped_prompts and not self.evaluation.every:
            yield "'evaluation.swapped_prompts' is part of an evaluation: set 'evaluation.every'"
        if "rollback" in (self.guard.non_finite, self.guard.spike) and self.checkpoint.every >= self.max_steps:
            yield (
                f"'guard' rolls back to the last checkpoint, but with 'checkpoint.every' {self.checkpoint.every} and "
                f"'max_steps' {self.max_steps} no checkpoint is saved before the last step; lower 'checkpoint.every'"
            )
        yield from self._best_is_measured()
        kind, kinds = self.data.kind, self.objective.kinds
        if kind not in kinds:
            wanted = "no 'data.task'" if "chat" in kinds else f"'data.task.kind' to be one of {', '.join(kinds)}"
            found = "which is missing" if kind == "chat" else f"not {kind!r}"
            yield f"objective {self.objective.name!r} needs {wanted}, {found}"
        else:
            has_pairs = self.data.mixture.pairing != "none" or self.data.pairs is not None
            yield from self.objective.mistakes(self.data.languages, has_pairs)
        if self.objective.pairing().with_partner and 2 * self.data.sequence_length > self.data.micro_batch_tokens:
            yield (
                f"'data.micro_batch_tokens' ({self.data.micro_batch_tokens}) is below twice 'data.sequence_length' "
                f"({self.data.sequence_length}): the longest sample with its translation would fit no micro-batch"
            )
        if kind != "chat" and self.data.mixture.pairing != "none":
            yield "'data.mixture.pairing' must be 'none' with 'data.task', as it builds contrast sets of conversations"
        if kind != "chat" and self.evaluation.swapped_prompts:
            yield "'evaluation.swapped_prompts' needs conversations; a task has no prompts"

    def _best_is_measured(self) -> Iterator[str]:
        """Reasons why no checkpoint would have the metric of `checkpoint.best`."""
        best, every = self.checkpoint.best, self.evaluation.every
        if best is None:
            if self.checkpoint.best_mode != "min":
                yield "'checkpoint.best_mode' needs 'checkpoint.best', which is not set"
            return
        names = metric_names(self.objective, self.data.languages, self.evaluation.swapped_prompts)
        if best not in names:
            yield unknown_metric(best, names)
        elif not best.startswith("eval/"):
            return
        elif not every:
            yield f"'checkpoint.best' is {best!r}, which needs 'evaluation.every'"
        elif self.checkpoint.every % every:
            yield (
                f"'checkpoint.best' is {best!r}, so 'checkpoint.every' ({self.checkpoint.every}) must be a multiple of "
                f"'evaluation.every' ({every})"
            )
