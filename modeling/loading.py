"""From a Hugging Face directory (or hub name) to a model: built, filled, checked.

In: a directory with `config.json` and safetensors weights, and the architecture wanted (a decoder language
model unless said otherwise; the heads of `architectures.py`).
Out: a `PreTrainedModel`; for training its architecture first (`build_model`, under any construction context
such as ZeRO-3's) and its weights second (`load_weights`, one tensor at a time); for evaluation both at once
(`load_pretrained`). Every way of loading stops on missing, unexpected or wrongly shaped weights.
Next: `training/engine/engine.py` partitions and trains it; `generation.py` opens its exports.
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
from modeling.export_info import RUN_EXPORT
from modeling.transformers_internals import no_init_weights, supports_attention
from modeling.weights.untrusted import read_config
from modeling.weights.weight_files import StoredTensor, one_line, stored_tensors
from modeling.weights.weight_match import match_weights, named

AttentionName = Literal["auto", "sdpa", "eager", "flash_attention_2"]
ATTENTION: tuple[str, ...] = get_args(AttentionName)
Write = Callable[[nn.Parameter, Callable[[], Tensor] | None], None]

HUB_FILES = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.txt", "*.jinja")
HUB_IGNORED = ("*/*", "consolidated*")  # the same weights again, in other layouts


def resolve_attention(
    name: str, config: PreTrainedConfig | None = None, architecture: Architecture = "causal-lm"
) -> str:
    """The attention implementation to ask transformers for.

    `auto`: flash-attn where it runs, else sdpa, else (a `config` whose class has neither, such as BLOOM's)
    eager. Raises ModelError on a name that is none, or that this machine or class does not run.
    """
    if name not in ATTENTION:
        raise ModelError(f"attention: {name!r} is not one of {', '.join(ATTENTION)}")
    chosen: Any = PreTrainedModel if config is None else model_class(config, architecture)
    flash = importlib.util.find_spec("flash_attn") is not None and torch.cuda.is_available()
    if name == "flash_attention_2" and not flash:
        raise ModelError("attention: flash_attention_2 needs flash-attn and an NVIDIA GPU; use auto or sdpa")
    runs = {
        "flash_attention_2": flash and (config is None or supports_attention(chosen, "flash_attention_2")),
        "sdpa": config is None or supports_attention(chosen, "sdpa"),
        "eager": True,
    }
    if name == "auto":
        return next(choice for choice, does_run in runs.items() if does_run)
    if not runs[name]:
        raise ModelError(f"attention: {chosen.__name__} has no {name}; use auto or eager")
    return name


def resolve_directory(directory_or_name: str | Path) -> Path:
    """A local directory as it is, a run's folder as its export, a hub name as the directory it is downloaded to.

    Raises ModelError: no such directory or hub name, or a run or checkpoint that is not exported.
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
            f"model {str(directory_or_name)!r}: no directory here, and the hub: {one_line(error)}"
        ) from error


def _exported(directory: Path) -> Path:
    """The export in a run's folder; any other directory as it is."""
    if (directory / "config.json").is_file():
        return directory
    export = directory / RUN_EXPORT
    if (export / "config.json").is_file():
        return export
    if (directory / "checkpoints").is_dir():
        raise ModelError(f"{directory}: a run without an export; `crosslift export {directory} --output DIR` makes one")
    if (directory / "COMPLETE").is_file():
        raise ModelError(f"{directory}: a checkpoint; `crosslift export {directory} --output DIR` makes a model of it")
    return directory


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers says nothing but errors: what it would say of a checkpoint is judged by the caller."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_config(directory: Path, architecture: Architecture = "causal-lm") -> PreTrainedConfig:
    """The config of a model. Raises ModelError where it is absent, unknown, without that head or quantised."""
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
) -> PreTrainedModel:
    """The architecture with uninitialised weights, in train mode, to be filled by `load_weights`.

    `construction` wraps the making of the modules: ZeRO-3's caller gives `deepspeed.zero.Init(...)` here, so
    no rank ever holds the whole model (inside transformers' `prevent_arange_dtype_change`, or rotary
    frequencies come out in bf16, which is refused here). The KV cache is off: packed rows are only kept apart
    without it.
    """
    directory = resolve_directory(directory_or_name)
    config = load_config(directory, architecture)
    config.use_cache = False
    with construction or nullcontext(), no_init_weights():
        model: PreTrainedModel = auto_class(architecture).from_config(
            config, dtype=dtype, attn_implementation=resolve_attention(attention, config, architecture)
        )
    model.tie_weights()  # which no_init_weights leaves out
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
    """Fill the model from the directory's safetensors files, one tensor at a time.

    Every rank calls this. `write(parameter, read)` is called once a parameter, for the same parameters in
    the same order on every rank: `read()` gives the stored tensor on the reader, `read` is None elsewhere;
    the caller gathers, copies and partitions. Persistent buffers, which ZeRO-3 does not partition, each rank
    reads itself. Checks of file headers come first, so every rank raises the same ModelError: missing,
    unexpected, wrongly shaped or quantised weights, named; layouts that need conversion, and how. Then the
    reader raises one for a weight that is no finite number, with its name and file.
    """
    directory = resolve_directory(directory)
    match = match_weights(model, stored_tensors(directory))
    match.refuse(model, directory)
    sources = match.sources
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}

        def read(tensor: StoredTensor) -> Tensor:
            if tensor.file not in opened:  # one file at a time: what is mapped counts as this process's memory
                stack.close()
                opened.clear()
                opened[tensor.file] = stack.enter_context(safe_open(tensor.file, framework="pt"))
            values: Tensor = opened[tensor.file].get_tensor(tensor.key)
            refuse_not_finite(values, f"{tensor.file}: {tensor.key}")
            return values

        for parameter in model.parameters():
            write(parameter, partial(read, sources[id(parameter)]) if is_reader else None)
        for buffer in model.buffers():
            if id(buffer) in sources:  # the others are computed by the model itself
                with torch.no_grad():
                    buffer.copy_(read(sources[id(buffer)]))


def refuse_not_finite(values: Tensor, name: str) -> None:
    """Raises ModelError where a tensor holds a NaN or an infinity; `name` says which of which file."""
    if values.is_meta:  # a look without weights
        return
    if values.is_floating_point() and values.numel() and not torch.stack(torch.aminmax(values)).isfinite().all():
        count = int((~torch.isfinite(values)).sum())
        raise ModelError(f"{name}: {count} of its {values.numel()} values are no finite numbers; copy the model anew")


def load_pretrained(
    directory: str | Path,
    dtype: torch.dtype,
    attention: AttentionName,
    device: str | torch.device,
    architecture: Architecture = "causal-lm",
) -> PreTrainedModel:
    """The whole model on one device, in eval mode, for evaluation; stops on weights that do not fit."""
    directory = resolve_directory(directory)
    config = load_config(directory, architecture)
    stored_tensors(directory)  # whole files, safetensors only
    loaded: Any = auto_class(architecture).from_pretrained(
        directory,
        dtype=dtype,
        attn_implementation=resolve_attention(attention, config, architecture),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that they come in the report with the others
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
