"""The date that a run's prompts contain, where the tokenizer's chat template prints today's date.

It is fixed when the run first starts (`data.template.date`), and is the same on all ranks, after a resume, in the
export, and in generation from it.
"""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from data_pipeline.records import DataError, Role
from data_pipeline.text.templates import ChatTemplate, TemplateConfig
from data_pipeline.yaml_values import read_yaml
from modeling.weights.weight_files import one_line
from training.checkpoints.run_state import RunState
from training.config import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
CONFIG_FILE = "config.yaml"  # in a run's folder: the resolved run file of its last start


def with_date(data: DataConfig, tokenizer: PreTrainedTokenizerBase, output_dir: Path, found: Path | None) -> DataConfig:
    """`data` with the date of the prompts: the run file's, else the saved one, else today; no date if the chat
    template prints none.

    `found` is the checkpoint that the run resumes from.
    """
    template = data.template
    if template.name != "chat":
        return data
    day = None
    if data.task is None and prints_date(template, tokenizer):
        day = template.date or _saved(output_dir, found) or _today()
    return data.model_copy(update={"template": template.model_copy(update={"date": day})})


def prints_date(config: TemplateConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether prompts of the tokenizer's chat template depend on today's date. Raises DataError as `make_template`."""
    if "strftime_now" not in str(tokenizer.chat_template):
        return False
    one, other = (
        ChatTemplate(config.model_copy(update={"date": day}), tokenizer)
        for day in (dt.date(2001, 2, 3), dt.date(2014, 11, 30))
    )
    turns: tuple[tuple[Role, ...], ...] = (("user",), ("user", "assistant", "user"))
    for roles in (*turns, *(("system", *each) for each in turns)):
        try:
            if one.turns(roles, "", "") != other.turns(roles, "", ""):
                return True
        except DataError:  # for example, a template without system messages
            continue
    return False


def _today() -> dt.date:
    return dt.date.today()


def _saved(output_dir: Path, found: Path | None) -> dt.date | None:
    """The date in the config of the checkpoint, or else of the run's last start."""
    if found is not None and (day := _date_of(RunState.read(found).config)) is not None:
        return day
    file = output_dir / CONFIG_FILE
    if not file.is_file():
        return None
    try:
        return _date_of(read_yaml(file.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, ValueError) as error:  # cut off by a kill
        log.warning("%s: not readable, so the run's date is not taken from it: %s", file, one_line(error))
        return None


def _date_of(values: Mapping[str, Any]) -> dt.date | None:
    text = values.get("data", {}).get("template", {}).get("date")
    return dt.date.fromisoformat(str(text)) if text else None
