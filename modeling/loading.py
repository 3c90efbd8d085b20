"""Builds a model from a Hugging Face directory or hub name, and fills and checks its weights.

Training builds the architecture first (`build_model`, inside a construction context such as ZeRO-3's) and loads the
weights second (`load_weights`, one tensor at a time). Evaluation does both at once (`load_pretrained`). Missing,
unexpected or wrongly shaped weights are an error in each case.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from modeling.architectures import Architecture, auto_class, model_class
from modeling.errors import ModelError
from modeling.export_info import ADAPTER_FOLDER, BASE_MODEL_FILE, EXPORT_FILE, RUN_EXPORT
from modeling.quantisation.linear import packed_layers, quantised_blocks
from modeling.transformers_internals import no_init_weights, read_positions_once, supports_attention
from modeling.weights.untrusted import read_config
from modeling.weights.weight_files import StoredTensor, one_line, other_weights, stored_tensors
from modeling.weights.weight_match import match_weights, named

AttentionName = Literal["auto", "sdpa", "eager", "flash_attention_2"]
ATTENTION: tuple[str, ...] = get_args(AttentionName)
Write = Callable[[nn.Parameter, Callable[[], Tensor] | None], None]

HUB_FILES = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja")
HUB_IGNORED = ("*/*", "consolidated*")  # the same weights in other layouts


def resolve_device(dtype: str) -> tuple[str, torch.dtype]:
    """The device and number format for evaluation. `dtype`: bf16, fp32, or auto: bf16 on a GPU, fp32 on a CPU."""
    on_gpu = torch.cuda.is_available()
    bf16 = dtype == "bf16" or (dtype == "auto" and on_gpu)
    return "cuda" if on_gpu else "cpu", torch.bfloat16 if bf16 else torch.float32


def resolve_attention(
    name: str, config: PreTrainedConfig | None = None, architecture: Architecture = "causal-lm"
) -> str:
    """The name of the attention implementation for transformers.

    `auto` is flash-attn where it runs, else sdpa, else eager (for a `config` whose class has neither, such as BLOOM's).

    Raises:
        ModelError: an unknown name, or one that this machine or the config's class does not support.
    """
    if name not in ATTENTION:
        raise ModelError(f"attention: {name!r} is not one of {', '.join(ATTENTION)}")
    chosen: Any = PreTrainedModel if config is None else model_class(config, architecture)
    flash = importlib.util.find_spec("flash_attn") is not None and torch.cuda.is_available()
    if name == "flash_attention_2" and not flash:
        raise ModelError("attention: flash_attention_2 needs flash-attn and an NVIDIA GPU; use auto or sdpa")
    supported = {
        "flash_attention_2": flash and (config is None or supports_attention(chosen, "flash_attention_2")),
        "sdpa": config is None or supports_attention(chosen, "sdpa"),
        "eager": True,
    }
    if name == "auto":
        return next(choice for choice, is_supported in supported.items() if is_supported)
    if not supported[name]:
        raise ModelError(f"attention: {chosen.__name__} has no {name}; use auto or eager")
    return name


def resolve_directory(directory_or_name: str | Path) -> Path:
    """The local directory of a model.

    Args:
        directory_or_name: a model directory, a run's folder (its export is taken), or a hub name (downloaded).

    Raises:
        ModelError: no such directory or hub name, an adapter directory, or a run or checkpoint without an export.
    """
    path = Path(directory_or_name)
    if path.is_dir():
        return _exported(path)
    try:
        return Path(
            snapshot_download(str(directory_or_name), allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_IGNORED))
        )
    except (OSError, ValueError) as error:  # every hub error is one of the two
        raise ModelError(
            f"model {str(directory_or_name)!r}: not a local directory, and the download from the hub failed: "
            f"{one_line(error)}"
        ) from error


def _exported(directory: Path) -> Path:
    """The export in a run's folder; any other directory itself."""
    if (directory / "config.json").is_file():
        return directory
    if (directory / "adapter_config.json").is_file():
        raise ModelError(f"{directory}: {_adapters_alone(directory)}")
    export = directory / RUN_EXPORT
    if (export / "config.json").is_file():
        return export
    if (directory / "checkpoints").is_dir():
        raise ModelError(f"{directory}: a run without an export; `crosslift export {directory} --output DIR` makes one")
    if (directory / "COMPLETE").is_file():
        raise ModelError(f"{directory}: a checkpoint; `crosslift export {directory} --output DIR` makes a model of it")
    return directory


def _adapters_alone(directory: Path) -> str:
    """What an adapter directory lacks, and what to give instead."""
    if not (directory / BASE_MODEL_FILE).is_file():
        return other_weights(directory)
    export = directory.resolve().parent
    beside = directory.resolve().name == ADAPTER_FOLDER and (export / EXPORT_FILE).is_file()
    instead = str(export) if beside else "the folder crosslift.json is in, such as RUN/model"
    return (
        "adapters without their base model, and without the language vectors that a ShifCon model needs; give the "
        f"export that they are from, which has all of them: {instead}"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers logs errors only; the caller handles what it would warn about."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_config(directory: Path, architecture: Architecture = "causal-lm") -> PreTrainedConfig:
    """The config of a model.

    Raises:
        ModelError: it is missing, of an unknown type, without that head, or of quantised weights.
    """
    config = read_config(directory)
    try:
        model_class(config, architecture)
    except ModelError as error:
        raise ModelError(f"{directory}: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{directory}: the weights are quantised; take the model's unquantised release")
    return config


def build_model(
    directory_or_name: str | Path,
    *,
    attention: AttentionName,
    dtype: torch.dtype,
    gradient_checkpointing: bool,
    construction: AbstractContextManager[Any] | None = None,
    architecture: Architecture = "causal-lm",
    quantise: str | None = None,
) -> PreTrainedModel:
    """The architecture with uninitialised weights, in train mode, to be filled by `load_weights`.

    The KV cache is off, because packed rows are only kept apart without it.

    Args:
        directory_or_name: see `resolve_directory`.
        attention: see `resolve_attention`.
        dtype: of the weights.
        gradient_checkpointing: recompute layers in the backward pass.
        construction: the context in which modules are made, such as ZeRO-3's `deepspeed.zero.Init(...)`, so that no
            rank ever holds the whole model. It must keep rotary frequencies in fp32
            (`prevent_arange_dtype_change` of transformers).
        architecture: the head.
        quantise: a format of `quantisation.linear.FORMATS` for the linear layers of blocks.

    Raises:
        ModelError: what `resolve_directory`, `load_config` and `resolve_attention` raise; rotary frequencies that are
            not fp32; gradient checkpointing that the model does not support.
    """
    directory = resolve_directory(directory_or_name)
    config = load_config(directory, architecture)
    config.use_cache = False
    if (implementation := resolve_attention(attention, config, architecture)) == "flash_attention_2":
        read_positions_once()

    def make() -> PreTrainedModel:
        made: PreTrainedModel = auto_class(architecture).from_config(
            config, dtype=dtype, attn_implementation=implementation
        )
        return made

    with quantised_blocks(make, quantise, dtype), construction or nullcontext(), no_init_weights():
        model = make()
    model.tie_weights()  # no_init_weights skips it
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dtype != torch.float32:
            raise ModelError(f"{name}: made in {buffer.dtype}; the construction context must keep float32")
    if gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ModelError(f"{type(model).__name__} has no gradient checkpointing; switch it off")
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def load_weights(model: PreTrainedModel, directory: str | Path, write: Write, is_reader: bool) -> None:
    """Fills the model from the directory's safetensors files, one tensor at a time. Every rank calls this.

    Persistent buffers, which ZeRO-3 does not shard, are read by each rank itself.

    Args:
        model: what `build_model` gave.
        directory: see `resolve_directory`.
        write: is called once per parameter, in the same order on every rank, as `write(parameter, read)`. `read()`
            gives the stored tensor on the reader; on other ranks `read` is None. The caller gathers, copies and shards.
        is_reader: whether this rank reads the tensors.

    Raises:
        ModelError: on every rank, from file headers: missing, unexpected, wrongly shaped or quantised weights, or a
            layout that needs conversion. On the reader: a weight with NaN or infinite values, with its name and file.
    """
    directory = resolve_directory(directory)
    match = match_weights(model, stored_tensors(directory))
    match.refuse(model, directory)
    sources = match.sources
    packed = {id(layer.packed): layer for layer in packed_layers(model).values()}
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}

        def read(tensor: StoredTensor) -> Tensor:
            if tensor.file not in opened:  # one file at a time: mapped files count as memory of this process
                stack.close()
                opened.clear()
                opened[tensor.file] = stack.enter_context(safe_open(tensor.file, framework="pt"))
            values: Tensor = opened[tensor.file].get_tensor(tensor.key)
            refuse_not_finite(values, f"{tensor.file}: {tensor.key}")
            return values

        def value(number: int) -> Tensor:
            values = read(sources[number])
            return packed[number].pack(values) if number in packed else values

        for parameter in model.parameters():
            write(parameter, partial(value, id(parameter)) if is_reader else None)
        for buffer in model.buffers():
            if id(buffer) in sources:  # the others are computed by the model itself
                with torch.no_grad():
                    buffer.copy_(read(sources[id(buffer)]))


def refuse_not_finite(values: Tensor, name: str) -> None:
    """Raises ModelError if a tensor holds a NaN or an infinity; `name` is its name and file."""
    if values.is_meta:  # nothing is loaded
        return
    if values.is_floating_point() and values.numel() and not torch.stack(torch.aminmax(values)).isfinite().all():
        count = int((~torch.isfinite(values)).sum())
        raise ModelError(f"{name}: {count} of its {values.numel()} values are not finite; copy the model again")


def load_pretrained(
    directory: str | Path,
    dtype: torch.dtype,
    attention: AttentionName,
    device: str | torch.device,
    architecture: Architecture = "causal-lm",
) -> PreTrainedModel:
    """The whole model on one device, in eval mode.

    Raises:
        ModelError: what `load_config` and `resolve_attention` raise, and weights that are missing, unexpected, wrongly
            shaped or not finite.
    """
    directory = resolve_directory(directory)
    config = load_config(directory, architecture)
    stored_tensors(directory)  # checks that files are whole and safetensors
    loaded: Any = auto_class(architecture).from_pretrained(
        directory,
        dtype=dtype,
        attn_implementation=resolve_attention(attention, config, architecture),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that the report lists them with the others
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    model, report = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := [str(entry[0] if isinstance(entry, tuple) else entry) for entry in report[problem]]:
            what = problem.removesuffix("_keys")
            raise ModelError(f"{directory}: {len(names)} {what} weights for {type(model).__name__}: {named(names)}")
    for name, tensor in model.state_dict().items():
        refuse_not_finite(tensor, f"{directory}: {name}")
    return model.to(device)
