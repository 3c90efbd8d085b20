"""NF4 with doubly quantised scales, by bitsandbytes: the number format of QLoRA (arXiv 2305.14314, section 3).

A weight has a 4-bit code, an index into 16 fixed values, and each block of 64 weights a scale. Scales minus their mean
are 8-bit codes, with an fp32 scale for each group of 256. That is 4.13 bits a weight. Packed, in this order: codes, the
mean and the scales of groups, the codes of scales.

Weights are the same as those of `BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
bnb_4bit_use_double_quant=True)` in transformers.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from math import prod

import torch
from torch import Tensor

BLOCK, GROUP = 64, 256


class NF4:
    """A `WeightFormat`. Quantised on a GPU if there is one."""

    needs_gpu = True

    def missing(self) -> str | None:
        if importlib.util.find_spec("bitsandbytes") is None:
            return "bitsandbytes, which is not installed: pip install 'crosslift[qlora]'"
        return None

    def packed_bytes(self, shape: tuple[int, int]) -> int:
        return sum(_sizes(shape))

    def pack(self, weight: Tensor) -> Tensor:
        from bitsandbytes.functional import quantize_4bit

        device = "cuda" if torch.cuda.is_available() else "cpu"
        codes, state = quantize_4bit(
            weight.to(device).contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        scales = torch.cat([state.offset.reshape(1), state.state2.absmax])
        return torch.cat([codes.flatten(), scales.view(torch.uint8), state.absmax])

    def unpack(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        codes, scale_bytes, scale_codes = packed.split(_sizes(shape))
        mean, groups = scale_bytes.clone().view(torch.float32).tensor_split([1])  # a clone, as a view needs alignment
        outer = QuantState(absmax=groups, code=_scale_values(packed.device), blocksize=GROUP, dtype=torch.float32)
        state = QuantState(
            absmax=scale_codes, shape=torch.Size(shape), blocksize=BLOCK, quant_type="nf4", dtype=dtype, offset=mean,
            state2=outer,
        )  # fmt: skip
        weight: Tensor = dequantize_4bit(codes.view(-1, 1), state, quant_type="nf4")
        return weight


def _sizes(shape: tuple[int, int]) -> list[int]:
    """Bytes of codes, of the mean and the groups' scales, and of the codes of scales."""
    elements = prod(shape)
    blocks = -(-elements // BLOCK)
    return [-(-elements // 2), 4 * (1 + -(-blocks // GROUP)), blocks]


@cache
def _scale_values(device: torch.device) -> Tensor:
    """The 256 values that the codes of scales stand for."""
    from bitsandbytes.functional import create_dynamic_map

    values: Tensor = create_dynamic_map().to(device)
    return values
