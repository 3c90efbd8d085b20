"""X-Mixup's state file is loaded exactly as it was saved, or refused in one line."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modeling.errors import ModelError
from modeling.xmixup.mixup_state import MixupState, is_mixup_weight

STATE = MixupState(3, 0.4, "authors", "learned", w=1.0123456789012345, b=-3e-9, model_hash="abc")


def test_a_loaded_file_equals_what_was_saved_bit_for_bit(tmp_path: Path) -> None:
    for state in (STATE, MixupState(0, ratio=0.3), MixupState(1, ratio=1)):
        state.save(tmp_path / "state.safetensors")
        assert MixupState.load(tmp_path / "state.safetensors") == state
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """As versions before the shared format wrote it, written out in full."""
    tensors = {"b": torch.tensor([STATE.b], dtype=torch.float64), "w": torch.tensor([STATE.w], dtype=torch.float64)}
    header = json.dumps({"layer": 3, "lam0": 0.4, "entropy": "authors", "ratio": "learned", "model_hash": "abc"})
    content = hashlib.sha256(header.encode())
    for tensor in tensors.values():
        content.update(tensor.numpy().tobytes())
    metadata = {"format": "crosslift x-mixup 1", "about": header, "sha256": content.hexdigest()}
    save_file(tensors, tmp_path / "old.safetensors", metadata)
    assert MixupState.load(tmp_path / "old.safetensors") == STATE


def test_truncated_and_changed_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    STATE.save(path)
    good = path.read_bytes()
    damaged = [good[:cut] for cut in (0, 5, len(good) // 2, len(good) - 1)]
    damaged += [good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :] for at in range(len(good))]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ModelError) as caught:
            MixupState.load(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_files_of_another_format_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1), "b": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="its format is None"):
        MixupState.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(ModelError, match="is not finite"):
        MixupState(1, w=value)
    with pytest.raises(ModelError, match="is not finite"):
        MixupState(1, b=value)
    with pytest.raises(ModelError, match="lam0 nan"):
        MixupState(1, lam0=float("nan"))


def test_mixup_weights_are_recognised_by_their_names() -> None:
    own = "base_model.model.roberta.encoder.layer.3.mixup_ratio.w"
    assert [is_mixup_weight(name) for name in (own, "classifier.weight", "my_mixup_ratio_w")] == [True, False, False]
