"""A model directory's safetensors files, known by their headers: names, types, shapes, places.

In: a directory with `model.safetensors`, or shards and their index. Out: `StoredTensor`s and the hash that
tells one model's weights from another's. No tensor is read whole here.
Next: `loading.py` fills models from them; `generation.py` checks that vectors belong to the weights.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from modeling.errors import ModelError

SAMPLE_BYTES = 256  # of each end of a tensor, read by directory_hash
MAX_HEADER_BYTES = 100_000_000


def one_line(error: Exception, limit: int = 300) -> str:
    """What an error says, as the one line that people get."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + "..."


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: `start`, `stop` are byte offsets in `file`; `dtype` as safetensors names it."""

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


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every weight of a model directory, from file headers. Raises ModelError on absent or broken files."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index}: not a safetensors index ({one_line(error)})") from error
        files = [directory / Path(name).name for name in names]  # never outside the directory
    elif any(directory.glob("pytorch_model*.bin*")):
        raise ModelError(
            f"{directory}: only pytorch_model.bin weights; convert once with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(NEW_DIRECTORY)"
        )
    else:
        raise ModelError(f"{directory}: no model.safetensors and no model.safetensors.index.json there")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for tensor in _read_header(file):
            if tensor.key in tensors:
                raise ModelError(f"{file}: {tensor.key} is in {tensors[tensor.key].file.name} as well")
            tensors[tensor.key] = tensor
    return tensors


def _read_header(file: Path) -> list[StoredTensor]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError("no safetensors header")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        base = 8 + length
        tensors = [
            StoredTensor(file, key, entry["dtype"], tuple(entry["shape"]), base + begin, base + end)
            for key, entry in header.items()
            for begin, end in [entry["data_offsets"]]
        ]
        size = file.stat().st_size
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file}: not a readable safetensors file ({one_line(error)})") from error
    end = max((tensor.stop for tensor in tensors), default=base)
    if size != end:
        raise ModelError(
            f"{file}: {size} bytes long where its header asks for {end}: cut off or damaged; copy it again"
        )
    return tensors


def directory_hash(directory: str | Path) -> str:
    """What tells one model's weights from another's, reading little.

    Over every tensor's name, dtype, shape, first and last 256 bytes; the split over shards does not count.
    """
    digest = hashlib.blake2b(digest_size=16)
    for key, tensor in sorted(stored_tensors(Path(directory)).items()):
        digest.update(f"{key}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.sample())
    return digest.hexdigest()
