"""Frozen linear layers whose weights are held in a few bits (QLoRA, arXiv 2305.14314), under any ZeRO stage.

A quantised layer has one parameter for its weight, `packed`: the bytes of codes and scales in one uint8 tensor, which
ZeRO-3 shards and gathers like any other. The weight itself is computed from it in each forward and backward pass and
kept in neither. What reads `weight` (peft, for DoRA's norms and the adapters' number format) gets that value.

A model's layers are replaced one by one as they are made, so no rank holds its unquantised weights; `loading.py` packs
each weight as it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedModel

from modeling.layers import linear_layers
from modeling.quantisation.nf4 import NF4


class WeightFormat(Protocol):
    """A quantised number format of weights."""

    needs_gpu: bool  # for training

    def missing(self) -> str | None:
        """What must be installed to use it, and how; None: nothing."""
        ...

    def packed_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a packed weight."""
        ...

    def pack(self, weight: Tensor) -> Tensor:
        """Packs a weight (out, in) into `packed_bytes` uint8, on any device."""
        ...

    def unpack(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """The weight (out, in), on the device of `packed`."""
        ...


FORMATS: dict[str, WeightFormat] = {"nf4": NF4()}  # values of `model.quantise`


class QuantisedLinear(nn.Linear):
    """A frozen linear layer; `dtype` is that of its computed weight and of its bias."""

    def __init__(self, linear: nn.Linear, number_format: WeightFormat, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)  # that of nn.Linear would make the weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.format, self.dtype = number_format, dtype
        empty = torch.empty(number_format.packed_bytes(self.shape), dtype=torch.uint8)
        self.packed = nn.Parameter(empty, requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(torch.empty(self.out_features, dtype=dtype))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), of the weight."""
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight (out, in), computed; without elements, as any weight is, while ZeRO-3 has only shards of it."""
        if self.packed.is_meta or not self.packed.numel():
            shape = self.shape if self.packed.is_meta else (0,)
            return torch.empty(shape, dtype=self.dtype, device=self.packed.device)
        return self.format.unpack(self.packed.detach(), self.shape, self.dtype)

    def pack(self, weight: Tensor) -> Tensor:
        """The content of `packed` for a weight (out, in) of any number format."""
        return self.format.pack(weight.to(self.dtype))

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = _Product.apply(input, self)
        return output


class _Product(torch.autograd.Function):
    """A linear layer's product, which saves no weight for the backward pass, where ZeRO-3 has gathered it again."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(input, layer.weight.to(input.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.weight.to(gradient.dtype), None


@contextmanager
def quantised_blocks(make: Callable[[], nn.Module], quantise: str | None, dtype: torch.dtype) -> Iterator[None]:
    """Context in which `make()` makes quantised layers in place of the linear layers of the model's blocks.

    Embeddings, norms and heads are unchanged, and so are layers that are made after the model, such as adapters. The
    layers are found on a model without data, which makes them in the same order.

    Args:
        make: makes a model; is called once on the meta device, before the context begins.
        quantise: a name in `FORMATS`; None: nothing is quantised.
        dtype: of the computed weights.
    """
    if quantise is None:
        yield
        return
    made: list[nn.Linear] = []
    with torch.device("meta"), _on_registration(made.append):
        in_blocks = {id(linear) for _, linear in linear_layers(make())}
    chosen = iter([id(linear) in in_blocks for linear in made])

    def replace(linear: nn.Linear) -> nn.Module | None:
        return QuantisedLinear(linear, FORMATS[quantise], dtype) if next(chosen, False) else None

    with _on_registration(replace):
        yield


@contextmanager
def _on_registration(call: Callable[[nn.Linear], nn.Module | None]) -> Iterator[None]:
    """Context in which each plain linear layer is given to `call` as a module takes it, and replaced by its result."""

    def hook(_: nn.Module, __: str, child: nn.Module | None) -> Any:
        return call(child) if type(child) is nn.Linear else None

    handle = register_module_module_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def packed_layers(model: nn.Module) -> Mapping[str, QuantisedLinear]:
    """The quantised layers of a model, by the name of their weight in the unquantised model."""
    return {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, QuantisedLinear)}


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """`state_dict` with the model's own tensors by their names in the unquantised model; some are packed."""
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    for name, layer in packed_layers(model).items():
        del state[f"{name.removesuffix('.weight')}.packed"]
        state[name] = layer.packed
    return state


def dense_elements(model: nn.Module) -> int:
    """The number of a model's weights, not of their bytes where they are packed."""
    layers = packed_layers(model).values()
    packed = sum(layer.packed.numel() for layer in layers)
    return sum(each.numel() for each in model.parameters()) - packed + sum(prod(layer.shape) for layer in layers)


def round_weights(model: PreTrainedModel, quantise: str) -> None:
    """Sets the weights of an unquantised model to the values that a quantised one computes with, in place."""
    number_format = FORMATS[quantise]
    for _, linear in linear_layers(model):
        weight = linear.weight.data
        weight.copy_(
            number_format.unpack(number_format.pack(weight), (linear.out_features, linear.in_features), weight.dtype)
        )
