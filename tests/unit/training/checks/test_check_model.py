"""Settings that the model, its batches or DeepSpeed do not support are refused before weights are read."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import XMIXUP, run_values, write_data, write_task_data
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from data_pipeline.config import merged
from data_pipeline.loader import ThisRank
from modeling.errors import ModelError
from training import assembly
from training.assembly import assemble, assemble_data, check_contrast_sets, check_model
from training.check import check_run
from training.config import RunConfig
from training.engine.engine import deepspeed, deepspeed_settings, refusing
from training.errors import ConfigError
from training.fit import fit
from training.run_file import validate
from training.run_folder.prepare import prepare


def config_of(data: Path, tmp_path: Path, **changes: Any) -> Any:
    return validate(run_values(data, tmp_path / "run", **changes), "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"data.sequence_length": 128}, None),  # RoBERTa's positions start at 2
        (
            {"data.sequence_length": 129},
            r"^data\.sequence_length: 129 tokens, but the model has positions for 128; set",
        ),
        ({"objective": {**XMIXUP["objective"], "layer": 3}}, r"^objective\.layer: 3, but the model has layers 0 to 2"),
    ],
)
def test_an_encoders_positions_and_mixed_layer_are_checked(
    tmp_path: Path, changes: dict[str, Any], message: str | None
) -> None:
    data = write_task_data(tmp_path / "data")
    config = config_of(
        data, tmp_path, **{**XMIXUP, "tokenizer.train": {"vocab_size": 120, "style": "encoder"}, **changes}
    )
    settings = dict(config.model.init)
    with torch.device("meta"):
        model = AutoModelForTokenClassification.from_config(AutoConfig.for_model(**settings, pad_token_id=1))
    if message is None:
        check_model(config.data, config.objective, model)
        return
    with pytest.raises(ConfigError, match=message):
        check_model(config.data, config.objective, model)
    with pytest.raises(ConfigError, match=message):
        list(check_run(config))


def test_a_decoder_with_rotary_positions_may_exceed_its_max_position_embeddings(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    config = config_of(data, tmp_path, **{"data.sequence_length": 384})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.model.init))
    check_model(config.data, config.objective, model)
    missing_layer = config.objective.model_copy(update={"layers": (1, 3)})
    with pytest.raises(ConfigError, match=r"^objective\.layers: \[1, 3\], but the model has 2 layers"):
        check_model(config.data, missing_layer, model)


LONGCAT = {
    "model_type": "longcat_flash", "hidden_size": 32, "intermediate_size": 64, "num_layers": 2,
    "num_attention_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "head_dim": 8, "v_head_dim": 8, "expert_ffn_hidden_size": 16, "n_routed_experts": 4, "zero_expert_num": 2,
    "moe_topk": 2,
}  # fmt: skip


def test_a_model_whose_layers_are_not_found_needs_their_path(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", 20)
    with pytest.raises(
        ModelError, match=r"found none; set 'crosslift_layers' .* in LongcatFlashModel: 'layers' \(of 2\)"
    ):
        list(check_run(config_of(data, tmp_path, **{"model.init": LONGCAT})))


def test_a_model_whose_modules_depend_on_the_tokens_runs_on_one_rank_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data(tmp_path / "data", 20)
    config = config_of(data, tmp_path, **{"model.init": {**LONGCAT, "crosslift_layers": "layers"}})
    assert list(check_run(config, gpus_per_node=0, nproc_per_node=1))[-1] == "ready to train"
    refused = r"LongcatFlashForCausalLM: the modules that run depend on the tokens .* so 2 ranks would wait"
    with pytest.raises(ModelError, match=refused):
        list(check_run(config, gpus_per_node=0, nproc_per_node=2))
    monkeypatch.setattr(assembly, "this_rank", lambda: ThisRank(0, 2, 2))
    monkeypatch.setattr(assembly, "deepspeed_settings", lambda *_, **__: {})
    monkeypatch.setattr(assembly, "starting_model", None)  # is not reached
    with pytest.raises(ModelError, match=refused):
        assemble(config, prepare(config))


def test_a_deepspeed_config_error_is_one_line_before_any_file_is_written(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    typo = config_of(data, tmp_path, deepspeed={"zero_optimization": {"stag": 3}})
    for run in (lambda: list(check_run(typo)), lambda: fit(typo)):
        with pytest.raises(ConfigError, match=r"^deepspeed\.zero_optimization\.stag: .*; did you mean 'stage'\?$"):
            run()
    assert not typo.output_dir.exists()


UNKNOWN = f"unknown to DeepSpeed {deepspeed.__version__}; "


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"steps_per_prin": 5}, "steps_per_prin: " + UNKNOWN + "did you mean 'steps_per_print'?"),
        ({"zero_optimisation": {"stage": 3}}, "zero_optimisation: " + UNKNOWN + "did you mean 'zero_optimization'?"),
        ({"flops_profiler": {"enable": True}}, "flops_profiler.enable: " + UNKNOWN + "did you mean 'enabled'?"),
        ({"comms_logger": {"verbos": True}}, "comms_logger.verbos: " + UNKNOWN + "did you mean 'verbose'?"),
        ({"zero_optimization": {"offload_param": {"devic": "cpu"}}},
         "zero_optimization.offload_param.devic: " + UNKNOWN + "did you mean 'device'?"),
        ({"seed": 3}, "seed: " + UNKNOWN + "see deepspeed.ai/docs/config-json"),
        ({"zero_optimization": {"reduce_bucket_size": -1}},
         "zero_optimization.reduce_bucket_size: Input should be greater than 0 (found -1)"),
        ({"zero_optimization": {"offload_optimizer": {"device": "gpu"}}},
         "zero_optimization.offload_optimizer.device: Input should be 'none', 'cpu' or 'nvme' (found 'gpu')"),
        ({"zero_optimization": 3}, "zero_optimization: must be a section of keys (found 3)"),
        ({"wall_clock_breakdown": "maybe"}, "wall_clock_breakdown: must be true or false (found 'maybe')"),
        ({"steps_per_print": "often"}, "steps_per_print: must be a number (found 'often')"),
        ({"gradient_predivide_factor": True}, "gradient_predivide_factor: must be a number (found True)"),
    ],
)  # fmt: skip
def test_an_invalid_raw_deepspeed_setting_is_named(tmp_path: Path, settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(f'deepspeed.{line}')}$"):
        deepspeed_settings(config_of(tmp_path, tmp_path, deepspeed=settings), 1)


@pytest.mark.parametrize(
    "settings",
    [{"flops_profiler": True}, {"log_level": "loud"}, {"sparse_attention": {"mode": "fixed"}}, {"aio": 3}],
)
def test_a_setting_that_deepspeed_cannot_parse_is_a_one_line_error(tmp_path: Path, settings: dict[str, Any]) -> None:
    (key,) = settings
    with pytest.raises(ConfigError, match=rf"^deepspeed\.{key}: refused by DeepSpeed [\d.]+: [^\n]+$"):
        deepspeed_settings(config_of(tmp_path, tmp_path, deepspeed=settings), 1)


VALID_SETTINGS: list[dict[str, Any]] = [
    {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 5e7, "allgather_partitions": True,
                           "stage3_prefetch_bucket_size": 5e7, "stage3_max_live_parameters": 1e9,
                           "stage3_gather_16bit_weights_on_model_save": True, "round_robin_gradients": True}},
    {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/local", "buffer_count": 5},
                           "offload_param": {"device": "cpu", "pin_memory": True}},
     "aio": {"block_size": 262144, "queue_depth": 32, "single_submit": False, "overlap_events": True}},
    {"comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False}},
    {"flops_profiler": {"enabled": True, "profile_step": 1, "module_depth": -1, "output_file": "flops.txt"}},
    {"wall_clock_breakdown": True, "memory_breakdown": False, "dump_state": False, "steps_per_print": 100},
    {"tensorboard": {"enabled": True, "output_path": "logs", "job_name": "run"}, "log_level": "info"},
    {"prescale_gradients": True, "gradient_predivide_factor": 2, "zero_force_ds_cpu_optimizer": False},
    {"fp16": {"enabled": False}, "optimizer": {"params": {"torch_adam": False}}, "gradient_clipping": 1.0},
]  # fmt: skip


@pytest.mark.parametrize("settings", VALID_SETTINGS)
def test_valid_raw_deepspeed_settings_are_passed_on(tmp_path: Path, settings: dict[str, Any]) -> None:
    found = deepspeed_settings(config_of(tmp_path, tmp_path, deepspeed=settings), 1)
    assert found == merged(found, settings)


OFFLOADED = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
TORCHS = {"torch_adam": True, "fused": True}


@pytest.mark.parametrize(
    ("name", "raw", "on_gpu", "expected"),
    [
        ("adamw", {}, False, TORCHS),
        ("adamw", {}, True, TORCHS),
        ("adam", {}, True, {"torch_adam": True, "fused": True, "adam_w_mode": False}),
        ("radam", {}, True, {"torch_adam": None, "fused": None}),
        ("adamw", {"optimizer": {"params": {"fused": False}}}, True, {"torch_adam": True, "fused": False}),
        ("adamw", {"optimizer": {"params": {"torch_adam": False}}}, True, {"torch_adam": False, "fused": None}),
        ("adamw", OFFLOADED, True, {"torch_adam": False, "fused": None}),  # DeepSpeed's CPU Adam
        ("adamw", OFFLOADED, False, {"torch_adam": False, "fused": None}),
        ("radam", OFFLOADED, False, {"torch_adam": None, "fused": None}),
        ("adamw", {**OFFLOADED, "optimizer": {"params": {"torch_adam": True}}}, True, TORCHS),
    ],
)
def test_the_fastest_adam_is_chosen_unless_one_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    raw: dict[str, Any],
    on_gpu: bool,
    expected: dict[str, Any],
) -> None:
    """torch's fused one, and DeepSpeed's CPU Adam (here as if it were compiled) for an offloaded optimizer."""
    monkeypatch.setattr("training.engine.engine.build_op", lambda _: Path("op.so"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: on_gpu)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    config = config_of(tmp_path, tmp_path, deepspeed=raw, **{"optimizer.name": name})
    params = deepspeed_settings(config, 1, in_run=True)["optimizer"]["params"]
    assert {key: params.get(key) for key in expected} == expected
    optimizer = {key: params[key] for key in ("fused", "betas", "eps", "weight_decay", "lr") if key in params}
    getattr(torch.optim, {"adam": "Adam", "radam": "RAdam"}.get(name, "AdamW"))([torch.ones(2)], **optimizer)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("noise\n x.cpp:3: error: no\n  such header\nmore"),
            "cpu_adam cannot be built: x.cpp:3: error: no",
        ),
        (ValueError("ninja is required"), "cpu_adam cannot be built: ninja is required"),
        (None, "{lock} shows another build of cpu_adam, which was killed or is slow: remove the file if it was"),
    ],
)
def test_without_a_cpu_adam_an_offloaded_optimizer_is_torchs_and_the_log_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Any, reason: str
) -> None:
    caplog.set_level(logging.INFO)
    lock = tmp_path / "cpu_adam" / "lock"

    def build(name: str) -> Path:
        raise error

    if error is None:
        lock.parent.mkdir()
        lock.touch()
        os.utime(lock, (0, time.time() - 301))  # younger ones are waited for
    monkeypatch.setattr("training.engine.engine.build_op", build)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    config = config_of(tmp_path, tmp_path, deepspeed=OFFLOADED)
    assert deepspeed_settings(config, 1, in_run=True)["optimizer"]["params"]["torch_adam"] is True
    (line,) = [message for message in caplog.messages if message.startswith("offloaded optimizer: ")]
    assert line.startswith(f"offloaded optimizer: torch's, as {reason.format(lock=lock)}")
    assert line.endswith("(crosslift prefetch --build-ops compiles it before the job)")


def test_another_build_of_the_op_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    built: list[str] = []

    def build(name: str) -> Path:
        assert not lock.exists()
        built.append(name)
        return tmp_path

    monkeypatch.setattr("training.engine.ops.time.sleep", lambda _: lock.unlink())
    monkeypatch.setattr("training.engine.engine.build_op", build)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    config = config_of(tmp_path, tmp_path, deepspeed=OFFLOADED)
    assert deepspeed_settings(config, 1, in_run=True)["optimizer"]["params"]["torch_adam"] is False
    assert built == ["cpu_adam"]


def test_a_first_look_at_the_settings_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.engine.engine.build_op", lambda name: pytest.fail(f"compiles {name}"))
    params = deepspeed_settings(config_of(tmp_path, tmp_path, deepspeed=OFFLOADED), 1)["optimizer"]["params"]
    assert params["torch_adam"] is True


def test_errors_of_the_engine_are_one_line_if_raw_settings_are_given() -> None:
    with (
        pytest.raises(ConfigError, match=r"^deepspeed: refused by DeepSpeed: ValueError: no such op$"),
        refusing({"aio": {"queue_depth": 8}}),
    ):
        raise ValueError("no such\nop")
    with pytest.raises(ValueError, match="a bug"), refusing({}):
        raise ValueError("a bug")


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_contrast_set_above_the_micro_batch_is_refused_with_both_sizes(tmp_path: Path, layout: str) -> None:
    """Padding counts: rows of texts of unequal length exceed the budget before their tokens do."""
    folder = write_data(tmp_path / "data")
    for file in folder.glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for row in rows[::4]:
            row["question"] += " 7" * 40
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    changes = {"data.layout": layout, "data.sequence_length": 160, "data.slots_per_step": 16, "max_steps": 8}
    changes |= {"data.mixture": {"strategy": "explicit", "weights": {"en": 3, "de": 1, "sw": 1, "zh": 1}}}
    changes |= {"objective.contrastive": {"weight": 0.5, "scale": 10.0, "set_size": 4}}
    needed = largest_set(config_of(folder, tmp_path, **changes, **{"data.micro_batch_tokens": 10**6}))
    check_sets(config_of(folder, tmp_path, **changes, **{"data.micro_batch_tokens": needed}), ranks=1)
    too_small = config_of(folder, tmp_path, **changes, **{"data.micro_batch_tokens": needed - 1})
    with pytest.raises(ConfigError) as refusal:
        check_sets(too_small, ranks=1)
    assert str(refusal.value).startswith(
        f"data.micro_batch_tokens: {needed - 1}, but a contrast set takes about {needed} tokens {layout} (a step's"
    )
    check_sets(too_small, ranks=4)
    with pytest.raises(ConfigError, match=f" tokens {layout} on one of 4 ranks ") as on_ranks:
        check_sets(config_of(folder, tmp_path, **changes, **{"data.micro_batch_tokens": 160}), ranks=4)
    (named,) = re.findall(r"set data.micro_batch_tokens to (\d+) or more", str(on_ranks.value))
    assert 160 < int(named) < needed
    with pytest.raises(ConfigError, match=rf"takes about {named} tokens"):
        check_sets(config_of(folder, tmp_path, **changes, **{"data.micro_batch_tokens": int(named) - 1}), ranks=4)
    check_sets(config_of(folder, tmp_path, **changes, **{"data.micro_batch_tokens": int(named)}), ranks=4)


def check_sets(config: RunConfig, ranks: int) -> None:
    data = assemble_data(config, prepare(config))
    check_contrast_sets(config, data.planner, data.packer.grid, ranks, ranks)


def largest_set(config: RunConfig) -> int:
    """The budget of the run's largest contrast set alone: rows x longest sample padded, whole rows packed."""
    data = assemble_data(config, prepare(config))
    sizes = []
    for step in range(config.max_steps):
        plan = data.planner.step(step)
        for pairs in plan.sets:
            lengths = [round(cost) for cost in plan.costs[pairs.ravel()].tolist()]
            assert max(lengths) <= config.data.sequence_length
            rows: list[int] = []  # tokens in each: best fit, longest first
            for length in sorted(lengths, reverse=True):
                room = config.data.sequence_length - length if data.packer.layout == "packed" else -1
                if free := [n for n in rows if n <= room]:
                    rows[rows.index(max(free))] += length
                else:
                    rows.append(length)
            sizes.append(len(rows) * (config.data.sequence_length if data.packer.layout == "packed" else max(rows)))
    return max(sizes)


def test_an_overlong_sample_does_not_count_toward_the_size_of_its_set(tmp_path: Path) -> None:
    """The reader drops it, so the run is not refused for its length."""
    folder = write_data(tmp_path / "data")
    rows = [json.loads(line) for line in (folder / "sw.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows[::2]:
        row["question"] += " 7" * 400
    (folder / "sw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    changes = {"data.layout": "padded", "data.sequence_length": 400, "data.micro_batch_tokens": 600}
    config = config_of(folder, tmp_path, **changes)
    data = assemble_data(config, prepare(config))
    assert max(data.planner.step(step).costs.max() for step in range(12)) > 400
    check_sets(config, ranks=1)


def test_another_tokenizer_changes_the_fingerprint(tmp_path: Path) -> None:
    config = config_of(write_data(tmp_path / "data"), tmp_path)
    prepared = prepare(config)
    before = assemble_data(config, prepared).fingerprint
    assert assemble_data(config, prepare(config)).fingerprint == before
    file = Path(prepared.tokenizer_dir) / "tokenizer.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    values["model"]["vocab"] |= {
        "Anna": 6,
        next(token for token, id in values["model"]["vocab"].items() if id == 6): 399,
    }
    file.write_text(json.dumps(values), encoding="utf-8")
    after = assemble_data(config, prepare(config)).fingerprint
    assert {name for name in before if before[name] != after[name]} == {"tokenizer"}


def test_a_language_without_a_sample_that_fits_is_named(tmp_path: Path) -> None:
    config = config_of(write_data(tmp_path / "data"), tmp_path, **{"data.sequence_length": 8})
    with pytest.raises(ConfigError, match=r"^data\.sequence_length: 8 tokens hold none of the 32 samples .* 'en'"):
        list(check_run(config))
