"""`crosslift export --push-to-hub` to a fake hub: it holds the export's very bytes, or nothing was changed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fake_hub import Hub, serving
from huggingface_hub import constants
from safetensors.torch import save_file

import crosslift
from modeling.export_info import EXPORT_FILE, FORMAT

CARD = "---\nlanguage:\n- en\n- sw\nlibrary_name: transformers\n---\n\n# A model\n"
SECRET = "hf_verysecretvalue"
NOWHERE = "http://127.0.0.1:9"


class Result(NamedTuple):
    """Exit status and output of a command."""

    status: int
    out: str
    err: str


Push = Callable[..., Result]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with serving(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """An export with two shards of weights and a file in a folder."""
    folder = tmp_path / "model"
    (folder / "adapter").mkdir(parents=True)
    for number in (1, 2):
        save_file({f"w{number}": torch.full((64,), float(number))}, folder / f"model-0000{number}-of-00002.safetensors")
    (folder / "README.md").write_text(CARD)
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "tiny/llama"}))
    write_info(folder)
    return folder


def write_info(folder: Path, passed: bool = True) -> None:
    info = {"format": FORMAT, "objective": "sft", "languages": ["en", "sw"], "check": {"passed": passed}}
    (folder / EXPORT_FILE).write_text(json.dumps(info))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def push(hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Push:
    """`crosslift export ARGUMENTS` in this process: its status and output. LFS, as the fake hub has no Xet storage."""

    def call(*arguments: object, token: str = "hf_right", offline: bool = False, address: str = hub.address) -> Result:
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token here"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(sys, "argv", ["crosslift", "export", *map(str, arguments)])
        capsys.readouterr()
        status: Any = 0
        try:
            crosslift.main()
        except SystemExit as end:
            status = end.code
        return Result(status, *capsys.readouterr())

    return call


def test_the_repository_holds_the_bytes_of_the_export(hub: Hub, export: Path, push: Push) -> None:
    before = contents(export)
    done = push(export, "--push-to-hub", "me/new", "--private")
    assert (done.status, done.err) == (0, ""), done.err
    assert done.out.splitlines() == [str(export), f"{hub.address}/me/new"]
    assert contents(hub.root / "models" / "me" / "new") == contents(export) == before
    assert "me/new" in hub.private
    assert len(hub.stored) == 2, "weights are sent as LFS files"


def test_another_push_replaces_the_weights_and_keeps_other_files(hub: Hub, export: Path, push: Push) -> None:
    """The shards of an earlier export would otherwise be opened with the new ones."""
    there = hub.root / "models" / "me" / "old"
    there.mkdir(parents=True)
    for name in ("model.safetensors", "model.safetensors.index.json", "figure.png", "README.md"):
        (there / name).write_bytes(b"earlier")
    done = push(export, "--push-to-hub", "me/old")
    assert done.status == 0, done.err
    assert contents(there) == contents(export) | {"figure.png": b"earlier"}


def test_a_branch_is_made_and_the_main_one_stays(hub: Hub, export: Path, push: Push) -> None:
    (hub.root / "models" / "me" / "branched").mkdir(parents=True)
    run = export.parent  # a run's folder stands for its export
    done = push(run, "--push-to-hub", "me/branched", "--revision", "step-200")
    assert done.status == 0, done.err
    assert done.out.splitlines()[1] == f"{hub.address}/me/branched/tree/step-200"
    assert contents(hub.branch("me/branched", "step-200")) == contents(export)
    assert contents(hub.root / "models" / "me" / "branched") == {}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no token", "--push-to-hub me/refused: no token; set HF_TOKEN to one that may write, or call hf auth login"),
        ("wrong token", "me/refused: not allowed (401): set HF_TOKEN to a token that may write to it; the export is"),
        ("not its owner", "me/refused: not allowed (403): set HF_TOKEN to a token that may write to it"),
        ("weights fail", "me/refused: the hub answered 413 (refused); the export is kept, and `crosslift export "),
        ("commit fails", "me/refused: not allowed (403)"),
        ("no network", "me/refused: http://127.0.0.1:9 cannot be reached"),
        ("offline", "me/refused: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it"),
        ("name", "--push-to-hub no/such/name: not a repository's name; give OWNER/NAME"),
        ("owner", "--push-to-hub model: not a repository's name; give OWNER/NAME"),
        ("metadata", "me/refused: Invalid metadata in README.md. - ['EN']; the export is kept"),
        ("public", "me/public: exists and is public; change that on its page, or drop --private"),
        ("failed check", "this export did not pass its check, so it is not uploaded"),
        ("no export", "no export here; --output DIR makes one of a checkpoint or of a run"),
    ],
)
def test_an_error_is_one_line_without_the_token_and_changes_nothing(
    hub: Hub, export: Path, push: Push, case: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = {
        "not its owner": {"repos/create": 403, "api/models/me/refused": 403}, "weights fail": {"/lfs/": 413},
        "commit fails": {"/commit/": 403},
    }  # fmt: skip
    monkeypatch.setattr(hub, "refused", refused.get(case, {}))
    if case == "public":
        (hub.root / "models" / "me" / "public").mkdir(parents=True)
    if case == "metadata":
        (export / "README.md").write_text(CARD.replace("en", "EN"))
    write_info(export, passed=case != "failed check")
    before = contents(export)
    token = {"no token": "", "wrong token": SECRET, "no network": SECRET, "not its owner": SECRET}.get(case, "hf_right")
    repository = {"name": "no/such/name", "owner": "model", "public": "me/public"}.get(case, "me/refused")
    done = push(
        export / "adapter" if case == "no export" else export, "--push-to-hub", repository,
        *(["--private"] if case == "public" else []),
        token=token, offline=case == "offline", address=NOWHERE if case == "no network" else hub.address,
    )  # fmt: skip
    assert (done.status, done.err.count("\n")) == (2, 1), done.err
    assert message in done.err
    assert SECRET not in done.out + done.err
    assert contents(export) == before
    assert not contents(hub.root / "models" / repository)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--output: missing; name a new folder"),
        (("--push-to-hub", "me/a", "--bake", "sw"), "--output: missing; name a new folder"),
        (("--output", "a", "--private"), "--private: goes with --push-to-hub, which is not given"),
        (("--output", "a", "--revision", "b"), "--revision: goes with --push-to-hub, which is not given"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(
    export: Path, push: Push, arguments: tuple[str, ...], message: str
) -> None:
    done = push(export, *arguments)
    assert (done.status, done.err) == (2, f"crosslift: {message}\n")
