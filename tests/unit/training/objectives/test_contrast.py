"""The objectives with a contrastive loss: what they measure on the probe set, their ablations, and their warnings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import PreparedRun
from transformers import LlamaConfig, LlamaForCausalLM

from data_pipeline.batching.batch import ChatBatch
from data_pipeline.loader import ThisRank
from modeling.export_info import VECTORS_FILE
from modeling.shifcon.language_vectors import LanguageVectors
from training.assembly import DataParts, assemble_data, build_planner, pair_and_set_warnings
from training.errors import ConfigError
from training.objectives import contrast
from training.objectives.align import AlignConfig
from training.objectives.base import ObjectiveParts
from training.objectives.contrast import CHECKED_STEPS, MOMENTS_FILE
from training.objectives.shifcon import ShifCon, ShifConConfig
from training.probe_set import too_few_samples

CONTRASTIVE = {"weight": 0.5, "scale": 10.0, "set_size": 2}


@pytest.fixture(scope="module")
def data(prepared_run: PreparedRun) -> DataParts:
    return assemble_data(prepared_run.config, prepared_run.prepared)


Made = Callable[..., tuple[Any, Any]]


@pytest.fixture
def make(data: DataParts) -> Made:
    """`make(section)`: an objective on a random model, always the same, and an engine without DeepSpeed."""

    def made(section: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
        config = LlamaConfig(
            vocab_size=len(data.tokenizer), initializer_range=0.3, max_position_embeddings=256, **sizes
        )
        model: Any = LlamaForCausalLM(config)
        languages = tuple(data.index.languages)
        parts = ObjectiveParts("chat", languages, "en", probe=data.probe_batches(ThisRank()))
        objective = section.build(model, parts)
        engine = SimpleNamespace(
            module=model, device=torch.device("cpu"), forward=model.__call__, evaluating=lambda: torch.no_grad()
        )
        return objective, engine

    return made


def shifcon(**changes: Any) -> ShifConConfig:
    return ShifConConfig(name="shifcon", **{"layers": (1, 3), "contrastive": CONTRASTIVE, "probe_items": 16, **changes})


def batches(data: DataParts) -> list[ChatBatch]:
    (step,) = data.loader().steps(0, 1)
    return list(step.micro_batches)


def terms(objective: Any, engine: Any, data: DataParts) -> dict[str, float]:
    """Sums over the first step's micro-batches."""
    found: dict[str, float] = {}
    for batch in batches(data):
        for name, term in objective.loss_terms(engine, batch).terms.items():
            found[name] = found.get(name, 0.0) + float(term.sum.detach())
    return found


def test_without_shift_the_contrast_is_the_same_where_the_shift_is_a_constant(make: Made, data: DataParts) -> None:
    """At `h[toward]`: the moments are of the stream that the loss sees, so the constant of a language drops out."""
    found = {}
    for shift in (True, False):
        objective, engine = make(shifcon(layers=(2, 3), shift=shift))
        objective.before_step(engine, 0)
        found[shift] = terms(objective, engine, data)
        assert isinstance(objective, ShifCon) == shift
    assert found[True]["contrastive"] == pytest.approx(found[False]["contrastive"], rel=1e-4)
    assert found[True]["contrastive"] > 0.1
    assert found[True]["sft"] != pytest.approx(found[False]["sft"], rel=1e-4)
    raw, engine = make(shifcon(layers=(2, 3), contrastive={**CONTRASTIVE, "normalise": "none"}))
    raw.before_step(engine, 0)
    assert raw.normalisation is None
    assert terms(raw, engine, data)["contrastive"] != pytest.approx(found[True]["contrastive"], rel=0.05)


def test_align_is_the_contrast_at_one_layer_without_shift(make: Made, data: DataParts) -> None:
    one, engine = make(AlignConfig(name="align", layer=2, contrastive=CONTRASTIVE, probe_items=16))
    one.before_step(engine, 0)
    other, other_engine = make(shifcon(layers=(2, 3), shift=False))
    other.before_step(other_engine, 0)
    assert terms(one, engine, data) == terms(other, other_engine, data)
    assert list(AlignConfig(name="align", layer=5, contrastive=CONTRASTIVE).model_mistakes(4)) == [
        "objective.layer: 5, but the model has 4 layers"
    ]


def test_what_is_measured_is_saved_and_restored(make: Made, data: DataParts, tmp_path: Path) -> None:
    for section in (shifcon(), shifcon(shift=False)):
        objective, engine = make(section)
        objective.before_step(engine, 0)
        folder = tmp_path / str(section.shift)
        folder.mkdir()
        objective.save(engine, folder)
        assert {file.name for file in folder.iterdir()} == {MOMENTS_FILE, *([VECTORS_FILE] if section.shift else [])}
        loaded, other = make(section)
        loaded.load(folder)
        assert loaded.before_step(other, 1) == {}  # nothing is stale
        assert terms(loaded, other, data) == terms(objective, engine, data)


def test_the_shift_grows_to_its_strength(make: Made, data: DataParts) -> None:
    objective, engine = make(shifcon(strength=0.8, strength_warmup_steps=4))
    found = []
    for step in range(6):
        objective.before_step(engine, step)
        found.append(objective.vectors.strength)
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    whole, engine = make(shifcon())
    whole.before_step(engine, 0)
    assert torch.equal(whole.vectors.mean, objective.vectors.mean)
    assert whole.vectors.strength == 1.0


def alone(objective: Any, engine: Any, data: DataParts, layer: int) -> list[list[torch.Tensor]]:
    """By language, the unshifted states of each probe sample by itself: its content tokens at a layer."""
    found = []
    for samples in data.probe:
        states = []
        for sample in samples:
            batch = data.packer.batch([sample])
            with torch.no_grad(), objective.shift.disabled():
                hidden = engine.module(**batch.model_inputs(), output_hidden_states=True).hidden_states[layer]
            states.append(hidden[batch.targets.content])
        found.append(states)
    return found


def test_vectors_are_those_of_the_chosen_estimator(make: Made, data: DataParts) -> None:
    """Against sentences one by one: the mean of their means, and the sum of these at length 1."""
    found = {}
    for estimator in ("token-means", "sentence-means", "normalised-sums"):
        objective, engine = make(shifcon(estimator=estimator))
        objective.before_step(engine, 0)
        found[estimator] = objective.vectors
        assert objective.vectors.estimator == f"{estimator}, unshifted"
    for place, layer in enumerate((1, 3)):
        for language, sentences in enumerate(alone(objective, engine, data, layer)):
            means = torch.stack([states.mean(dim=0) for states in sentences])
            directions = torch.stack([mean / mean.norm() for mean in means])
            torch.testing.assert_close(found["sentence-means"].mean[language, place], means.mean(dim=0))
            torch.testing.assert_close(found["normalised-sums"].mean[language, place], directions.sum(dim=0))
            assert (found["token-means"].mean[language, place] - means.mean(dim=0)).norm() > 1e-3
    english = torch.stack([states.mean(dim=0) for states in alone(objective, engine, data, 1)[0]])
    for vectors in found.values():
        torch.testing.assert_close(vectors.text_mean, found["sentence-means"].mean[:, 0])
        torch.testing.assert_close(vectors.text_deviation, english.std(dim=0), rtol=1e-4, atol=1e-6)


def test_the_text_of_a_probe_sample_has_its_own_language(make: Made, data: DataParts) -> None:
    objective, engine = make(shifcon())
    objective.before_step(engine, 0)
    texts = alone(objective, engine, data, 1)
    found = [[objective.vectors.nearest(states.mean(dim=0)) for states in sentences] for sentences in texts]
    right = sum(name == code for code, names in zip(data.index.languages, found, strict=True) for name in names)
    assert right > 0.75 * sum(map(len, found))  # the model is random; chance is 0.25


def test_running_means_keep_a_share_of_the_vectors_before(make: Made, data: DataParts, tmp_path: Path) -> None:
    objective, engine = make(shifcon(vector_momentum=0.75, refresh_every=1))
    objective.before_step(engine, 0)
    first = objective.vectors.mean.clone()
    with torch.no_grad():
        engine.module.model.embed_tokens.weight.mul_(1.5)
    objective.save(engine, tmp_path)
    objective.before_step(engine, 1)
    plain, other = make(shifcon())
    other.module.load_state_dict(engine.module.state_dict())
    plain.before_step(other, 0)
    torch.testing.assert_close(objective.vectors.mean, 0.75 * first + 0.25 * plain.vectors.mean)
    resumed, engine_of_resumed = make(shifcon(vector_momentum=0.75, refresh_every=1))
    engine_of_resumed.module.load_state_dict(engine.module.state_dict())
    resumed.load(tmp_path)
    resumed.before_step(engine_of_resumed, 1)
    assert torch.equal(resumed.vectors.mean, objective.vectors.mean)
    with pytest.raises(ValueError, match="'random_vectors' have no running means"):
        shifcon(vector_momentum=0.5, random_vectors=True)


def test_random_vectors_are_those_of_the_shift_and_the_error_is_measured_against_the_means(
    make: Made, data: DataParts
) -> None:
    plain, engine = make(shifcon())
    metrics = plain.before_step(engine, 0)
    random, engine = make(shifcon(random_vectors=True))
    of_random = random.before_step(engine, 0)
    assert isinstance(random.vectors, LanguageVectors)
    assert not torch.allclose(random.vectors.mean[1], plain.vectors.mean[1])
    for name in metrics:
        if name.startswith("shift/norm"):
            assert of_random[name] == pytest.approx(metrics[name], rel=1e-4)
    assert of_random["shift/restoration_error/de"] > metrics["shift/restoration_error/de"]


@pytest.mark.parametrize(("found", "warned"), [(9, True), (30, False)])
def test_a_start_warns_if_pairs_are_found_no_more_often_than_by_chance(
    make: Made,
    data: DataParts,
    found: int,
    warned: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of 64 pairs, each with 8 candidates, 8 are found by chance; more than 16 or so are not."""
    objective, engine = make(shifcon(refresh_every=100))
    per_step = torch.tensor([found, 8.0, 64.0]) / CHECKED_STEPS
    monkeypatch.setattr(contrast, "contrastive_terms", lambda *_: ({}, per_step))
    for step in range(CHECKED_STEPS):
        objective.before_step(engine, step)
        objective.loss_terms(engine, batches(data)[0])
    assert "cannot tell" not in caplog.text
    objective.before_step(engine, CHECKED_STEPS)
    assert ("cannot tell translations from other pairs" in caplog.text) == warned
    if warned:
        assert "in the first 8 steps 9 of 64 pairs were nearest" in caplog.text
        assert "8 would be by chance" in caplog.text
    caplog.clear()
    objective.before_step(engine, CHECKED_STEPS + 1)
    assert not caplog.text


def test_a_language_with_few_probe_samples_is_in_no_set(
    data: DataParts, prepared_run: PreparedRun, caplog: pytest.LogCaptureFixture
) -> None:
    config = prepared_run.config
    languages = list(data.index.languages)
    few = [samples[:15] if languages[number] == "zh" else samples for number, samples in enumerate(data.probe)]
    found = too_few_samples(config.data, config.objective, few)
    assert found == {languages.index("zh")}
    planner = build_planner(config.data, config.objective, data.reader, None, found)
    before, after = data.planner.step(0), planner.step(0)
    assert np.array_equal(before.rows[: before.n_slots], after.rows[: after.n_slots])
    paired = {languages[before.languages[other]] for pairs in before.sets for _, other in pairs}
    kept = {languages[after.languages[other]] for pairs in after.sets for _, other in pairs}
    assert "zh" in paired
    assert kept == paired - {"zh"}
    n_zh = sum(languages[before.languages[other]] == "zh" for pairs in before.sets for _, other in pairs)
    assert after.dropped_pairs == before.dropped_pairs + n_zh
    lines = list(pair_and_set_warnings(config, replace(data, uncontrasted=found, probe=tuple(map(tuple, few)))))
    assert [line for line in lines if line.startswith("language 'zh' takes no part in the contrastive loss: it has 15")]


def test_a_dominant_language_with_few_probe_samples_is_refused(data: DataParts, prepared_run: PreparedRun) -> None:
    config = prepared_run.config
    few = [samples[:3] if number == 0 else samples for number, samples in enumerate(data.probe)]
    with pytest.raises(
        ConfigError, match=r"data\.dominant: 'en' has 3 usable samples for the probe set, but .* needs 16"
    ):
        too_few_samples(config.data, config.objective, few)
    raw = config.objective.model_copy(
        update={"contrastive": config.objective.contrastive.model_copy(update={"normalise": "none"})}
    )
    assert too_few_samples(config.data, raw, few) == frozenset()


def test_an_export_without_shift_says_so() -> None:
    """Older exports of ShifCon have no such entry, and are taken to be shifted."""
    assert shifcon(shift=False).description()["shifted"] is False
    assert shifcon().description()["shifted"] is True
    assert AlignConfig(name="align", layer=1, contrastive=CONTRASTIVE).description() == {}


def test_conflicts_of_the_section() -> None:
    few = shifcon(probe_items=8)
    (line,) = few.mistakes(["en", "de"], True)
    assert line.startswith("objective.probe_items: 8, but a language needs 16 probe samples for contrastive.normalise")
    assert (
        list(shifcon(probe_items=8, contrastive={**CONTRASTIVE, "normalise": "none"}).mistakes(["en", "de"], True))
        == []
    )
    with pytest.raises(ValueError, match=r"'shift' is false and 'contrastive\.weight' 0"):
        shifcon(shift=False, contrastive={**CONTRASTIVE, "weight": 0.0})
