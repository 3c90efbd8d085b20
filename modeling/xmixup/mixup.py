"""X-Mixup (arXiv 2205.04182, section 3.2): one encoder layer mixes target texts with their source texts.

A batch holds n target rows, then their n source rows. With `Z_t`, `Z_s` the outputs of the layer's attention block
(after residual and LayerNorm) for the two sides, the block's output for targets becomes (docs/methods.md, section 2.1)

    LayerNorm( lam * dense(cross(Z_t, Z_s)) + (1 - lam) * Z_t )        lam = lam0 * sigmoid(w * entropy + b)

where `cross` is the layer's own attention with queries of `Z_t`, keys and values of `Z_s`. Sources are not mixed.

Hooks around the attention block do all of it: its self-attention runs once, on all rows, with the model's own
implementation. The hooks call the layer's submodules and never read their weights, so ZeRO-3 may shard them and peft
may wrap them. They run inside the layer's `forward`, which gradient checkpointing repeats after `batch()` has been
left, so the description of a batch is passed in the layer's keyword arguments.

Shapes: R rows, T tokens, H hidden, n pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modeling.errors import ModelError
from modeling.layers import decoder_layers, without_autocast
from modeling.weights.weight_files import directory_hash
from modeling.xmixup.cross_attention import EntropyName, attention_weights, pair_entropy, scaled_scores, wide
from modeling.xmixup.mixup_state import MIXUP_FILE, RATIO_MODULE, MixupState

MODEL_TYPES = ("bert", "camembert", "electra", "roberta", "xlm-roberta")
PRE_LN_TYPES = ("megatron-bert", "roberta-prelayernorm", "xlm-roberta-xl")
PARTS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.self.dropout",
    "attention.output.dense",
    "attention.output.dropout",
    "attention.output.LayerNorm",
    "intermediate",
    "output",
)
_KEYWORD = "crosslift_mixup"  # the keyword argument of the layer that holds a `_Pairs`


def encoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of a post-LN encoder such as BERT, RoBERTa and XLM-R.

    Raises:
        ModelError: any other model, with the reason; the mixing formula holds for such layers only.
    """
    pretrained = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    name = type(model).__name__ if pretrained is None else pretrained.config.model_type
    hint = f"; take one of {', '.join(MODEL_TYPES)}"
    if name in PRE_LN_TYPES:
        raise ModelError(f"X-Mixup: {name} is pre-LN: its attention block ends without the LayerNorm to mix in{hint}")
    layers = decoder_layers(model)
    for part in PARTS:
        try:
            layers[0].get_submodule(part)
        except AttributeError as error:
            raise ModelError(f"X-Mixup: the layers of {name} have no {part}{hint}") from error
    if name not in MODEL_TYPES:
        raise ModelError(f"X-Mixup: the attention of {name} has not been tested with the method{hint}")
    if pretrained is not None and pretrained.config.is_decoder:
        raise ModelError(f"X-Mixup: this {name} is a decoder; set is_decoder to false in its config")
    return layers


class MixupRatio(nn.Module):
    """`lam` of each pair from its entropy. It is a module so that ZeRO-3 gathers `w` and `b` for it."""

    def __init__(self, lam0: float, like: Tensor) -> None:
        """`w` = 1 and `b` = 0, each (1,), with the number format and device of `like`."""
        super().__init__()
        self.lam0 = lam0
        self.w = nn.Parameter(torch.ones(1, dtype=like.dtype, device=like.device))
        self.b = nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device))

    def forward(self, entropy_n: Tensor) -> Tensor:
        """(n,) values in 0..lam0, in the number format of the entropies."""
        kind = entropy_n.dtype
        return self.lam0 * torch.sigmoid(self.w.to(kind) * entropy_n + self.b.to(kind))


@dataclass(frozen=True, slots=True)
class _Pairs:
    """A batch to mix: (R, T) bool valid tokens, of n target rows and their n source rows."""

    valid_RT: Tensor
    n: int


class CrossLingualMixup:
    """Mixes every forward pass of a model inside `batch()`; does nothing outside it."""

    def __init__(
        self,
        model: nn.Module,
        layer: int,
        lam0: float = 0.5,
        entropy: EntropyName = "true",
        ratio: float | Literal["learned"] = "learned",
    ) -> None:
        """Installs the hooks and, for a learned ratio, the parameters `<layer>.mixup_ratio.{w,b}`.

        Install it after the weights are loaded (a model directory holds no `mixup_ratio`) and after peft's adapters are
        added (peft freezes what it finds), before the engine exists.

        Args:
            model: a post-LN encoder (`encoder_layers`).
            layer: number of the layer that mixes, 0-based.
            lam0: the largest ratio.
            entropy: see `pair_entropy`.
            ratio: "learned", or a fixed ratio in 0..1.

        Raises:
            ModelError: another kind of model, a layer that does not exist or mixes already, or impossible settings.
        """
        self._settings = MixupState(layer, lam0, entropy, ratio)
        layers = encoder_layers(model)
        if layer >= len(layers):
            raise ModelError(f"x-mixup: layer {layer} does not exist: the model has layers 0..{len(layers) - 1}")
        self.last_ratio: Tensor | None = None  # (n,) lam of the last mixed forward pass, detached
        self._layer = cast(Any, layers[layer])
        if hasattr(self._layer, _KEYWORD):
            raise ModelError(f"x-mixup: layer {layer} already has X-Mixup hooks")
        setattr(self._layer, _KEYWORD, True)
        if ratio == "learned":
            norm = self._layer.attention.output.LayerNorm.weight
            self._layer.add_module(RATIO_MODULE, MixupRatio(lam0, norm))
        self._pairs: _Pairs | None = None  # of the batch that is open
        self._running: _Pairs | None = None  # of the attention block that is running
        self._mixed_once = False
        attention = self._layer.attention
        self._handles = [
            self._layer.register_forward_pre_hook(self._add_keyword, with_kwargs=True),
            attention.register_forward_pre_hook(self._remove_keyword, with_kwargs=True),
            attention.register_forward_hook(self._mix_output),
        ]

    @classmethod
    def attach(cls, model: nn.Module, directory: Path | str) -> CrossLingualMixup:
        """X-Mixup on a model that was opened from `directory`, with its `xmixup.safetensors`.

        Raises:
            ModelError: the file is missing or damaged, or belongs to other weights than the directory's.
        """
        file = Path(directory) / MIXUP_FILE
        state = MixupState.load(file)
        if state.model_hash != directory_hash(directory):
            raise ModelError(f"{file}: belongs to other weights than those beside it; export the model again")
        return cls.from_state(model, state)

    @classmethod
    def from_state(cls, model: nn.Module, state: MixupState) -> CrossLingualMixup:
        """X-Mixup on `model` with a state's settings and learned numbers."""
        mixup = cls(model, state.layer, state.lam0, state.entropy, state.ratio)
        for parameter, value in zip(mixup.parameters(), (state.w, state.b), strict=False):
            with torch.no_grad():
                parameter.fill_(value)
        return mixup

    def parameters(self) -> list[nn.Parameter]:
        """`w` and `b`; none for a fixed ratio."""
        module = getattr(self._layer, RATIO_MODULE, None)
        return [] if module is None else [module.w, module.b]

    def state(self, model_hash: str = "") -> MixupState:
        """The current settings and learned numbers. Under ZeRO-3, gather `parameters()` around this call."""
        settings = self._settings
        learned = dict(zip(("w", "b"), (float(parameter.detach()) for parameter in self.parameters()), strict=False))
        return MixupState(
            settings.layer, settings.lam0, settings.entropy, settings.ratio, model_hash=model_hash, **learned
        )

    @contextmanager
    def batch(self, attention_mask: Tensor, n_pairs: int, mix: bool = True) -> Iterator[None]:
        """Inside, forward passes over n targets (rows 0..n-1) and their sources (rows n..2n-1) are mixed.

        Args:
            attention_mask: (2n, T), not 0 at valid tokens, as given to the model.
            n_pairs: n; with 0 the layer runs as without X-Mixup.
            mix: False runs the layer as without X-Mixup.

        Raises:
            ModelError: rows and pairs do not fit; or on leaving, no forward pass was mixed.
        """
        before = self._pairs
        mixing = mix and n_pairs > 0
        if mixing and len(attention_mask) != 2 * n_pairs:
            raise ModelError(f"x-mixup: {n_pairs} pairs are {2 * n_pairs} rows, but the mask has {len(attention_mask)}")
        self._pairs = _Pairs(attention_mask != 0, n_pairs) if mixing else None
        self._mixed_once = False
        try:
            yield
        finally:
            self._pairs = before
        if mixing and not self._mixed_once:
            raise ModelError("x-mixup: no forward pass reached the mixed layer, so nothing was mixed")

    def remove(self) -> None:
        """Removes the hooks and the parameters from the model."""
        for handle in self._handles:
            handle.remove()
        delattr(self._layer, _KEYWORD)
        if hasattr(self._layer, RATIO_MODULE):
            delattr(self._layer, RATIO_MODULE)

    def _add_keyword(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Before the layer: adds the batch to its keyword arguments, which checkpointing keeps."""
        if self._pairs is None:
            return None
        shape = (args[0] if args else kwargs["hidden_states"]).shape[:2]
        if shape != self._pairs.valid_RT.shape:
            raise ModelError(
                f"x-mixup: a forward pass of {tuple(shape)} rows and tokens inside a batch of "
                f"{tuple(self._pairs.valid_RT.shape)}"
            )
        return args, {**kwargs, _KEYWORD: self._pairs}

    def _remove_keyword(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Before the attention block: removes that argument, which the block does not accept."""
        self._running = kwargs.get(_KEYWORD)
        if self._running is None:
            return None
        return args, {key: value for key, value in kwargs.items() if key != _KEYWORD}

    def _mix_output(self, _: nn.Module, __: tuple, output: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """After the attention block: the targets' part of its output, mixed; the sources' part unchanged."""
        pairs, self._running = self._running, None
        if pairs is None:
            return None
        self._mixed_once = True
        target, source = output[0].split(pairs.n)
        mixed = self._mixed(target, source, pairs)
        return torch.cat([mixed.to(source.dtype), source]), *output[1:]

    def _mixed(self, target_nTH: Tensor, source_nTH: Tensor, pairs: _Pairs) -> Tensor:
        """(n, T, H): the mixing formula on the attention block's outputs."""
        attention, out = self._layer.attention.self, self._layer.attention.output
        target_valid, source_valid = pairs.valid_RT.split(pairs.n)
        size = attention.attention_head_size
        query, key, value = (
            projected.unflatten(-1, (-1, size)).transpose(1, 2)  # (n, heads, T, head size)
            for projected in (attention.query(target_nTH), attention.key(source_nTH), attention.value(source_nTH))
        )
        with without_autocast(target_nTH.device):
            scores = scaled_scores(query, key)
            over_source = attention_weights(scores, source_valid)
            lam_n = self._lam(scores, over_source, target_valid, source_valid)
        weights = attention.dropout(over_source[0].to(value.dtype))
        context = (weights @ value).transpose(1, 2).flatten(2)
        cross_nTH = out.dropout(out.dense(context))
        lam = lam_n[:, None, None]
        return out.LayerNorm((lam * wide(cross_nTH) + (1 - lam) * wide(target_nTH)).to(target_nTH.dtype))

    def _lam(
        self, scores: Tensor, over_source: tuple[Tensor, Tensor], target_valid: Tensor, source_valid: Tensor
    ) -> Tensor:
        if self._settings.ratio != "learned":
            lam_n = scores.new_full((len(scores),), self._settings.ratio)
        else:
            entropy_n = pair_entropy(scores, over_source, target_valid, source_valid, self._settings.entropy)
            lam_n = getattr(self._layer, RATIO_MODULE)(entropy_n)
        self.last_ratio = lam_n.detach()
        return lam_n
