"""`objective.layers: auto`: the layer area of a run, chosen once by a probe of the starting model, on rank 0.

The result is kept in the run's folder, and in the config of its checkpoints, so that a resume has the same area. The
probe uses the run's own samples and template: the user's words in them, without shift (docs/methods.md, section 1.4).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_pipeline.atomic import write_text
from data_pipeline.batching.packer import Packer
from data_pipeline.loader import ThisRank, fixed_batches
from data_pipeline.records import ChatSample, Sample, Split
from training.assembly import build_packer, build_reader
from training.checkpoints.run_state import RunState
from training.config import RunConfig
from training.distributed import rank
from training.errors import ConfigError
from training.run_folder.prepare import POLL_SECONDS, Prepared, sample_rows

if TYPE_CHECKING:
    from modeling.shifcon.layer_probe import ProbeBatch

log = logging.getLogger(__name__)
AREA_FILE = "layer_area.json"  # in a run's folder
ITEMS = 256  # samples of each language


def with_area(config: RunConfig, prepared: Prepared, found: Path | None) -> RunConfig:
    """The config with the layers of `objective.layers: auto`; unchanged if they are given. Called on all ranks.

    Args:
        found: the checkpoint that the run resumes from.

    Raises:
        ConfigError: no language can be compared with the dominant one.
    """
    if not config.objective.wants_area:
        return config
    file = config.output_dir / AREA_FILE
    inputs = {"model": prepared.model_dir, "data": dict(prepared.index.fingerprint), "seed": config.seed}
    if found is not None:
        area = RunState.read(found).config["objective"].get("layers")
        if area is None:  # of another objective, which the comparison of configs refuses by name
            return config
    elif rank() == 0:
        area = _kept(file, inputs) or _chosen(config, prepared, file, inputs)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # of the model that was probed
    else:
        while (area := _kept(file, inputs)) is None:
            time.sleep(POLL_SECONDS)
    return config.model_copy(update={"objective": config.objective.model_copy(update={"layers": tuple(area)})})


def _kept(file: Path, inputs: dict[str, Any]) -> list[int] | None:
    """The area in the file, if it is of the same inputs."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return content["area"] if content["inputs"] == json.loads(json.dumps(inputs)) else None


def _chosen(config: RunConfig, prepared: Prepared, file: Path, inputs: dict[str, Any]) -> list[int]:
    from modeling.loading import load_pretrained, resolve_device, resolve_directory
    from modeling.shifcon.layer_area import choose_area
    from modeling.shifcon.layer_probe import probe_languages
    from modeling.weights.untrusted import read_tokenizer

    tokenizer = read_tokenizer(prepared.tokenizer_dir)
    data = config.data
    reader = build_reader(config, prepared.index, tokenizer)
    packer = build_packer(data, config.objective, config.model.attention, prepared.model_dir, tokenizer)
    # Retrieval needs translations: those of the parallel corpus, if training samples are not paired.
    split = Split.PARALLEL if data.pairs is not None and data.mixture.pairing == "none" else Split.TRAIN
    device, dtype = resolve_device(config.precision)
    model: Any = load_pretrained(resolve_directory(prepared.model_dir), dtype, config.model.attention, device)

    def batches(language: str) -> Iterator[ProbeBatch]:
        rows = sample_rows(prepared.index, data.languages.index(language), ITEMS, config.seed, split)
        return probe_batches(reader.readable(rows).samples, packer, device)

    order = sorted(data.languages, key=lambda language: language != data.dominant)
    found = probe_languages(model, order, batches)
    if data.dominant not in found.means:
        raise ConfigError(f"objective.layers: auto, but {data.dominant!r} has no usable sample")
    choice = choose_area(found.measures)
    log.info(
        "objective.layers: auto chose [%d, %d) by %s (%.0f %% of the jackknife's replicates agree); runners-up: %s",
        *choice.area, choice.rule, 100 * choice.agreement, ", ".join(f"[{a}, {b})" for a, b in choice.runners_up),
    )  # fmt: skip
    content = {"area": choice.area, "rule": choice.rule, "by_rule": choice.by_rule, "runners_up": choice.runners_up}
    write_text(file, json.dumps({**content, "agreement": choice.agreement, "inputs": inputs}, indent=1) + "\n")
    return list(choice.area)


def probe_batches(samples: Sequence[Sample], packer: Packer, device: str) -> Iterator[ProbeBatch]:
    """The samples of one language as batches of the probe."""
    from modeling.shifcon.layer_probe import ProbeBatch

    for batch in fixed_batches(samples, packer, ThisRank()):
        here = batch.to(torch.device(device))
        items = [sample.group for sample in batch.samples if isinstance(sample, ChatSample)]
        yield ProbeBatch(here.model_inputs(), here.targets.segment_ids, here.targets.content, items)
