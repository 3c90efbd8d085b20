"""DeepSpeed's settings: those that crosslift derives from the run file, and validation of its raw `deepspeed:` section.

A raw key that follows from a key of the run file is refused if it contradicts that; a key that DeepSpeed does not read
is reported by name; each value that DeepSpeed refuses is one line. No heavy imports: contradictions are checked when a
run file is loaded, the rest by `engine.deepspeed_settings`, which passes DeepSpeed's parser.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

if TYPE_CHECKING:
    from training.config import OptimizerConfig

# Raw keys, including all below them, and the key of the run file from which they follow.
FOLLOWS_FROM = {
    "train_batch_size": "data.slots_per_step",
    "train_micro_batch_size_per_gpu": "data.micro_batch_tokens",
    "gradient_accumulation_steps": "data.micro_batch_tokens",
    "dataloader_drop_last": "data",
    "data_efficiency": "data",
    "gradient_clipping": "optimizer.max_grad_norm",
    "optimizer": "optimizer",
    "optimizer.type": "optimizer.name",
    "optimizer.params.lr": "optimizer.learning_rate",
    "optimizer.params.betas": "optimizer.betas",
    "optimizer.params.eps": "optimizer.eps",
    "optimizer.params.weight_decay": "optimizer.weight_decay",
    "optimizer.params.max_grad_norm": "optimizer.max_grad_norm",
    "scheduler": "schedule",
    "bf16": "precision",
    "bfloat16": "precision",
    "fp16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
    "communication_data_type": "precision",
    "activation_checkpointing": "gradient_checkpointing",
    "zero_optimization.stage": "zero_stage",
    "checkpoint": "checkpoint",
    "datastates_ckpt": "checkpoint",
}
# Raw keys, including all below them, that the training loop fixes, and why.
FIXED = {
    "zero_optimization.compute_grad_norm": "the guard judges gradients by their norm",
    "gradient_allreduce_op": "losses are scaled for gradients that are averaged over ranks",
    "managed_gradient_accumulation": "the number of micro-batches varies by step, and the loop marks the last one",
    "tensor_parallel": "ranks are data-parallel only",
    "expert_parallel": "ranks are data-parallel only",
    "sequence_parallel_size": "ranks are data-parallel only",
    "pipeline": "ranks are data-parallel only",
    "compile": "graphs are not compiled (see 'torch_compile')",
    "hybrid_engine": "it is meant for generation in RLHF",
    "autotuning": "it starts its own runs",
}
REDUCE_BUCKET = 50_000_000  # elements, of DeepSpeed's 500 million; a rank keeps the bucket and its copy in fp32
MAX_LISTED = 30  # most known keys in a message
CHOOSES_ADAM = {"torch_adam", "fused"}  # parameters by which the user chooses among implementations of Adam
FREE = {f"optimizer.params.{name}" for name in CHOOSES_ADAM}  # keys below the above that the user may set
# DeepSpeed's name of each optimizer, and the parameters that make it torch's, which needs no compiled op.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("AdamW", {"torch_adam": True}),
    "adam": ("Adam", {"torch_adam": True, "adam_w_mode": False}),
    "radam": ("RAdam", {"decoupled_weight_decay": True}),
}


def own_settings(
    optimizer: OptimizerConfig, precision: str, zero_stage: int, *, world_size: int, on_gpu: bool
) -> dict[str, Any]:
    """The DeepSpeed settings that follow from the rest of a run file."""
    kind, chosen = OPTIMIZERS[optimizer.name]
    untested = {"zero_allow_untested_optimizer": True} if optimizer.name == "radam" else {}  # by DeepSpeed; by us it is
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "gradient_clipping": optimizer.max_grad_norm,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": zero_stage,
            "overlap_comm": on_gpu,
            "contiguous_gradients": True,
            "reduce_bucket_size": REDUCE_BUCKET,
        },
        "optimizer": {
            "type": kind,
            "params": {
                "lr": optimizer.learning_rate,
                "betas": list(optimizer.betas),
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
                **chosen,
            },
        },
        "steps_per_print": 10**12,
        **untested,
    }


def wants_cpu_adam(settings: Mapping[str, Any], raw: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed's CPU Adam should be used if it can be: the optimizer is offloaded, and none was chosen."""
    chosen = CHOOSES_ADAM & raw.get("optimizer", {}).get("params", {}).keys()
    return is_offloaded(settings) and "torch_adam" in settings["optimizer"]["params"] and not chosen


def is_offloaded(settings: Mapping[str, Any]) -> bool:
    """Whether the optimizer's state is in host memory or on NVMe."""
    place = settings.get("zero_optimization", {}).get("offload_optimizer") or {}
    return place.get("device", "none") != "none"


def with_fastest_adam(settings: dict[str, Any], *, cpu_adam: bool = False) -> dict[str, Any]:
    """The settings with the Adam to use: DeepSpeed's CPU Adam (`cpu_adam`), or torch's fused one.

    The fused one updates weights in one pass; torch's other ones make temporaries as large as all weights of a rank.
    """
    params = settings["optimizer"]["params"]
    if cpu_adam:
        params = {**params, "torch_adam": False}
    elif params.get("torch_adam"):
        params = {"fused": True, **params}
    return {**settings, "optimizer": {**settings["optimizer"], "params": params}}


def contradictions(raw: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[str]:
    """A line for each raw key with another value than the run file implies (`own_settings`), and for each `auto`."""
    implied = dict(_leaves(own))
    for path, value in _leaves(raw):
        reason = _reason(path)
        if value == "auto":
            instead = f"it {reason}; leave it out" if reason else "give a value, or leave it out"
            yield f"'deepspeed.{path}' is 'auto', which only Hugging Face's Trainer replaces: {instead}"
            continue
        agrees = implied[path] == value if path in implied else value is False and path.endswith(".enabled")
        if reason is not None and not agrees:
            yield f"'deepspeed.{path}' {reason}; leave it out"


def mistakes(
    settings: dict[str, Any], own: Mapping[str, Any], parse: Callable[[dict[str, Any]], object], version: str
) -> Iterator[str]:
    """A line for each setting that DeepSpeed refuses, does not read, or expects to have another type.

    Args:
        settings: all settings.
        own: those that crosslift sets itself.
        parse: DeepSpeed's own parser of its settings.
        version: of DeepSpeed, for the messages.
    """
    reading = _RecordedSettings(settings)
    try:
        parse(reading)
    except ValidationError as error:
        yield from (_explain(item, error.title, settings, version) for item in error.errors())
    except Exception as error:  # the parser also raises AssertionError, KeyError, ...
        text = " ".join(str(error).split()) or type(error).__name__
        last = next(reversed(reading.read_keys), None)  # the key that it read last
        where = f"deepspeed.{last}" if last in settings and last not in own else "deepspeed"
        yield from list(_wrong_types(reading, own, "deepspeed.")) or [
            f"{where}: refused by DeepSpeed {version}: {text}"
        ]
    else:
        yield from _wrong_types(reading, own, "deepspeed.")
        yield from _unread(reading, "deepspeed.", version)


def _reason(path: str) -> str | None:
    """Why a raw key may not be set, as the rest of a sentence; None if it may."""
    if path in FREE:
        return None
    for each in _prefixes(path):
        if each in FIXED:
            return f"is fixed: {FIXED[each]}"
        if each in FOLLOWS_FROM:
            return f"follows from {FOLLOWS_FROM[each]!r}"
    return None


class _RecordedSettings(dict[str, Any]):
    """Settings that record which of their keys a parser reads, and with which default."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__((k, _RecordedSettings(v) if isinstance(v, dict) else v) for k, v in settings.items())
        self.read_keys: dict[Any, Any] = {}

    def __copy__(self) -> _RecordedSettings:
        return self

    def __contains__(self, key: object) -> bool:
        self.read_keys.setdefault(key, None)
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.read_keys.setdefault(key, None)
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[str]:  # without it, `**settings` would read the keys unnoticed
        return super().__iter__()

    def get(self, key: str, default: Any = None) -> Any:
        self.read_keys.pop(key, None)
        self.read_keys[key] = default
        return super().get(key, default)

    def keys(self) -> Any:
        return _Keys(self)

    def items(self) -> Any:
        return [(key, self[key]) for key in self]


class _Keys(Sequence[str]):
    """The keys of a `_RecordedSettings`; lookups among them are recorded."""

    def __init__(self, reading: _RecordedSettings) -> None:
        self._reading = reading

    def __contains__(self, key: object) -> bool:
        return key in self._reading

    def __iter__(self) -> Iterator[str]:
        return iter(self._reading)

    def __len__(self) -> int:
        return len(self._reading)

    def __getitem__(self, index: Any) -> Any:
        return list(self._reading)[index]


def _unread(reading: _RecordedSettings, path: str, version: str) -> Iterator[str]:
    """Lines for the keys that were not read."""
    for key, value in dict.items(reading):
        if path == "deepspeed." and key == "optimizer":
            continue  # crosslift's own but for one key; its parameters are read by the optimizer itself
        if key not in reading.read_keys:
            yield f"{path}{key}: unknown to DeepSpeed {version}; {_nearest(str(key), map(str, reading.read_keys))}"
        elif isinstance(value, _RecordedSettings) and value.read_keys:
            yield from _unread(value, f"{path}{key}.", version)


def _wrong_types(reading: _RecordedSettings, own: Mapping[str, Any], path: str) -> Iterator[str]:
    """Lines for values whose type differs from the default with which they were read, or from crosslift's own."""
    for key, value in dict.items(reading):
        default = own.get(key) if reading.read_keys.get(key) is None else reading.read_keys[key]
        if isinstance(value, _RecordedSettings) and isinstance(default, dict | None):
            yield from _wrong_types(value, default or {}, f"{path}{key}.")
            continue
        kind = next((each for each in _TYPES if isinstance(default, each)), None)
        if kind is not None and (not isinstance(value, kind) or (kind is Real and isinstance(value, bool))):
            yield f"{path}{key}: must be {_TYPES[kind]} (found {value!r})"


_TYPES: dict[type, str] = {bool: "true or false", Real: "a number", str: "a text", dict: "a section of keys"}


def _explain(item: Any, title: str, settings: Mapping[str, Any], version: str) -> str:
    """The line of one of pydantic's errors, which do not contain the section's name."""
    location = item["loc"]
    section = next((f"{name}." for name, value in settings.items() if location and _holds(value, location)), "")
    path = f"deepspeed.{section}{'.'.join(map(str, location))}".rstrip(".")
    if item["type"] == "extra_forbidden":
        return f"{path}: unknown to DeepSpeed {version}; {_nearest(str(location[-1]), _fields(title, location))}"
    message = " ".join(item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ").split())
    return f"{path}: {message}" + (f" (found {item['input']!r})" if location else "")


def _holds(value: Any, location: Sequence[Any]) -> bool:
    for part in location:
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


def _fields(title: str, location: Sequence[Any]) -> Iterator[str]:
    """The known keys of the section of a location's last key; `title` is the name of its model."""
    model = next((each for each in _models(BaseModel) if each.__name__ == title), None)
    for part in location[:-1]:
        field = model.model_fields.get(part) if model is not None else None
        kinds = (field.annotation, *get_args(field.annotation)) if field is not None else ()
        model = next((each for each in kinds if isinstance(each, type) and issubclass(each, BaseModel)), None)
    if model is not None:
        yield from (field.alias or name for name, field in model.model_fields.items())


def _models(base: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for each in base.__subclasses__():
        yield each
        yield from _models(each)


def _nearest(key: str, known: Iterator[str]) -> str:
    keys = sorted(set(known))
    near = difflib.get_close_matches(key, keys, n=1)
    if near or not keys:
        return f"did you mean {near[0]!r}?" if near else "leave it out"
    return f"known keys: {', '.join(keys)}" if len(keys) <= MAX_LISTED else "see deepspeed.ai/docs/config-json"


def _leaves(values: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of all values that are not sections, and of empty sections."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _prefixes(path: str) -> Iterator[str]:
    """A dotted path and its prefixes, the longest first."""
    parts = path.split(".")
    yield from (".".join(parts[:length]) for length in range(len(parts), 0, -1))
