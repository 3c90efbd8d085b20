"""The text settings of an exported decoder: chat template, tokens that end an answer, sampling defaults.

Plain `generate` must stop at the end token of training, and `apply_chat_template` must write the prompt that
training wrote, whatever the base model's files contain.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.config import SourceConfig
from data_pipeline.text.chat import Chat
from data_pipeline.text.jinja_template import Defaults, jinja_template
from training.config import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

log = logging.getLogger(__name__)
GENERATION_FILE = "generation_config.json"
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def set_text_files(
    data: DataConfig,
    base: Path,
    model_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    of_model: bool,
) -> dict[str, Any]:
    """Put the trained chat template into `tokenizer`, special ids into `model_config`; the generation config's values.

    Args:
        base: a folder with the base model's generation config, if it has one.
        of_model: whether the tokenizer is the base model's own.
    """
    chat = Chat(tokenizer, data.template, data.languages)
    file = base / GENERATION_FILE
    generation = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    ids = _special_ids(chat, model_config, generation, of_model=of_model)
    for each in (model_config, model_config.get_text_config()):
        for name, value in ids.items():
            setattr(each, name, value)
    fixed = fixed_response_language(data.sources)
    may_differ = any(source.response_language or source.columns.response_language for source in data.sources)
    text, wrong = jinja_template(chat, Defaults(data.dominant, fixed, may_differ))
    if wrong is not None:
        log.warning("the exported chat template does not give the tokens of training for %s; `generate` does", wrong)
    if isinstance(tokenizer.chat_template, dict) and data.template.name == "chat":
        tokenizer.chat_template = {**tokenizer.chat_template, "default": text}
    else:
        tokenizer.chat_template = text
    # With `_from_model_config`, transformers would derive it from the model's config again.
    kept = {key: value for key, value in generation.items() if key not in ("_from_model_config", *IDS)}
    pad = ids["pad_token_id"] if ids["pad_token_id"] is not None else chat.template.end_id
    return {**ids, "pad_token_id": pad, **kept}


def _special_ids(
    chat: Chat, model_config: PreTrainedConfig, generation: Mapping[str, Any], *, of_model: bool
) -> dict[str, Any]:
    """Begin, end and padding tokens. The trained end token comes first; those of the base model also end an answer.

    If the tokenizer is not the base model's, the base model's ids name other tokens and are ignored.
    """
    tokenizer = chat.tokenizer
    text_config = model_config.get_text_config()
    files = [generation, vars(text_config)] if of_model else []

    def one(name: str) -> int | None:
        known = [getattr(tokenizer, name), *(file.get(name) for file in files)]
        return next((value for value in known if isinstance(value, int)), None)

    ends = [chat.template.end_id]
    for found in (*(file.get("eos_token_id") for file in files), tokenizer.eos_token_id):
        ends += found if isinstance(found, list) else [found]
    known = dict.fromkeys(end for end in ends if isinstance(end, int) and 0 <= end < text_config.vocab_size)
    eos = list(known) if len(known) > 1 else next(iter(known), None)
    return {"bos_token_id": one("bos_token_id"), "eos_token_id": eos, "pad_token_id": one("pad_token_id")}


def fixed_response_language(sources: Sequence[SourceConfig]) -> str | None:
    """The language of all answers if the sources fix it; None if answers are in the prompt's language.

    A corpus in a single language fixes nothing: its answers are in the language of their prompts.
    """
    found = {_response_language_of(source) for source in sources}
    return found.pop() if len(found) == 1 and any(source.response_language for source in sources) else None


def _response_language_of(source: SourceConfig) -> str | None:
    """The language of all of a source's answers; None if its rows may differ."""
    if source.columns.response_language is not None:
        return None
    if source.response_language is not None:
        return source.response_language
    if source.languages is not None:
        return source.languages[0] if len(source.languages) == 1 else None
    return source.language if source.columns.language is None else None
