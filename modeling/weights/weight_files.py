"""Reads the headers of a model directory's safetensors files, and hashes its weights.

A directory holds `model.safetensors`, or shards and their index. No tensor is read whole here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import parse_local_safetensors_file_metadata
from huggingface_hub.errors import SafetensorsParsingError

from modeling.errors import ModelError

SAMPLE_BYTES = 256  # of each end of a tensor, read by directory_hash
LFS_POINTER = b"version https://git-lfs"
# Formats of weights that are not read.
OTHER_WEIGHTS = {
    "pytorch_model*.bin*": "pytorch_model.bin",
    "consolidated*.pth": "PyTorch's",
    "tf_model*.h5": "TensorFlow's",
    "flax_model*.msgpack": "Flax's",
}


def one_line(error: Exception, limit: int = 300) -> str:
    """The text of an error as one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + "..."


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The place of one tensor: `start` and `stop` are byte offsets in `file`; `dtype` is safetensors' name."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def sample(self) -> bytes:
        """The tensor's first and last bytes."""
        with self.file.open("rb") as stream:
            stream.seek(self.start)
            head = stream.read(min(SAMPLE_BYTES, self.stop - self.start))
            stream.seek(max(self.start, self.stop - SAMPLE_BYTES))
            return head + stream.read(min(SAMPLE_BYTES, self.stop - self.start))


def refuse_stub(file: Path) -> None:
    """Raises ModelError for an empty file or a git-LFS pointer."""
    with file.open("rb") as stream:
        head = stream.read(len(LFS_POINTER))
    if not head:
        raise ModelError(f"{file}: empty; copy it again")
    if head == LFS_POINTER:
        raise ModelError(f"{file}: a git-LFS pointer, not the file itself; fetch it with `git lfs pull`")


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every weight of a model directory by name, from file headers.

    Raises:
        ModelError: a file is missing or damaged, or the index does not match the files.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    places: dict[str, str] = {}  # the file of each weight according to the index
    if single.is_file():
        files = [single]
    elif index.is_file():
        places = _weight_map(index)
        # only inside the directory
        files = [directory / name for name in sorted({Path(name).name for name in places.values()})]
        if absent := [file.name for file in files if not file.is_file()]:
            raise ModelError(
                f"{index}: names {len(files)} files, {len(absent)} of them missing: {', '.join(absent[:5])}; "
                "copy all of them"
            )
    else:
        raise ModelError(f"{directory}: {other_weights(directory)}")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _read_header(file):
            if tensor.key in tensors:
                raise ModelError(f"{file}: {tensor.key} is in {tensors[tensor.key].file.name} as well")
            tensors[tensor.key] = tensor
    for key, name in places.items():
        if key not in tensors or tensors[key].file.name != Path(name).name:
            raise ModelError(f"{index}: lists {key} in {name}, which does not contain it; copy both from one release")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    refuse_stub(index)
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(key): str(name) for key, name in places.items()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index}: not a safetensors index ({one_line(error)})") from error


def other_weights(directory: Path) -> str:
    """What a directory without usable weights contains instead, and what would be right."""
    if (directory / "adapter_config.json").is_file():
        return (
            "a LoRA adapter, not a model; merge it once with peft's "
            "AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(NEW_DIRECTORY)"
        )
    for pattern, what in OTHER_WEIGHTS.items():
        if found := sorted(directory.glob(pattern)):
            return (
                f"only {what} weights ({found[0].name}); convert once with "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(NEW_DIRECTORY)"
            )
    if found := sorted(directory.glob("*.gguf")):
        return f"only GGUF weights ({found[0].name}), which are quantised; take the model's safetensors release"
    shards = len(list(directory.glob("*.safetensors")))
    named = f"; the {shards} *.safetensors files need an index of their tensors" if shards else ""
    return f"no model.safetensors and no model.safetensors.index.json there{named}"


def _read_header(file: Path) -> list[StoredTensor]:
    try:
        refuse_stub(file)
        header = parse_local_safetensors_file_metadata(file)
        with file.open("rb") as stream:
            data = 8 + int.from_bytes(stream.read(8), "little")  # where tensors begin: after the header and its length
        tensors = [
            StoredTensor(file, key, info.dtype, tuple(info.shape), data + begin, data + end)
            for key, info in header.tensors.items()
            for begin, end in [info.data_offsets]
        ]
        size = file.stat().st_size
    except (OSError, SafetensorsParsingError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: not a readable safetensors file ({one_line(error)}); copy it again") from error
    end = max((tensor.stop for tensor in tensors), default=data)
    if size != end:
        raise ModelError(
            f"{file}: {size} bytes long, but its header describes {end}: cut off or damaged; copy it again"
        )
    return tensors


def directory_hash(directory: str | Path) -> str:
    """A hash of a model's weights, computed from a small part of each tensor.

    It covers every tensor's name, dtype, shape, first and last 256 bytes, and does not depend on the shards.
    """
    digest = hashlib.blake2b(digest_size=16)
    for key, tensor in sorted(stored_tensors(Path(directory)).items()):
        digest.update(f"{key}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.sample())
    return digest.hexdigest()
