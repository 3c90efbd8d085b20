"""export_check.py: an export passes only if its weights and logits are those of the run, in its number format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedModel

from data_pipeline.text.tokenizer import TokenizerTrainingConfig, train_tokenizer
from modeling.export_info import ExportInfo
from training.checkpoints import checkpoint, export
from training.checkpoints.export import export_checkpoint
from training.checkpoints.run_state import RunState
from training.engine import state as engine_state
from training.engine.start_checks import reference_inputs, reference_logits
from training.errors import ExportCheckFailed
from training.run_file import resolved, validate

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
VOCABULARY = 300
IDS = (torch.arange(16) * 7919 % VOCABULARY)[None]
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(
        ["3 and 4 is 7", "one two three four five six"], folder, TokenizerTrainingConfig(vocab_size=VOCABULARY)
    )
    return folder


def gemma(precision: str, attention: str = "sdpa") -> PreTrainedModel:
    """Like Gemma 3: in bf16, eager attention is far from sdpa, because it rounds large scores."""
    torch.manual_seed(1)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, sliding_window=8, initializer_range=0.2, query_pre_attn_scalar=16,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(
        config, dtype=DTYPES[precision], attn_implementation=attention if attention != "flash_attention_2" else "eager"
    )
    for name, parameter in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            parameter.data.fill_(2.0)
    return model.eval()  # type: ignore[no-any-return]


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return reference_logits(model(**reference_inputs(IDS)))


@pytest.fixture
def make(
    tmp_path: Path, tokenizer: Path, tiny_run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> Make:
    """`make(precision)`: a complete checkpoint of the model above, as a run with that attention saves it."""

    def make(precision: str = "bf16", attention: str = "sdpa", change: float = 1.0, recorded: bool = True) -> Path:
        from modeling.weights.untrusted import read_tokenizer

        run = tiny_run(tmp_path / "run", objective={"name": "sft"}, precision=precision)
        model = gemma(precision, attention)
        weights = {name: tensor.float() for name, tensor in model.named_parameters()}
        monkeypatch.setattr(engine_state, "consolidated", lambda *_: iter(weights.items()))
        folder = checkpoint.begin(tmp_path / "run", 12)
        model.config.save_pretrained(folder / "model_config")
        read_tokenizer(tokenizer).save_pretrained(folder / "model_config")
        save_file(
            {"input_ids": IDS, "logits": logits_of(model) * change},
            folder / checkpoint.REFERENCE_FILE,
            metadata={"attention": attention, "dtype": precision, "device": "cpu"} if recorded else None,
        )
        RunState(step=12, world_size=1, fingerprint={}, config=resolved(validate(run, "run")), versions={}).write(
            folder
        )
        return checkpoint.commit(tmp_path / "run", 12, {})

    return make


def checked(output: Path) -> dict[str, Any]:
    check = ExportInfo.read(output).check
    assert check is not None
    return check


def refused(folder: Path, output: Path) -> str:
    """The reason why the check failed, as raised and as recorded in the export, which is kept."""
    with pytest.raises(ExportCheckFailed) as raised:
        export_checkpoint(folder, output)
    problem = checked(output)["problem"]
    assert ExportInfo.read(output).check_failed
    assert str(raised.value) == f"{output}: the export is kept, but its check failed: {problem}"
    assert load_file(output / "model.safetensors")
    return str(problem)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bf16_is_reopened_with_the_attention_of_the_run(make: Make, tmp_path: Path, attention: str) -> None:
    one, other = (logits_of(gemma("bf16", name)) for name in ("sdpa", "eager"))
    assert float((one - other).abs().max() / one.abs().max()) > 5e-2, "the two differ by more than rounding"
    check = checked(export_checkpoint(make("bf16", attention), tmp_path / "model"))
    assert (check["passed"], check["attention"], check["difference"]) == (True, attention, 0.0)


def test_an_unavailable_attention_is_replaced_by_sdpa_and_bounded_by_bf16_noise(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The reference logits are eager's, which differ from sdpa's as much as another correct kernel's can."""
    check = checked(export_checkpoint(make("bf16", "flash_attention_2"), tmp_path / "model"))
    assert "the run's attention, flash_attention_2, does not run on a CPU: the export is reopened with sdpa" in (
        caplog.messages
    )
    assert check["passed"]
    assert check["attention"] == "sdpa"
    assert 5e-2 < check["difference"] <= check["bound"] == pytest.approx(4 * check["noise"])


def test_a_checkpoint_that_does_not_name_its_attention_is_reopened_with_sdpa(make: Make, tmp_path: Path) -> None:
    check = checked(export_checkpoint(make("bf16", "sdpa", recorded=False), tmp_path / "model"))
    assert (check["attention"], check["difference"]) == ("sdpa", 0.0)


@pytest.mark.parametrize(("precision", "change"), [("bf16", 1.9), ("fp32", 1.0003)])
def test_logits_that_differ_from_the_runs_are_found(make: Make, tmp_path: Path, precision: str, change: float) -> None:
    problem = refused(make(precision, change=change), tmp_path / "model")
    assert "reopened with sdpa attention, its logits differ from the run's by" in problem


def test_fp32_has_a_tight_bound(make: Make, tmp_path: Path) -> None:
    check = checked(export_checkpoint(make("fp32"), tmp_path / "model"))
    assert (check["bound"], check["noise"]) == (1e-4, None)
    assert check["difference"] < 1e-6


def changed_after_writing(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]) -> None:
    real = export._write

    def write(*arguments: Any) -> None:
        real(*arguments)
        change(arguments[-1])

    monkeypatch.setattr(export, "_write", write)


def flip_one_bit(output: Path) -> None:
    """Flip the lowest bit of one weight, which changes the logits too little to be noticed."""
    weights = load_file(output / "model.safetensors")
    with safe_open(output / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    weights["model.layers.3.mlp.up_proj.weight"].view(torch.int16)[5, 7] ^= 1
    save_file(weights, output / "model.safetensors", metadata=metadata)


def test_one_flipped_bit_of_one_weight_is_found(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed_after_writing(monkeypatch, flip_one_bit)
    problem = refused(make(), tmp_path / "model")
    assert problem == "model.layers.3.mlp.up_proj.weight differs from the checkpoint's"


def test_the_command_ends_with_status_3_if_the_kept_export_failed_its_check(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import crosslift

    changed_after_writing(monkeypatch, flip_one_bit)
    monkeypatch.setattr("sys.argv", ["crosslift", "export", str(make()), "--output", str(tmp_path / "model")])
    with pytest.raises(SystemExit) as ended:
        crosslift.main()
    assert ended.value.code == 3
    assert capsys.readouterr().err.endswith(
        f"crosslift: {tmp_path / 'model'}: the export is kept, but its check failed: "
        "model.layers.3.mlp.up_proj.weight differs from the checkpoint's\n"
    )


def change_rope_theta(output: Path) -> None:
    file = output / "config.json"
    text = file.read_text()
    assert '"rope_theta": 1000000.0' in text
    file.write_text(text.replace('"rope_theta": 1000000.0', '"rope_theta": 10.0').replace("10000.0", "10.0"))


def test_a_changed_rope_theta_is_found_by_the_logits(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed_after_writing(monkeypatch, change_rope_theta)
    assert "4 times what bf16 changes in this model" in refused(make(), tmp_path / "model")


def test_an_export_that_cannot_be_reopened_is_kept_and_marked(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed_after_writing(monkeypatch, lambda output: (output / "config.json").write_text('{"model_type": "none"}'))
    assert refused(make(), tmp_path / "model").startswith("it cannot be reopened: ModelError: ")


def test_weights_that_are_not_finite_are_named(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make()
    weights = dict(engine_state.consolidated(folder))
    weights["model.norm.weight"][3] = torch.nan
    monkeypatch.setattr(engine_state, "consolidated", lambda *_: iter(weights.items()))
    assert refused(folder, tmp_path / "model") == (
        "model.norm.weight holds values that are not finite, in the checkpoint too"
    )
