"""Estimates a run's memory per GPU and per node before anything is allocated.

The arithmetic is that of DeepSpeed 0.19 under the settings of `settings.py`: gradients are summed and reduced in fp32,
every optimizer that is offered keeps Adam's two moments in fp32 beside fp32 master weights (in fp32 runs too, where
they are a second copy). ZeRO's shards are divided over all ranks, each weight rounded up.
`tests/distributed/test_memory.py` compares weights, gradients and optimizer with the engine's own buffers,
`tests/unit/training/checks/test_activations.py` activations with what autograd saves, both on the CPU;
`benchmarks/memory_estimate.py` measures them, `benchmarks/rank_memory.py` the peak of a whole rank on a CPU. No GPU was
measured: its context, NCCL's buffers and the allocator's fragmentation are an allowance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal, get_args

from torch import nn

from data_pipeline.config import merged
from modeling.quantisation.linear import packed_layers
from training.config import RunConfig
from training.engine.settings import own_settings, with_fastest_adam

GIB = 2**30
ITEM = {"fp32": 4, "bf16": 2}
ALLOWANCE = 2 * GIB  # CUDA context, NCCL, cuBLAS, fragmentation: not measured
# Python, its libraries, the tokenizer and the data: 0.6 GiB with a tiny tokenizer, 1.1 with one of 262,144 tokens
CPU_ALLOWANCE = 5 * GIB // 4
TEMPORARIES = 8  # bytes a weight: two fp32 tensors, of an optimizer that is not fused
ALIGNMENT = 2  # elements per rank to whose multiple ZeRO-1 and -2 round up a flat group
# DeepSpeed's defaults; `tests/unit/training/engine/test_memory_estimate.py` compares them with the installed version's.
ZERO_DEFAULTS: dict[str, int] = {
    "sub_group_size": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
}
When = Literal["always", "in forward and backward", "in the update", "while a checkpoint is written"]


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks of a run: how many in all and on a node, and whether each has a GPU or runs on CPUs."""

    total: int
    per_node: int
    on_gpus: bool = True


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes that one micro-batch's forward pass saves on one GPU (counted by `training.checks.activations`)."""

    layers: tuple[int, ...]  # saved inside each layer
    outside: int  # saved outside: embeddings, states that the objective keeps, head, logits
    layer_input: int  # the input of a layer, which is all that checkpointing saves of it
    layer_work: int  # temporary gradients in a layer's backward
    outside_work: int  # the same for head and loss, with their fp32 copies
    counted: bool  # False: by the formula
    fixed: int = 0  # part of the outside that does not follow the micro-batch's size: the gradient of the head's weight

    def peak(self, checkpointing: bool) -> int:
        """Peak in bytes: at the start of backward or in a layer; checkpointing recomputes one layer at a time."""
        kept, recomputed = sum(self.layers), 0
        if checkpointing:
            kept, recomputed = len(self.layers) * self.layer_input, max(self.layers, default=0)
        return kept + max(self.outside + self.outside_work, recomputed + self.layer_work)


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one kind: on each GPU, in host memory and on NVMe for each rank."""

    name: str
    when: When
    gpu: int = 0
    host: int = 0
    nvme: int = 0


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Memory of each rank; not all `parts` exist at the same time."""

    parts: tuple[Part, ...]
    ranks: Ranks  # without GPUs, all parts are in the node's memory
    counted: bool  # activations were counted, not estimated by a formula

    @property
    def gpu_bytes(self) -> int:
        """Peak of one rank's device: permanent parts, plus the largest sum of those of one time."""
        most = max(self._sum("gpu", when) for when in get_args(When)[1:])
        return self._sum("gpu", "always") + most + (ALLOWANCE if self.ranks.on_gpus else CPU_ALLOWANCE)

    @property
    def host_bytes(self) -> int:
        """Peak of a node's host memory: offloaded parts, models that each rank loads whole, all parts of CPU ranks."""
        of_rank = sum(part.host for part in self.parts) + (0 if self.ranks.on_gpus else self.gpu_bytes)
        return min(self.ranks.per_node, self.ranks.total) * of_rank

    @property
    def nvme_bytes(self) -> int:
        """Bytes on a node's NVMe."""
        return min(self.ranks.per_node, self.ranks.total) * sum(part.nvme for part in self.parts)

    def table(self) -> Iterator[str]:
        """Lines to print, in GiB."""
        device = "GPU" if self.ranks.on_gpus else "CPU rank"
        yield f"{f'memory of each {device}':<44}{'GiB':>8}"
        for part in self.parts:
            if part.gpu:
                yield f"  {part.name:<42}{_gib(part.gpu):>8}  {part.when}"
        if self.ranks.on_gpus:
            yield f"  {'CUDA, NCCL, fragmentation':<42}{_gib(ALLOWANCE):>8}  an allowance, not measured"
        else:
            yield f"  {'Python and its libraries':<42}{_gib(CPU_ALLOWANCE):>8}  an allowance"
        where = f"on each of {self.ranks.total} {device}s, {self.ranks.per_node} a node"
        yield f"  {'peak':<42}{_gib(self.gpu_bytes):>8}  {where}"
        if self.host_bytes:
            yield f"  {'host memory of a node':<42}{_gib(self.host_bytes):>8}"
        if self.nvme_bytes:
            yield f"  {'NVMe of a node':<42}{_gib(self.nvme_bytes):>8}"
        if not self.counted:
            yield "  activations are by a rule of thumb: this model cannot be run without data"

    def _sum(self, place: Literal["gpu", "host"], when: When) -> int:
        return sum(getattr(part, place) for part in self.parts if part.when == when)


def memory_estimate(config: RunConfig, model: nn.Module, activations: Activations, ranks: Ranks) -> MemoryEstimate:
    """The estimate for a run on `ranks`; `model` has the run's adapters, if it has any, and needs no memory."""
    zero = _zero_settings(config, ranks)
    sizes = _Sizes.of(model, ITEM[config.precision], ranks.total)
    parts = [
        *(_stage_3 if zero["stage"] == 3 else _stage_1_and_2)(sizes, zero),
        _checkpoint(config, sizes, zero, ranks),
    ]
    computed = max((prod(layer.shape) for layer in packed_layers(model).values()), default=0)
    parts.append(Part("a quantised layer's weight", "in forward and backward", sizes.item * computed))
    # On a CPU, the C library keeps the freed blocks of a backward pass, which are mostly below 32 MiB each.
    when: When = "in forward and backward" if ranks.on_gpus else "always"
    parts.append(Part("activations of a micro-batch", when, activations.peak(config.gradient_checkpointing)))
    kept = tuple(part for part in parts if part != Part(part.name, part.when))
    return MemoryEstimate(kept, ranks, activations.counted)


def memory_savings(
    config: RunConfig, model: nn.Module, activations: Activations, ranks: Ranks
) -> Iterator[tuple[str, int]]:
    """(change, peak bytes per GPU with it) for each change that lowers the peak, the lowest peak first.

    Changes that save less than 1% are left out.
    """
    now = memory_estimate(config, model, activations, ranks).gpu_bytes
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    small_bucket = {"zero_optimization": {"reduce_bucket_size": 5_000_000}}
    halves = Activations(
        tuple(each // 2 for each in activations.layers), activations.outside // 2, activations.layer_input // 2,
        activations.layer_work // 2, (activations.outside_work + activations.fixed) // 2, activations.counted,
        activations.fixed,
    )  # fmt: skip
    changes: list[tuple[str, dict[str, Any], Activations, Ranks]] = [
        ("gradient_checkpointing=true", {"gradient_checkpointing": True}, activations, ranks),
        ("zero_stage=3", {"zero_stage": 3}, activations, ranks),
        ("deepspeed.zero_optimization.offload_optimizer.device=cpu",
         {"deepspeed": merged(config.deepspeed, offload)}, activations, ranks),
        ("deepspeed.zero_optimization.reduce_bucket_size=5000000",
         {"deepspeed": merged(config.deepspeed, small_bucket)}, activations, ranks),
        ("twice the GPUs", {}, activations, replace(ranks, total=2 * ranks.total)),
    ]  # fmt: skip
    half = config.data.micro_batch_tokens // 2
    if half >= config.data.sequence_length:
        changes.append((f"data.micro_batch_tokens={half}", {}, halves, ranks))
    found = [
        (name, memory_estimate(config.model_copy(update=update), model, kept, on).gpu_bytes)
        for name, update, kept, on in changes
    ]
    yield from sorted(((name, peak) for name, peak in found if peak < 0.99 * now), key=lambda each: each[1])


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Elements of a model's weights, of `item` bytes; packed weights count as the elements that take their bytes."""

    item: int
    ranks: int
    weights: tuple[int, ...]
    trained: tuple[int, ...]
    groups: tuple[int, int]  # trained matrices, and the rest: the optimiser's two groups
    largest_module: int  # weights that one module holds itself
    tied: int  # of the embedding, if the LM head has the same weight: it gets a second gradient at the end of backward

    @classmethod
    def of(cls, model: nn.Module, item: int, ranks: int) -> _Sizes:
        weights = list(model.parameters())
        trained = [each for each in weights if each.requires_grad]
        matrices = sum(each.numel() for each in trained if each.ndim > 1)
        own = (sum(_elements(each, item) for each in module.parameters(recurse=False)) for module in model.modules())
        return cls(
            item, ranks, tuple(_elements(each, item) for each in weights), tuple(each.numel() for each in trained),
            (matrices, sum(each.numel() for each in trained) - matrices), max(own), _tied(model),
        )  # fmt: skip

    def shard(self, numbers: Sequence[int]) -> int:
        """Elements per rank, each weight being sharded separately (ZeRO-3)."""
        return sum(-(-number // self.ranks) for number in numbers)

    def partition(self) -> int:
        """Elements of the optimiser's state per rank, each group being sharded separately (ZeRO-1 and -2)."""
        unit = ALIGNMENT * self.ranks
        return sum(-(-number // unit) * ALIGNMENT for number in self.groups)


def _tied(model: nn.Module) -> int:
    """Elements of a trained weight that is both the embedding and the LM head; 0: there is none."""
    tables = [getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]
    embedding, head = [getattr(table, "weight", None) for table in tables]
    is_tied = head is embedding
    if is_tied and isinstance(embedding, nn.Parameter) and embedding.requires_grad:
        return embedding.numel()
    return 0


def _elements(weight: nn.Parameter, item: int) -> int:
    return weight.numel() if weight.is_floating_point() else -(-weight.nbytes // item)


def _stage_3(sizes: _Sizes, zero: dict[str, Any]) -> Iterator[Part]:
    item, bucket = sizes.item, zero["reduce_bucket_size"]
    trained, mine = sum(sizes.trained), sizes.shard(sizes.trained)
    small = sum(each for each in sizes.weights if each <= zero["stage3_param_persistence_threshold"])
    yield _placed(zero["offload_param"])("weights, sharded", "always", item * sizes.shard(sizes.weights))
    yield Part("small weights, whole", "always", item * small)
    yield from _optimizer(_placed(zero["offload_optimizer"]), mine)
    yield _placed(_to_host(zero["offload_optimizer"]))("gradients, fp32", "always", 4 * mine)
    if zero["offload_optimizer"] is not None:
        yield Part("gradients for the update", "always", host=4 * mine)
    else:
        work = zero["optimizer_work"] * min(mine, zero["sub_group_size"])
        yield Part("the optimizer's work", "in the update", work)
        yield _norm(sizes.shard((max(sizes.trained, default=0),)))
    if zero["contiguous_gradients"]:
        yield Part("bucket for reducing gradients", "always", 4 * bucket)
    largest = max(sizes.trained, default=0)
    moving = item * (largest + sizes.tied)
    moving += 4 * min(trained, max(bucket, largest)) + (4 * largest if largest > bucket else 0)
    yield Part("gradients being reduced", "in forward and backward", moving)
    # A gathered weight is kept if it is used again within the reuse distance: from forward to backward, that covers
    # half as many elements. Others are prefetched module by module, up to a limit.
    early = zero["stage3_max_live_parameters"] if zero["stage3_prefetch_bucket_size"] else 0
    live = max(zero["stage3_max_reuse_distance"] // 2, early) + 2 * sizes.largest_module
    whole = sum(sizes.weights) - small
    copied = sizes.ranks > 1 or zero["offload_param"] is not None  # a single rank's shards are already whole
    yield Part("gathered weights", "in forward and backward", item * min(whole, live) if copied else 0)


def _stage_1_and_2(sizes: _Sizes, zero: dict[str, Any]) -> Iterator[Part]:
    item, bucket, mine = sizes.item, zero["reduce_bucket_size"], sizes.partition()
    offload, trained, largest = zero["offload_optimizer"], sum(sizes.trained), max(sizes.trained, default=0)
    yield Part("weights, whole", "always", item * sum(sizes.weights))
    yield Part("weights while they are loaded", "always", host=item * sum(sizes.weights))
    yield from _optimizer(_placed(offload), mine)
    if offload is not None:
        yield Part("gradients and weights being moved", "always", item * largest, host=4 * mine + item * mine)
    # In fp32 a weight's gradient is whole until the update, so both ranks keep one that is split between them.
    kept = trained if zero["stage"] == 1 else mine if item == 2 else min(trained, mine + largest)
    if offload is None or zero["stage"] == 1:
        yield Part("gradients, fp32", "in forward and backward", 4 * kept)
    if offload is None:
        yield Part("gradients and their copy", "in the update", 8 * mine)
        yield Part("the optimizer's work", "in the update", zero["optimizer_work"] * mine)
        yield _norm(min(largest, mine))
    buckets = 2 if zero["overlap_comm"] else 1
    moving = buckets * 4 * bucket + item * (largest + sizes.tied)
    yield Part("gradients being reduced", "in forward and backward", moving)


def _optimizer(place: Callable[[str, When, int], Part], mine: int) -> Iterator[Part]:
    yield place("master weights, fp32", "always", 4 * mine)
    yield place("Adam's two moments, fp32", "always", 8 * mine)


def _norm(elements: int) -> Part:
    """`elements` of a rank's largest gradient: DeepSpeed converts one after the other."""
    return Part("gradient of a weight in fp64, for its norm", "in the update", 8 * elements)


def _checkpoint(config: RunConfig, sizes: _Sizes, zero: dict[str, Any], ranks: Ranks) -> Part:
    """Copy of master weights and moments, on one rank also of whole weights; on CPUs only if training goes on then."""
    stage_3 = zero["stage"] == 3
    size = 12 * (sizes.shard(sizes.trained) if stage_3 else sizes.partition())
    size += 0 if stage_3 else sizes.item * sum(sizes.trained) // min(ranks.per_node, ranks.total)
    name = "copy of the state, for a checkpoint"
    if ranks.on_gpus:
        return Part(name, "while a checkpoint is written", host=size)
    copied = config.checkpoint.background and config.checkpoint.every < config.max_steps
    return Part(name, "always", gpu=size if copied else 0)


def _placed(offload: str | None) -> Callable[[str, When, int], Part]:
    """Makes parts in the memory that `offload` names: None (the GPU), cpu or nvme."""
    where = {None: "gpu", "cpu": "host", "nvme": "nvme"}[offload]
    return lambda name, when, size: Part(name, when, **{where: size})


def _to_host(offload: str | None) -> str | None:
    """Memory of the gradients: with an optimiser on NVMe, they stay in host memory."""
    return "cpu" if offload == "nvme" else offload


def _zero_settings(config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    """The `zero_optimization` section that DeepSpeed gets, with its defaults, and `optimizer_work`, bytes a weight."""
    own = own_settings(
        config.optimizer, config.precision, config.zero_stage, world_size=ranks.total, on_gpu=ranks.on_gpus
    )
    given = own["zero_optimization"] | config.deepspeed.get("zero_optimization", {})
    chosen = with_fastest_adam(merged(own, config.deepspeed))["optimizer"]["params"]
    in_place = chosen.get("fused") or chosen.get("torch_adam") is False
    settings: dict[str, Any] = {**given, "optimizer_work": 0 if in_place else TEMPORARIES}
    for name, default in {**ZERO_DEFAULTS, "reduce_bucket_size": 0}.items():
        value = given.get(name, given.get(name.removeprefix("stage3_"), default))
        settings[name] = int(float(value))  # YAML 1.1 reads 5e8 as text, and so does DeepSpeed
    for name in ("offload_optimizer", "offload_param"):
        device = (given.get(name) or {}).get("device", "none")
        settings[name] = None if device == "none" else device
    return settings


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size >= GIB / 100 else "<0.01"
