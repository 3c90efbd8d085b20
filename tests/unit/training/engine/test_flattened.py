"""Gradients that follow each other in memory become one tensor without a copy; others are copied."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.engine.engine import _flattened

BUFFER = torch.arange(12.0)


def test_parts_of_one_buffer_in_order_are_a_view_of_it() -> None:
    flat = _flattened([BUFFER[2:5], BUFFER[5:6], BUFFER[6:12].view(2, 3)])
    assert flat.tolist() == [float(each) for each in range(2, 12)]
    assert flat.data_ptr() == BUFFER[2:].data_ptr()


@pytest.mark.parametrize(
    "parts",
    [
        [BUFFER[0:2], BUFFER[3:5]],
        [BUFFER[5:6], BUFFER[2:5]],
        [BUFFER[0:2], BUFFER.clone()[2:5]],
        [BUFFER.view(3, 4).T, BUFFER[12:]],
    ],
    ids=["gap", "order", "another buffer", "transposed"],
)
def test_other_tensors_are_copied(parts: list[Tensor]) -> None:
    flat = _flattened(parts)
    assert torch.equal(flat, torch.cat([part.flatten() for part in parts]))
    assert flat.untyped_storage().data_ptr() != BUFFER.untyped_storage().data_ptr()
