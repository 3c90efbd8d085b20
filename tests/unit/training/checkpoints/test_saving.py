"""saving.py and engine/state.py: saved files and their hashes, write errors, DeepSpeed's globs, unsafe pickles."""

from __future__ import annotations

import glob
import os
import pickle
from collections import OrderedDict
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from training.checkpoints.saving import FileWriter
from training.engine.state import TAG, _on_host, consolidated, load_state, to_universal, weights_only


def written(root: Path, files: list[tuple[Path, object]]) -> FileWriter:
    writer = FileWriter(root, files)
    writer.wait()
    assert not writer.writing
    return writer


def test_records_have_the_size_and_hash_of_each_file(tmp_path: Path) -> None:
    states = {"zero/a.pt": {"x": torch.arange(10_000)}, "b.pt": {"y": [torch.ones(3), 2, "text"]}}
    writer = written(tmp_path, [(tmp_path / name, state) for name, state in states.items()])
    assert writer.error is None
    assert set(writer.records) == set(states)
    for name, record in writer.records.items():
        content = (tmp_path / name).read_bytes()
        assert (record.bytes, record.sha256) == (len(content), sha256(content).hexdigest())
    assert torch.equal(torch.load(tmp_path / "zero/a.pt", weights_only=True)["x"], torch.arange(10_000))


def test_deepspeed_gets_folder_names_without_glob_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On resume, on resume with other ranks, and on export; DeepSpeed is replaced by functions that list files."""
    checkpoint, output = tmp_path / "[v1] a*" / "checkpoint", tmp_path / "[v1] a*" / "universal"
    (checkpoint / TAG).mkdir(parents=True)
    (checkpoint / TAG / "a.pt").touch()

    def files(folder: str, *_: Any, **__: Any) -> list[str]:
        return [Path(name).name for name in glob.glob(f"{folder}/{TAG}/*.pt")]

    def convert(settings: Any) -> None:
        assert files(str(Path(settings.input_folder).parent)) == ["a.pt"]
        (Path(settings.output_folder) / "b.pt").touch()
        assert files(str(Path(settings.output_folder).parent)) == ["b.pt"]

    monkeypatch.setattr("deepspeed.checkpoint.ds_to_universal.main", convert)
    to_universal(checkpoint, output)
    assert (output / TAG / "b.pt").is_file()
    state = "deepspeed.utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint"
    monkeypatch.setattr(state, lambda folder, **_: {name: torch.ones(1) for name in files(folder)})
    assert [name for name, _ in consolidated(checkpoint)] == ["a.pt"]
    optimizer = SimpleNamespace(param_groups=[], optimizer=SimpleNamespace(state={}, param_groups=[]))
    engine: Any = SimpleNamespace(
        _config=SimpleNamespace(), optimizer=optimizer, module=torch.nn.Linear(1, 1),
        load_checkpoint=lambda folder, **_: (files(folder)[0], None),
    )  # fmt: skip
    load_state(engine, checkpoint, universal=False)


def test_consolidated_weights_are_in_the_requested_order_and_tied_ones_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tied, norm, other = torch.ones(1), torch.ones(2), torch.ones(3)
    parts = {"head": tied, "embed": tied, "other": other, "norm": norm}
    state = "deepspeed.utils.zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint"
    monkeypatch.setattr(state, lambda folder, **_: parts)
    (tmp_path / TAG).mkdir()
    found = list(consolidated(tmp_path, first=["norm", "embed", "absent"]))
    assert [(name, len(weight)) for name, weight in found] == [("norm", 2), ("embed", 1), ("other", 3)]


def test_a_full_disk_is_reported_and_not_raised(tmp_path: Path) -> None:
    (tmp_path / "a.pt").symlink_to("/dev/full")
    writer = written(tmp_path, [(tmp_path / "a.pt", torch.ones(1_000_000)), (tmp_path / "b.pt", 1)])
    assert writer.error is not None
    assert "No space left on device" in writer.error
    assert writer.records == {}
    assert not (tmp_path / "b.pt").exists()


def test_a_file_in_place_of_a_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "zero").write_text("in the way")
    writer = written(tmp_path, [(tmp_path / "zero" / "a.pt", 1)])
    assert "zero" in str(writer.error)


def test_copies_share_no_memory_and_store_only_their_own_elements() -> None:
    base = torch.arange(1000.0)
    state = OrderedDict(a=base[10:20], b=[base, {"shape": torch.Size([2, 3])}], c=("text", None, 1.5))
    copy = _on_host(state, copy=True)
    base.zero_()
    assert type(copy) is OrderedDict
    assert torch.equal(copy["a"], torch.arange(10.0, 20.0))
    assert copy["a"].untyped_storage().nbytes() == 40
    assert torch.equal(copy["b"][0], torch.arange(1000.0))
    assert copy["b"][1]["shape"].numel() == 6
    assert copy["c"] == ("text", None, 1.5)


def test_a_state_that_is_written_at_once_shares_memory_but_stores_only_its_own_elements() -> None:
    base = torch.arange(1000.0)
    shared = _on_host({"part": base[10:20], "whole": base}, copy=False)
    base.zero_()
    assert torch.equal(shared["whole"], torch.zeros(1000))
    assert torch.equal(shared["part"], torch.arange(10.0, 20.0))
    assert shared["part"].untyped_storage().nbytes() == 40


class Malicious:
    """Runs a shell command when it is unpickled; here it creates a file, the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch '{self.canary}'",))


def test_pickles_of_deepspeed_checkpoints_cannot_run_code(tmp_path: Path) -> None:
    """Although DeepSpeed passes weights_only=False; the canary shows that the pickle would run otherwise."""
    file, canary = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt", tmp_path / "canary"
    torch.save({"optimizer_state_dict": Malicious(canary)}, file)
    with weights_only(), pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(file, weights_only=False)
    assert not canary.exists()
    torch.load(file, weights_only=False)
    assert canary.exists()
