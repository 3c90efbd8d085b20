"""Language vectors of ShifCon (arXiv 2410.19453, section 3.1): mean hidden states per language and layer.

They are measured in forward passes without the shift over a probe set (`StateMeans`), and saved as one checked
safetensors file (docs/methods.md, section 1.1).

Shapes: B rows, T tokens, M tokens of a batch (B * T), C tokens of a chunk, L languages, N layers measured, H hidden.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from modeling.errors import ModelError
from modeling.export_info import VECTORS_FILE
from modeling.layers import hidden_size, membership, state_hook
from modeling.weights.checked_file import CheckedFormat
from modeling.weights.weight_files import directory_hash

CHUNK_ELEMENTS = 1 << 19  # fp64 numbers of a chunk: 4 MiB

_FORMAT = CheckedFormat(
    "crosslift language vectors 1",
    ("mean", "state_norm", "tokens"),
    "language vectors",
    "estimate them again",
    optional=("text_mean", "text_deviation"),
)


@dataclass(frozen=True, eq=False)
class LanguageVectors:
    """Mean states per language, on the CPU. A language with `tokens` 0 has no vector.

    Raises:
        ModelError: values that are impossible, such as a dominant language without a vector.
    """

    languages: tuple[str, ...]
    dominant: str
    layers: tuple[int, ...]  # the l of each h[l] measured
    area: tuple[int, int]  # (toward, back)
    mean: Tensor  # (L, N, H) fp32
    state_norm: Tensor  # (L, N) fp32, mean length of a token's state
    tokens: Tensor  # (L,) int64, the number of tokens of each mean
    estimator: str  # description of what was averaged
    model_hash: str  # of the model measured; vectors fit no other model
    strength: float = 1.0  # factor of the shift
    # of texts' mean states entering `area[0]`, for `nearest`: (L, H) means, and (H,) standard deviations over texts of
    # the dominant language; both fp32, empty if they were not measured
    text_mean: Tensor = field(default_factory=lambda: torch.empty(0))
    text_deviation: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        shape = len(self.languages), len(self.layers)
        wrong = {
            "languages are not distinct": len(set(self.languages)) != len(self.languages),
            "layers are not distinct": len(set(self.layers)) != len(self.layers),
            "mean is not (languages, layers, hidden) of float32": self.mean.dim() != 3
            or (self.mean.shape[:2], self.mean.dtype) != (shape, torch.float32),
            "state_norm is not (languages, layers) of float32": (self.state_norm.shape, self.state_norm.dtype)
            != (shape, torch.float32),
            "tokens is not (languages,) of int64": (self.tokens.shape, self.tokens.dtype) != (shape[:1], torch.int64),
            f"area {self.area} is not two measured layers in order": len(self.area) != 2
            or self.area[0] >= self.area[1]
            or not {*self.area} <= {*self.layers},
            "a value is not finite": not all(
                each.isfinite().all() for each in (self.mean, self.state_norm, self.text_mean, self.text_deviation)
            ),
            "text_mean and text_deviation do not fit the vectors": self.text_mean.numel() > 0
            and (self.text_mean.shape, self.text_deviation.shape)
            != ((shape[0], *self.mean.shape[2:]), self.mean.shape[2:]),
        }
        for problem, is_wrong in wrong.items():
            if is_wrong:
                raise ModelError(f"language vectors: {problem}")
        if not self.has(self.dominant):
            raise ModelError(f"language vectors: dominant language {self.dominant!r} has no vector")

    def has(self, language: str) -> bool:
        """Whether this language has a vector; a language without one is never shifted."""
        return language in self.languages and bool(self.tokens[self.languages.index(language)] > 0)

    def at(self, layer: int) -> Tensor:
        """(L, H) fp32: the mean states entering this layer."""
        if layer not in self.layers:
            raise ModelError(f"language vectors: layer {layer} was not measured, only {self.layers}")
        return self.mean[:, self.layers.index(layer)]

    def nearest(self, state: Tensor) -> str:
        """The language whose texts have the mean state nearest to that of a text.

        Distances are Euclidean after a division by the standard deviations over texts, dimension by dimension: in a
        pretrained model, a few dimensions with a very large variance would decide them otherwise.

        Args:
            state: (H,), the mean of the unshifted `h[toward]` over the text's content tokens.

        Raises:
            ModelError: means of texts were not measured.
        """
        if not self.text_mean.numel():
            raise ModelError("the language vectors hold no means of texts, so a text's language must be given")
        distances = ((self.text_mean - state.float().cpu()) / self.text_deviation).norm(dim=1)
        return self.languages[int(distances.masked_fill(self.tokens == 0, torch.inf).argmin())]

    def save(self, path: Path | str) -> None:
        """Writes one safetensors file in place."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor) and value.numel()}
        about = {name: value for name, value in vars(self).items() if not isinstance(value, Tensor)}
        _FORMAT.save(Path(path), about, tensors)

    @classmethod
    def load(cls, path: Path | str) -> LanguageVectors:
        """Reads what `save` wrote.

        Raises:
            ModelError: the file is missing, damaged or not what was saved.
        """
        about, tensors = _FORMAT.load(Path(path))
        try:
            lists = {name: tuple(value) for name, value in about.items() if isinstance(value, list)}
            values: dict[str, Any] = {**about, **lists, **tensors}
            return cls(**values)
        except (ModelError, TypeError) as error:
            raise _FORMAT.unusable(Path(path), error) from error

    @classmethod
    def of_export(cls, directory: Path) -> LanguageVectors:
        """Those beside the weights of an export.

        Raises:
            ModelError: the file is missing, or belongs to other weights.
        """
        file = directory / VECTORS_FILE
        if not file.is_file():
            raise ModelError(f"{file}: missing, and a ShifCon model does not run without it; copy it from the export")
        vectors = cls.load(file)
        if vectors.model_hash != (found := directory_hash(directory)):
            raise ModelError(
                f"{file}: belongs to the weights {vectors.model_hash or '(no hash)'}, but those beside it are {found}; "
                "copy both from one export, or export again"
            )
        return vectors


class StateMeans:
    """Sums states by language at chosen layers, in fp64 in chunks of tokens:

        with StateMeans(model, layers, n_languages) as means, torch.no_grad():
            with means.batch(languages): model(...)

    Its hooks come after those of a LanguageShift that was installed before, so it measures unshifted states only inside
    `shift.disabled()`. With several ranks, all-reduce `sums`, `norms` and `counts` before `vectors()`.

    Attributes:
        sums: (L, N, H) fp64.
        norms: (L, N) fp64, summed lengths of token states.
        counts: (L,) int64.
    """

    def __init__(self, model: nn.Module, layers: Sequence[int], n_languages: int) -> None:
        self.layers = tuple(layers)
        self.sums = torch.zeros(n_languages, len(layers), hidden_size(model), dtype=torch.float64)
        self.norms = torch.zeros(n_languages, len(layers), dtype=torch.float64)
        self.counts = torch.zeros(n_languages, dtype=torch.int64)
        self._model = model
        self._handles: list[RemovableHandle] = []
        self._members_LM: Tensor | None = None  # which of the batch's tokens are of each language

    def __enter__(self) -> StateMeans:
        self._handles = [state_hook(self._model, layer, self._adder(i)) for i, layer in enumerate(self.layers)]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def batch(self, languages: Tensor) -> Iterator[None]:
        """Inside, forward passes are summed by `languages`, (B, T) int64; tokens of -1 are left out."""
        for name in ("sums", "norms", "counts"):
            setattr(self, name, getattr(self, name).to(languages.device))
        self._members_LM = membership(languages, len(self.counts))
        try:
            yield
        finally:
            self._members_LM = None

    def _adder(self, position: int) -> Callable[[Tensor], None]:
        def add(hidden_BTH: Tensor) -> None:
            if self._members_LM is None:
                return
            if position == 0:
                self.counts += self._members_LM.sum(dim=1)
            sums_LH, norms_L = self.sums[:, position], self.norms[:, position]
            hidden_MH = hidden_BTH.detach().flatten(0, 1)
            tokens = max(1, CHUNK_ELEMENTS // max(hidden_MH.shape[1], len(norms_L)))
            chunks = zip(hidden_MH.split(tokens), self._members_LM.split(tokens, dim=1), strict=True)
            for states, members in chunks:
                states_CH, members_LC = states.double(), members.double()
                sums_LH.addmm_(members_LC, states_CH)
                norms_L.addmv_(members_LC, states_CH.norm(dim=1))

        return add

    def means(self) -> Tensor:
        """(L, N, H) fp32 on the CPU; zeros for a language without tokens."""
        return (self.sums.cpu() / self.counts.cpu().clamp(min=1)[:, None, None]).float()

    def vectors(
        self,
        languages: Sequence[str],
        dominant: str,
        area: tuple[int, int],
        *,
        mean: Tensor | None = None,
        estimator: str = "mean over tokens, unshifted",
        model_hash: str = "",
        strength: float = 1.0,
    ) -> LanguageVectors:
        """The means of what was summed.

        Args:
            mean: (L, N, H) fp32 by another estimator instead of the means over tokens.

        Raises:
            ModelError: the dominant language had no token.
        """
        counts = self.counts.cpu()
        return LanguageVectors(
            languages=tuple(languages),
            dominant=dominant,
            layers=self.layers,
            area=area,
            mean=self.means() if mean is None else mean,
            state_norm=(self.norms.cpu() / counts.clamp(min=1)[:, None]).float(),
            tokens=counts.clone(),
            estimator=estimator,
            model_hash=model_hash,
            strength=strength,
        )


def random_directions(vectors: LanguageVectors) -> LanguageVectors:
    """Vectors at the same distances from those of the dominant language, in random directions: an ablation.

    A direction depends on the language and the layer alone, so it is the same in every estimate.
    """
    dominant_NH = vectors.mean[vectors.languages.index(vectors.dominant)]
    mean = vectors.mean.clone()
    for number, language in enumerate(vectors.languages):
        for place, layer in enumerate(vectors.layers):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{language} {layer}".encode()))
            direction = torch.randn(mean.shape[2], generator=generator)
            length = (mean[number, place] - dominant_NH[place]).norm()
            mean[number, place] = dominant_NH[place] + length * direction / direction.norm()
    return replace(vectors, mean=mean, estimator=f"{vectors.estimator}, random directions")


def restoration_error(vectors: LanguageVectors, shifted_back_means: Tensor) -> dict[str, float]:
    """The distance of each language from its vector after the shift back, relative to the length of the shift.

    Args:
        vectors: those of the shift.
        shifted_back_means: (L, H), mean `h[back]` after the shift back, over the tokens of the vectors.

    Returns:
        Per language `|mean - v[lang,back]| / |v[lang,back] - v[d,back]|`, without the dominant language and those
        without a vector.
    """
    own = vectors.at(vectors.area[1]).double()
    dominant = own[vectors.languages.index(vectors.dominant)]
    errors = (shifted_back_means.double().cpu() - own).norm(dim=1) / (own - dominant).norm(dim=1)
    return {
        language: float(error)
        for language, error in zip(vectors.languages, errors, strict=True)
        if language != vectors.dominant and vectors.has(language)
    }
