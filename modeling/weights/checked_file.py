"""One small safetensors file that is either whole and unchanged, or refused.

In: tensors and a description. Out: a file with a checksum over both, written under a temporary name and renamed.
Next: `mixup_state.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from modeling.errors import ModelError
from modeling.weights.weight_files import one_line


def save_checked(path: Path, form: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes `about` (JSON values) and `tensors`; `form` names the kind and version of the file."""
    header = json.dumps(dict(about), ensure_ascii=False)
    metadata = {"format": form, "about": header, "sha256": _digest(header, tensors)}
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(to_bytes(dict(tensors), metadata))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def load_checked(path: Path, form: str, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `save_checked` wrote. Raises ModelError if it is missing, torn, changed or of another form."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != form:
                raise ModelError(f"its format is {metadata.get('format')!r}, not {form!r}")
            tensors = {name: file.get_tensor(name).clone() for name in names}
        if _digest(metadata["about"], tensors) != metadata["sha256"]:
            raise ModelError("its content does not match its checksum")
        return json.loads(metadata["about"]), tensors
    except (ModelError, SafetensorError, OSError, KeyError, ValueError) as error:
        raise ModelError(f"{path}: cannot be used: {one_line(error)}; export the model again") from error


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    content = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        content.update(tensors[name].contiguous().numpy().tobytes())
    return content.hexdigest()
