"""Reads `crosslift.json`, the description in an export beside its weights."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling.errors import ModelError
from modeling.weights.weight_files import one_line

log = logging.getLogger(__name__)
EXPORT_FILE = "crosslift.json"
VECTORS_FILE = "language_vectors.safetensors"
ADAPTER_FOLDER = "adapter"  # the peft adapter directory in the export of a LoRA run
BASE_MODEL_FILE = "base_model.json"  # in the adapter directory: name and hash of the base model
RUN_EXPORT = "model"  # the folder of a run that holds its export
FORMAT = 1


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """The content of `crosslift.json`; the defaults describe a plain Hugging Face directory."""

    objective: str = "sft"
    languages: tuple[str, ...] = ()
    dominant: str | None = None
    template: dict[str, Any] | None = None
    response_language: str | None = None
    shift_first_token: bool = True
    shifted: bool = False  # it was trained with the shift, so it needs its language vectors
    step: int | None = None  # optimizer steps of its training
    task: dict[str, Any] | None = None  # an encoder's task: kind, labels, windows
    sequence_length: int | None = None  # an encoder's longest window in training, in tokens
    baked: str | None = None  # the only language that it serves, whose shift is in its weights
    check: dict[str, Any] | None = None  # result of the comparison with its checkpoint; None in older exports

    @property
    def check_failed(self) -> bool:
        """Whether the export failed its comparison with the checkpoint."""
        return self.check is not None and not self.check["passed"]

    def warn_if_check_failed(self, directory: Path) -> None:
        """Logs a warning if the check failed; called by whatever opens the model."""
        if self.check is not None and self.check_failed:
            log.warning("%s: this export did not pass its check: %s", directory, self.check.get("problem"))

    @classmethod
    def read(cls, directory: Path) -> ExportInfo:
        """The description in a directory, the defaults where there is none.

        Raises:
            ModelError: the file is not of this format.
        """
        file = directory / EXPORT_FILE
        if not file.is_file():
            return cls()
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ModelError(f"{file}: written by another version of crosslift; format {FORMAT} is read here")
            content.setdefault("shifted", content["objective"] == "shifcon")  # missing in older exports
            return cls(**{**content, "languages": tuple(content["languages"])})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{file}: not an export's description ({one_line(error)}); export again") from error
