"""Settings and learned numbers of X-Mixup, as a checked file beside an encoder's weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from modeling.errors import ModelError
from modeling.weights.checked_file import CheckedFormat
from modeling.xmixup.cross_attention import ENTROPIES, EntropyName

MIXUP_FILE = "xmixup.safetensors"
RATIO_MODULE = "mixup_ratio"  # the submodule of the mixed layer that holds `w` and `b`
_LEARNED = ("w", "b")
_FORMAT = CheckedFormat("crosslift x-mixup 1", _LEARNED, "X-Mixup state", "export the model again")


@dataclass(frozen=True, slots=True)
class MixupState:
    """`lam = lam0 * sigmoid(w * entropy + b)`, or the number `ratio`, at encoder layer `layer` (0-based)."""

    layer: int
    lam0: float = 0.5
    entropy: EntropyName = "true"
    ratio: float | Literal["learned"] = "learned"
    w: float = 1.0
    b: float = 0.0
    model_hash: str = ""  # of the weights it was trained with; "" before an export

    def __post_init__(self) -> None:
        """Raises ModelError for values that give no ratio between 0 and 1."""
        wrong = {
            f"layer {self.layer!r} is not 0 or more": self.layer < 0,
            f"lam0 {self.lam0!r} is not in 0..1": not 0 <= self.lam0 <= 1,
            f"entropy {self.entropy!r} is not one of {', '.join(ENTROPIES)}": self.entropy not in ENTROPIES,
            f"ratio {self.ratio!r} is neither 'learned' nor a number in 0..1": self.ratio != "learned"
            and not (isinstance(self.ratio, int | float) and 0 <= self.ratio <= 1),
            f"w {self.w!r} or b {self.b!r} is not finite": not (abs(self.w) < torch.inf and abs(self.b) < torch.inf),
        }
        for problem, is_wrong in wrong.items():
            if is_wrong:
                raise ModelError(f"x-mixup: {problem}")

    def save(self, path: Path | str) -> None:
        """Writes one safetensors file in place."""
        about = {name: getattr(self, name) for name in ("layer", "lam0", "entropy", "ratio", "model_hash")}
        tensors = {name: torch.tensor([getattr(self, name)], dtype=torch.float64) for name in _LEARNED}
        _FORMAT.save(Path(path), about, tensors)

    @classmethod
    def load(cls, path: Path | str) -> MixupState:
        """Reads what `save` wrote.

        Raises:
            ModelError: the file is missing, damaged or not what was saved.
        """
        about, tensors = _FORMAT.load(Path(path))
        return cls(**about, w=float(tensors["w"]), b=float(tensors["b"]))


def is_mixup_weight(name: str) -> bool:
    """Whether a parameter of this name belongs to X-Mixup and not to the plain model."""
    return RATIO_MODULE in name.split(".")
