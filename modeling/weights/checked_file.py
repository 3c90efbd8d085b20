"""The format of small safetensors files with a checksum, which are read whole and unchanged or refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modeling.errors import ModelError
from modeling.weights.weight_files import one_line


@dataclass(frozen=True, slots=True)
class CheckedFormat:
    """A kind of file: tensors, a description in JSON, and a SHA-256 over both.

    Attributes:
        name: names the kind and its version in the file.
        tensors: names of the tensors in the file.
        optional: names of tensors that files of earlier versions lack.
        content: what the file holds, for error messages.
        remedy: what a user can do about a file that cannot be used.
    """

    name: str
    tensors: tuple[str, ...]
    content: str
    remedy: str
    optional: tuple[str, ...] = ()

    def save(self, path: Path, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Writes a file in place; callers that need it whole after a crash write into a folder that they rename.

        Args:
            path: the file.
            about: JSON values.
            tensors: on the CPU.
        """
        header = json.dumps(dict(about), ensure_ascii=False)
        metadata = {"format": self.name, "about": header, "sha256": _checksum(header, tensors)}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)

    def load(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The description and the tensors that `save` wrote.

        Raises:
            ModelError: the file is missing, damaged, changed or of another format.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != self.name:
                    raise ModelError(f"its format is {metadata.get('format')!r}, not {self.name!r}")
                there = list(file.keys())
                names = (*self.tensors, *(name for name in self.optional if name in there))
                tensors = {name: file.get_tensor(name).clone() for name in names}
            if _checksum(metadata["about"], tensors) != metadata["sha256"]:
                raise ModelError("its content does not match its checksum")
            return json.loads(metadata["about"]), tensors
        except (ModelError, SafetensorError, OSError, KeyError, ValueError) as error:
            raise self.unusable(path, error) from error

    def unusable(self, path: Path, error: Exception) -> ModelError:
        """An error of one line that names the file, the reason and the remedy."""
        return ModelError(f"{path}: no usable {self.content}: {one_line(error)}; {self.remedy}")


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    content = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        content.update(tensors[name].contiguous().numpy().tobytes())
    return content.hexdigest()
