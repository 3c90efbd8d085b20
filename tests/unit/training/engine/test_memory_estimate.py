"""The parts of the memory estimate, and what `check` reports of it; no rank is started.

`tests/distributed/test_memory.py` compares the estimate with the engine's buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from steps import load_on_ranks
from tiny_run import XMIXUP, PreparedRun, run_values, write_data, write_task_data
from transformers import AutoModelForCausalLM, LlamaConfig

from modeling.quantisation.linear import dense_elements, quantised_blocks
from training.assembly import assemble_data
from training.check import check_run, largest_batch
from training.config import LoraSettings, RunConfig
from training.engine.memory import ALLOWANCE, GIB, ZERO_DEFAULTS, Activations, Ranks, memory_estimate, memory_savings
from training.engine.settings import REDUCE_BUCKET
from training.errors import ConfigError
from training.run_file import validate
from training.run_folder.prepare import prepare

NOTHING = Activations((), 0, 0, 0, 0, counted=True)
LARGE = Activations((4 * GIB,) * 8, GIB, GIB // 8, GIB, GIB, counted=True)


def config_of(**changes: Any) -> RunConfig:
    return validate(run_values(Path("data"), Path("run"), **{"deepspeed": {}, **changes}), "test")


def eight_billion() -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False)
        )  # fmt: skip


def test_the_zero_defaults_equal_deepspeeds() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    by_alias = {field.alias or name: field.default for name, field in fields.items()}
    assert {name: by_alias[name] for name in ZERO_DEFAULTS} == ZERO_DEFAULTS


def test_eight_billion_parameters_on_eight_gpus() -> None:
    """18 bytes a parameter (bf16 weight, fp32 master, gradient, two moments) over the ranks, and one bucket."""
    model = eight_billion()
    n = sum(each.numel() for each in model.parameters())
    estimate = memory_estimate(config_of(precision="bf16"), model, NOTHING, Ranks(8, 8))
    parts = {part.name: part for part in estimate.parts}
    assert parts["weights, sharded"].gpu == 2 * n // 8
    assert parts["Adam's two moments, fp32"].gpu == n
    assert parts["bucket for reducing gradients"].gpu == 4 * REDUCE_BUCKET
    always = sum(part.gpu for part in estimate.parts if part.when == "always")
    small = 2 * sum(each.numel() for each in model.parameters() if each.numel() <= 100_000)
    assert always == 18 * n // 8 + 4 * REDUCE_BUCKET + small
    # A checkpoint is written from a copy in host memory: master weights and moments.
    assert (estimate.host_bytes, estimate.nvme_bytes) == (12 * n, 0)
    # The embedding and the head are larger than the bucket: their gradients are reduced alone, in fp32, outside it.
    embedding = 128256 * 4096
    assert parts["gradients being reduced"].gpu == (2 + 4 + 4) * embedding
    assert parts["gradient of a weight in fp64, for its norm"].gpu == 8 * embedding // 8


@pytest.mark.parametrize(("every", "background", "copied"), [(5, True, 12), (5, False, 0), (100, True, 0)])
def test_a_cpu_rank_copies_its_state_only_while_training_goes_on(every: int, background: bool, copied: int) -> None:
    """The last checkpoint is written after the last step. What a backward pass frees stays with the rank."""
    model, checkpoint = eight_billion(), {"every": every, "background": background}
    config = config_of(precision="bf16", max_steps=100, checkpoint=checkpoint)
    estimate = memory_estimate(config, model, LARGE, Ranks(2, 2, on_gpus=False))
    n = sum(each.numel() for each in model.parameters())
    always = {part.name: part.gpu for part in estimate.parts if part.when == "always"}
    assert always.get("copy of the state, for a checkpoint", 0) == copied * n // 2
    assert always["activations of a micro-batch"] == LARGE.peak(False)
    assert not [part for part in estimate.parts if part.host]


@pytest.mark.parametrize(("stage", "whole"), [(3, 0), (2, 2), (1, 2)])
def test_a_checkpoints_copy_holds_whole_weights_unless_they_are_sharded(stage: int, whole: int) -> None:
    """On one rank of the run: two nodes of 4 GPUs."""
    model = eight_billion()
    n = sum(each.numel() for each in model.parameters())
    estimate = memory_estimate(config_of(precision="bf16", zero_stage=stage), model, NOTHING, Ranks(8, 4))
    (copy,) = [part.host for part in estimate.parts if part.when == "while a checkpoint is written"]
    assert 4 * copy == 12 * n // 2 + whole * n


@pytest.mark.parametrize(
    ("device", "gpu", "host", "nvme"), [(None, 18, 12, 0), ("cpu", 2, 20 + 12, 0), ("nvme", 2, 8 + 12, 12)]
)
def test_offloaded_optimizer_states_count_as_host_memory_or_nvme(
    device: str | None, gpu: int, host: int, nvme: int
) -> None:
    """Bytes per parameter, on 4 nodes of 2 GPUs; in host memory, 12 of them are of a checkpoint's copy."""
    model = eight_billion()
    n = sum(each.numel() for each in model.parameters())
    deepspeed = {} if device is None else {"zero_optimization": {"offload_optimizer": {"device": device}}}
    config = config_of(precision="bf16", deepspeed=deepspeed)
    estimate = memory_estimate(config, model, NOTHING, Ranks(8, 2))
    sharded = ("weights, sharded", "master weights, fp32", "Adam's two moments, fp32", "gradients, fp32")
    assert sum(part.gpu for part in estimate.parts if part.name in sharded) == gpu * n // 8
    assert (estimate.host_bytes, estimate.nvme_bytes) == (host * n // 4, nvme * n // 4)


def test_the_peak_is_the_larger_of_backward_and_update() -> None:
    model = eight_billion()
    fast = {"zero_optimization": {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}}
    for kept, when, stage in ((LARGE, "in forward and backward", 3), (NOTHING, "in the update", 2)):
        config = config_of(precision="bf16", deepspeed=fast, zero_stage=stage)
        estimate = memory_estimate(config, model, kept, Ranks(2, 2))
        by_time = {
            name: sum(part.gpu for part in estimate.parts if part.when == name)
            for name in ("always", "in forward and backward", "in the update")
        }
        assert max(by_time, key=lambda name: by_time[name] * (name != "always")) == when
        assert estimate.gpu_bytes == by_time["always"] + by_time[when] + ALLOWANCE


@pytest.mark.parametrize("use_dora", [False, True])
def test_frozen_weights_have_no_optimizer_states(use_dora: bool) -> None:
    from modeling.adapters import add_adapters

    model = eight_billion()
    with torch.device("meta"):
        add_adapters(model, LoraSettings(rank=16, alpha=32, use_dora=use_dora), 0)
    magnitudes = sum(each.numel() for name, each in model.named_parameters() if "magnitude" in name)
    outputs = 32 * (2 * 14336 + 3 * 4096 + 2 * 1024)  # gate, up; q, o, down; k, v
    assert magnitudes == (outputs if use_dora else 0)
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    parts = {part.name: part.gpu for part in memory_estimate(config_of(), model, NOTHING, Ranks(1, 1)).parts}
    assert parts["Adam's two moments, fp32"] == 8 * trained
    assert parts["weights, sharded"] == 4 * sum(each.numel() for each in model.parameters())


@pytest.mark.parametrize("stage", [1, 3])
def test_quantised_weights_count_with_their_bytes(stage: int) -> None:
    """4.13 bits for each weight of the linear layers of 8B Llama's blocks, 16 for embeddings, head and norms."""
    with torch.device("meta"), quantised_blocks(eight_billion, "nf4", torch.bfloat16):
        model = eight_billion()
    linear = 32 * 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    others = (2 * 128256 + 65) * 4096
    assert dense_elements(model) == linear + others
    estimate = memory_estimate(config_of(precision="bf16", zero_stage=stage), model, NOTHING, Ranks(2, 2))
    parts = {part.name: part.gpu for part in estimate.parts}
    name, ranks = {1: ("weights, whole", 1), 3: ("weights, sharded", 2)}[stage]
    assert parts[name] * ranks == pytest.approx((4 + 1 / 8 + 1 / 512) / 8 * linear + 2 * others, rel=1e-5)
    assert parts["a quantised layer's weight"] == 2 * 4096 * 14336


def test_suggested_settings_are_listed_with_the_memory_they_need() -> None:
    config, model = config_of(precision="bf16", zero_stage=2), eight_billion()
    now = memory_estimate(config, model, LARGE, Ranks(8, 8)).gpu_bytes
    suggested = dict(memory_savings(config, model, LARGE, Ranks(8, 8)))
    assert list(suggested.values()) == sorted(suggested.values())
    assert max(suggested.values()) < now
    assert {"gradient_checkpointing=true", "zero_stage=3", "data.micro_batch_tokens=192"} <= suggested.keys()
    changed = config.model_copy(update={"gradient_checkpointing": True})
    assert suggested["gradient_checkpointing=true"] == memory_estimate(changed, model, LARGE, Ranks(8, 8)).gpu_bytes
    assert "zero_stage=3" not in dict(memory_savings(config_of(), model, LARGE, Ranks(8, 8)))


def test_a_smaller_micro_batch_does_not_shrink_the_gradient_of_the_heads_weight() -> None:
    config, model = config_of(precision="bf16", zero_stage=2), eight_billion()
    ranks, half = Ranks(8, 8), "data.micro_batch_tokens=192"
    one, other = (dict(memory_savings(config, model, replace(LARGE, fixed=fixed), ranks))[half] for fixed in (0, GIB))
    assert other - one == GIB // 2


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_weight_that_is_embedding_and_head_has_two_gradients(stage: int) -> None:
    """The head's, and at the end of the backward pass the embedding's, in the weight's number format."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    moving = {}
    for tied in (True, False):
        with torch.device("meta"):
            config = LlamaConfig(vocab_size=1000, tie_word_embeddings=tied, **sizes)
            model: Any = AutoModelForCausalLM.from_config(config)
            model.tie_weights()
        estimate = memory_estimate(config_of(precision="bf16", zero_stage=stage), model, NOTHING, Ranks(1, 1))
        moving[tied] = next(part.gpu for part in estimate.parts if part.name == "gradients being reduced")
    more = 0 if stage < 3 else 4 * 1000 * 64  # a bucket of all weights, which are more with a head of its own
    assert moving[True] + more == moving[False] + 2 * 1000 * 64


def test_check_reports_the_peak_and_refuses_a_gpu_that_is_too_small(prepared_run: PreparedRun) -> None:
    lines = list(check_run(prepared_run.config, nodes=2, gpus_per_node=4, gpu_memory_gib=80))
    (peak,) = [line for line in lines if line.startswith("  peak")]
    assert peak.endswith("on each of 8 GPUs, 4 a node")
    assert any(line.startswith("  activations of a micro-batch") for line in lines)
    with pytest.raises(ConfigError) as refused:
        list(check_run(prepared_run.config, gpu_memory_gib=2.1))
    assert str(refused.value).startswith(
        "a GPU of 2.1 GiB is too small: 2.2 GiB are needed; changes that need less, with their GiB:"
    )
    assert "deepspeed.zero_optimization.reduce_bucket_size=5000000" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_for_cpu_ranks_check_reports_host_memory_and_no_gpus(prepared_run: PreparedRun) -> None:
    lines = list(check_run(prepared_run.config, nodes=2, gpus_per_node=0, nproc_per_node=2))
    assert not [line for line in lines if "GPU" in line or "CUDA" in line]
    (peak,) = [line for line in lines if line.startswith("  peak")]
    assert peak.endswith("on each of 4 CPU ranks, 2 a node")
    (node,) = [line for line in lines if line.startswith("  host memory of a node")]
    assert float(node.split()[-1]) == pytest.approx(2 * float(peak.split()[1]), abs=0.02)
    assert any(
        line.endswith("on each of 1 CPU ranks, 1 a node") for line in check_run(prepared_run.config, gpus_per_node=0)
    )


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize(
    ("write", "changes"),
    [
        (write_data, {}),
        (write_data, {"data.layout": "padded", "data.slots_per_step": 40}),
        (write_data, {"objective": {"name": "sft"}, "data.mixture": {"strategy": "uniform", "pairing": "none"}}),
        (write_task_data, {**XMIXUP, "tokenizer.train": {"vocab_size": 120, "style": "encoder"}}),
    ],
    ids=["packed", "padded", "alone", "pairs"],
)
def test_no_micro_batch_exceeds_the_largest_estimated_one(
    tmp_path: Path, ranks: int, write: Callable[[Path], Path], changes: dict[str, Any]
) -> None:
    config = validate(run_values(write(tmp_path / "data"), tmp_path / "run", **changes), "test")
    data = assemble_data(config, prepare(config))
    shape = largest_batch(config.data, config.objective, data, ranks)
    batches = [
        batch.input_ids
        for step in range(6)
        for share in load_on_ranks(data.loader, ranks, step)
        for batch in share.micro_batches
    ]
    assert max(each.numel() for each in batches) <= shape.rows * shape.row_tokens <= config.data.micro_batch_tokens
    assert max(each.shape[1] for each in batches) <= shape.row_tokens
