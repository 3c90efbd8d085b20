"""transformers_internals.py: flash-attn's packed path reads the positions of a batch once, with the same results."""

from __future__ import annotations

import pytest
import torch
from device_reads import device_reads
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash

from modeling.transformers_internals import read_positions_once

LAYERS = 3
PACKED = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])
ALONE = torch.tensor([[0, 1, 2, 3, 4]])


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_packed_sequence", "prepare_fa_kwargs_from_position_ids"):
        monkeypatch.setattr(flash, name, getattr(flash, name))


def layers(positions: Tensor) -> list[tuple[bool, list[int], int]]:
    """What transformers' flash attention computes of the positions in each layer, in its order."""
    found = []
    states = torch.zeros(1, positions.shape[1], 2, 4)
    for _ in range(LAYERS):
        packed = flash._is_packed_sequence(positions, 1)
        *_, (starts, _), (longest, _) = flash._prepare_from_posids(states, states, states, positions)
        found.append((bool(packed), starts.tolist(), int(longest)))
    return found


@pytest.mark.parametrize("positions", [PACKED, ALONE])
def test_every_layer_gets_what_transformers_computes(positions: Tensor) -> None:
    expected = layers(positions)
    read_positions_once()
    read_positions_once()  # of a second model
    assert layers(positions) == expected
    assert expected[0] == ((True, [0, 3, 5, 9], 4) if positions is PACKED else (False, [0, 5], 5))


def test_the_positions_are_read_in_the_first_layer_alone() -> None:
    def reads(count: int) -> int:
        positions, states = PACKED.clone(), torch.zeros(1, PACKED.shape[1], 2, 4)
        with device_reads() as found:
            for _ in range(count):
                if flash._is_packed_sequence(positions, 1):
                    *_, (_, _), (longest, _) = flash._prepare_from_posids(states, states, states, positions)
                    assert int(longest) == 4
        return len(found)

    assert reads(LAYERS) == LAYERS * reads(1) > 0
    read_positions_once()
    assert reads(LAYERS) == reads(1) > 0


def test_other_or_changed_positions_are_read_again() -> None:
    read_positions_once()
    assert layers(PACKED)[0][1] == [0, 3, 5, 9]
    assert layers(ALONE)[0][1] == [0, 5]
    changed = PACKED.clone()
    layers(changed)
    changed[0, 5:] += 2
    assert layers(changed)[0] == (True, [0, 3, 9], 6)
    assert flash._is_packed_sequence(None, 1) is False
