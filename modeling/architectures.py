"""The heads a model can be opened with, and the Hugging Face auto class of each."""

from __future__ import annotations

from typing import Any, Literal

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
)

from modeling.errors import ModelError

Architecture = Literal[
    "causal-lm", "masked-lm", "sequence-classification", "token-classification", "question-answering"
]
# The architecture that is trained on rows of a kind: conversations, or those of an encoder's task.
ARCHITECTURE_OF: dict[str, Architecture] = {
    "chat": "causal-lm",
    "classification": "sequence-classification",
    "tagging": "token-classification",
    "qa": "question-answering",
    "text": "masked-lm",
}

_CLASSES: dict[str, tuple[Any, Any]] = {
    "causal-lm": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    "masked-lm": (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING),
    "sequence-classification": (AutoModelForSequenceClassification, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    "token-classification": (AutoModelForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
    "question-answering": (AutoModelForQuestionAnswering, MODEL_FOR_QUESTION_ANSWERING_MAPPING),
}


def auto_class(architecture: Architecture) -> Any:
    """transformers' `AutoModelFor...` of this architecture."""
    return _CLASSES[architecture][0]


def model_class(config: PreTrainedConfig, architecture: Architecture) -> Any:
    """The model class of a config with this head.

    Raises:
        ModelError: transformers has no such class, or a causal LM is requested for an encoder's config. transformers
            has a causal class for most encoders, but without `is_decoder` it attends to later tokens too.
    """
    mapping = _CLASSES[architecture][1]
    if type(config) not in mapping:
        what = "is not a decoder language model" if architecture == "causal-lm" else f"has no {architecture} head"
        raise ModelError(f"a {config.model_type} model {what}")
    encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    if architecture == "causal-lm" and encoder:
        raise ModelError(
            f"a {config.model_type} model is an encoder, not a decoder language model: it cannot generate text"
        )
    return mapping[type(config)]
