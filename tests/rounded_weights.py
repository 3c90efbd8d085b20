"""A quantised number format that runs on any CPU, in place of bitsandbytes' NF4: integers from -7 to 7, a scale a row.

It is coarse, so that a quantised weight differs clearly from the one it was computed from.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 7


class RoundedWeights:
    """A `modeling.quantisation.linear.WeightFormat`: a byte for each code, then the scales in fp32."""

    needs_gpu = False

    def missing(self) -> str | None:
        return None

    def packed_bytes(self, shape: tuple[int, int]) -> int:
        return shape[0] * shape[1] + 4 * shape[0]

    def pack(self, weight: Tensor) -> Tensor:
        scales = weight.float().abs().amax(dim=1) / LEVELS
        codes = (weight.float() / scales[:, None]).round().to(torch.int8)
        return torch.cat([codes.flatten().view(torch.uint8), scales.view(torch.uint8)])

    def unpack(self, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        codes, scales = packed.split([shape[0] * shape[1], 4 * shape[0]])
        return (codes.view(torch.int8).reshape(shape) * scales.clone().view(torch.float32)[:, None]).to(dtype)
