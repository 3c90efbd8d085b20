"""Writes the shift of one language into a model's weights: a plain checkpoint that any engine serves at no extra cost.

For one fixed language, the shift adds a constant to the residual stream at two places. A layer whose output is
`residual + c * projection(...)` adds the same constant through a bias of its last projection, `shift / c`, at the
layers `toward - 1` and `back - 1` (docs/methods.md, section 1.7). Biases are a matter of the config: some architectures
always have them, some have a switch, and Qwen 2 and Mistral are written as Llama, which computes the same and has both
switches. Whatever is made is compared with the shifted model before it is written, so a layer of another form, such as
one with a norm after its projection, is refused and not served with wrong states.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modeling.errors import ModelError
from modeling.export_info import EXPORT_FILE, FORMAT, ExportInfo
from modeling.layers import backbone, decoder_layers
from modeling.loading import load_config, load_pretrained, resolve_directory
from modeling.shifcon.language_vectors import LanguageVectors
from modeling.shifcon.shift import LanguageShift, shift_tables

TOLERANCE = 1e-4  # of the largest logit, in fp32
SAMPLE = (2, 24)  # rows and tokens of the comparison
SWITCHES = ("mlp_bias", "use_bias")  # of configs, that give the projections biases
# The last projection of a layer, by its name in transformers: Llama and most others; GPT-NeoX, BLOOM; Phi; GPT-2.
PROJECTIONS = ("down_proj", "dense_4h_to_h", "fc2", "c_proj")
COPIED = (".json", ".jinja", ".model", ".txt")  # tokenizer and chat template
SERVE = "serve the model with its vectors"


def bake(directory: Path | str, language: str, output: Path) -> float:
    """Writes a plain model for one language to the empty folder `output`.

    Args:
        directory: the export of a ShifCon run, with its vectors.
        language: of the prompts and of the answers.

    Returns:
        The largest difference of a logit from the shifted model's in fp32, relative to the largest logit.

    Raises:
        ModelError: the model cannot carry the shift of this language, with the reason.
    """
    folder = resolve_directory(directory)
    info = ExportInfo.read(folder)
    vectors = _vectors(folder, info, language)
    _refuse_other_shifts(folder, info, language)
    stored_dtype = getattr(load_config(folder), "dtype", None) or torch.float32
    shifted = load_pretrained(folder, torch.float32, "eager", "cpu")
    toward, back = (shift[vectors.languages.index(language)] for shift in shift_tables(vectors))
    baked = _with_biases(shifted)
    if vectors.area[0] == 0:
        _add_to_embeddings(baked, toward)
    else:
        _add_to_output(baked, vectors.area[0] - 1, toward)
    _add_to_output(baked, vectors.area[1] - 1, back)
    difference = _difference(shifted, baked, vectors, language)
    if difference > TOLERANCE:
        raise ModelError(
            f"{folder}: the shift cannot be written into the weights of {type(shifted).__name__}: logits would differ "
            f"by {difference:.1e} of the largest, so its layers do not add their last projection as it is; {SERVE}"
        )
    for parameter in baked.parameters():
        parameter.data = parameter.data.to(stored_dtype)
    baked.config.dtype = stored_dtype
    baked.save_pretrained(output)
    for file in folder.iterdir():
        if file.is_file() and file.suffix in COPIED and not (output / file.name).exists():
            shutil.copy(file, output / file.name)
    one = replace(
        info, languages=(language,), dominant=language, response_language=language, shifted=False, check=None,
        baked=language,
    )  # fmt: skip
    text = json.dumps({"format": FORMAT, **asdict(one)}, ensure_ascii=False, indent=1)
    (output / EXPORT_FILE).write_text(text + "\n", encoding="utf-8")
    return difference


def _vectors(folder: Path, info: ExportInfo, language: str) -> LanguageVectors:
    if not info.shifted:
        raise ModelError(f"{folder}: not trained with the shift, so there is none to write into the weights")
    vectors = LanguageVectors.of_export(folder)
    if language == vectors.dominant:
        raise ModelError(f"{language!r} is the dominant language, which is not shifted: the export itself serves it")
    if not vectors.has(language):
        known = ", ".join(each for each in vectors.languages if vectors.has(each) and each != vectors.dominant)
        raise ModelError(f"{language!r} has no language vector; there are {known}")
    return vectors


def _refuse_other_shifts(folder: Path, info: ExportInfo, language: str) -> None:
    """A bias acts on every token alike, so prompt, answer and first token need the same shift."""
    if not info.shift_first_token:
        raise ModelError(f"{folder}: was trained without a shift of the first token, but a bias shifts every token")
    if info.response_language not in (None, language):
        raise ModelError(
            f"{folder}: answers in {info.response_language!r}, but a bias shifts answers to {language!r} too; {SERVE}"
        )


def _with_biases(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model whose last projections have biases, 0 where they are new."""
    config = _config_with_biases(model)
    with torch.random.fork_rng(devices=[]):
        made: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    missing, unexpected = made.load_state_dict(model.state_dict(), strict=False)
    if unexpected or not all(name.endswith(".bias") or _is_tied(made, name) for name in missing):
        raise ModelError(
            f"{type(model).__name__}: with biases, other weights change too: {[*missing, *unexpected][:3]}"
        )
    with torch.no_grad():
        for name in missing:
            if name.endswith(".bias"):
                made.get_parameter(name).zero_()
    made.generation_config = model.generation_config
    return made.eval()


def _is_tied(model: PreTrainedModel, name: str) -> bool:
    """Whether a weight is the LM head's, and the embeddings' at the same time."""
    return bool(model.config.tie_word_embeddings) and model.get_parameter(name) is model.get_input_embeddings().weight


def _config_with_biases(model: PreTrainedModel) -> PreTrainedConfig:
    config = model.config
    if _projection(model, 0).bias is not None:
        return config
    for name in SWITCHES:
        if getattr(config, name, None) is False:
            return type(config).from_dict({**config.to_dict(), name: True})
    if convert := AS_LLAMA.get(config.model_type):
        return convert(config)
    raise ModelError(
        f"{type(model).__name__} has no biases in its last projections, and its config has no switch for them; {SERVE}"
    )


def _as_llama(config: PreTrainedConfig) -> LlamaConfig:
    """Qwen 2, and Mistral without a sliding window, compute what Llama with these switches does."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None:
        raise ModelError(f"a {config.model_type} with a sliding window ({window}) cannot be written as Llama; {SERVE}")
    kept = set(LlamaConfig().to_dict()) - {"model_type", "architectures", "transformers_version"}
    values = {name: value for name, value in config.to_dict().items() if name in kept}
    return LlamaConfig(**{**values, "attention_bias": True, "mlp_bias": True})


AS_LLAMA: Mapping[str, Callable[[PreTrainedConfig], LlamaConfig]] = {"qwen2": _as_llama, "mistral": _as_llama}


def _projection(model: PreTrainedModel, layer: int) -> Any:
    """The linear module whose output a layer adds to the residual stream last."""
    found = [
        module
        for name, module in decoder_layers(model)[layer].named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.rpartition(".")[2] in PROJECTIONS and "attn" not in name
    ]
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__}: a layer has {len(found)} last projections and not one, as in a mixture of "
            f"experts, so a bias cannot carry the shift; {SERVE}"
        )
    return found[0]


def _add_to_output(model: PreTrainedModel, layer: int, shift_H: Tensor) -> None:
    """Adds a constant to what a layer returns; Granite multiplies its projections by `residual_multiplier`."""
    with torch.no_grad():
        _projection(model, layer).bias += shift_H / getattr(model.config, "residual_multiplier", 1.0)


def _add_to_embeddings(model: PreTrainedModel, shift_H: Tensor) -> None:
    """Adds a constant to every token's embedding; a head with the same weight keeps its own.

    BLOOM normalises its embeddings, so there the norm's bias carries the constant.
    """
    if (norm := getattr(backbone(model), "word_embeddings_layernorm", None)) is not None:
        norm.bias.data += shift_H
        return
    head: Any = model.get_output_embeddings()
    table: Any = model.get_input_embeddings()
    if head.weight is table.weight:
        head.weight = nn.Parameter(table.weight.detach().clone())
        model.config.tie_word_embeddings = False
    with torch.no_grad():
        table.weight += shift_H


@torch.no_grad()
def _difference(shifted: PreTrainedModel, baked: PreTrainedModel, vectors: LanguageVectors, language: str) -> float:
    """The largest difference of a logit on random tokens, relative to the largest logit."""
    generator = torch.Generator().manual_seed(0)
    table: Any = shifted.get_input_embeddings()
    tokens = torch.randint(0, len(table.weight), SAMPLE, generator=generator)
    shift = LanguageShift(shifted, *vectors.area)
    shift.set_vectors(vectors)
    try:
        with shift.batch(torch.full(SAMPLE, vectors.languages.index(language))):
            expected = shifted(tokens).logits
    finally:
        shift.remove()
    return float((baked(tokens).logits - expected).abs().max() / expected.abs().max())
