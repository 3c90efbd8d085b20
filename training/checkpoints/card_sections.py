"""The sections of a model card, and the scores in it: those of evaluations of these very weights.

A card (`model_card.py`) is metadata and sections that begin with "## "; each evaluation is a part "### NAME" of Scores.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.atomic import WriteError, write_text
from data_pipeline.settings import flat
from modeling.export_info import EXPORT_FILE
from training.checkpoints.run_state import RunState
from training.tracking.run_record import RESULTS_FILE, TABLE_FILE
from training.tracking.scores import FOLDER as SCORES_FOLDER

log = logging.getLogger(__name__)
CARD_FILE = "README.md"
NOT_EVALUATED = "Not evaluated."


def split(text: str, mark: str) -> dict[str, str]:
    """Text by heading; the text before the first heading has the key ""."""
    first, *others = f"\n{text}".split(f"\n{mark}")
    return {"": first.strip()} | {each.partition("\n")[0].strip(): each.partition("\n")[2].strip() for each in others}


def join(sections: Mapping[str, str], mark: str) -> str:
    parts = (f"{mark}{heading}\n\n{text}" if heading else text for heading, text in sections.items() if text)
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in line)} |" for line in lines)


def add_scores(model: Path, name: str, run: Mapping[str, Any], table: str) -> str | None:
    """Puts an evaluation's table into the card of the model, in place of an earlier one of the same name.

    Args:
        run: the description of the evaluation; its protocol is stated.

    Returns:
        A line for the user; None if the model has no card that an export wrote.
    """
    from huggingface_hub import ModelCard

    file = model / CARD_FILE
    if not file.is_file() or not (model / EXPORT_FILE).is_file():
        return None
    card = ModelCard.load(file)
    sections = split(card.text, "## ")
    entries = split(sections.get("Scores", ""), "### ")
    scores = {key: text for key, text in entries.items() if key} | {name: _score(run, table)}
    card.text = join({**sections, "Scores": join(scores, "### ")}, "## ")
    try:
        write_text(file, str(card))
    except WriteError as error:  # a model in a folder of others is evaluated all the same
        return f"scores: not in the model card: {error}"
    return f"scores: in the model card {file}"


def scores_of(run: Path, state: RunState, output: Path) -> str:
    """The scores of these very weights among the run's evaluations, and the held-out losses of the last step."""
    from modeling.weights.weight_files import directory_hash, one_line

    weights = directory_hash(output)
    found: dict[str, str] = {}
    for file in sorted((run / SCORES_FOLDER).glob(f"*/{RESULTS_FILE}")):
        try:
            evaluation = json.loads(file.read_text(encoding="utf-8"))["run"]
            if evaluation["model"]["hash"] == weights:
                found[file.parent.name] = _score(evaluation, (file.parent / TABLE_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError) as error:  # must not cost the export
            log.warning("%s: not in the model card, as it cannot be read (%s)", file, one_line(error))
    losses = [
        (name.removeprefix("eval/loss").lstrip("/") or "mean", f"{value:.4f}")
        for name, value in state.metrics.items()
        if (name == "eval/loss" or name.startswith("eval/loss/")) and value is not None
    ]
    if losses:
        found["Held-out loss"] = table(("language", "nats per label"), losses)
    return join(found, "### ") if found else NOT_EVALUATED


def _score(run: Mapping[str, Any], table: str) -> str:
    protocol = flat(run.get("protocol", {}))
    stated = [f"{key.removesuffix('.name')} {value}" for key, value in protocol.items()
              if value is not None and ("template." not in key or key.endswith(".name"))]  # fmt: skip
    return f"{', '.join(stated)}\n\n```\n{table.strip()}\n```".strip()
