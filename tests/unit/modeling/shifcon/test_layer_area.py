"""The probe of layers on a model and texts with a known answer, and the choice of the area."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from modeling.errors import ModelError
from modeling.layers import state_hook
from modeling.shifcon.layer_area import candidates, choose_area, mean_curves
from modeling.shifcon.layer_probe import (
    LanguageStates,
    LayerMeasures,
    ProbeBatch,
    compare,
    jackknife_error,
    layer_passes,
    measure_language,
    probe_languages,
    retrieved,
)
from modeling.shifcon.subspace import TokenMoments

LAYERS, HIDDEN = 6, 16
SENTENCES, WORDS = 48, 7


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": HIDDEN, "intermediate_size": 32, "num_hidden_layers": LAYERS}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.4)).eval()


def batches(offset: int, size: int = 10, n: int = SENTENCES) -> list[ProbeBatch]:
    """Sentences of a language, whose words are those of the other languages plus `offset`; one padded row each."""
    ids = torch.randint(0, 100, (n, WORDS), generator=torch.Generator().manual_seed(4)) + offset
    found = []
    for start in range(0, n, size):
        rows = ids[start : start + size]
        segments = torch.arange(len(rows))[:, None].expand(-1, WORDS)
        content = torch.ones(rows.shape, dtype=torch.bool)
        content[:, 0] = False
        items = list(range(start, start + len(rows)))
        found.append(ProbeBatch({"input_ids": rows, "use_cache": False}, segments, content, items))
    return found


def measured(model: LlamaForCausalLM, offset: int) -> LanguageStates:
    """All layers of a language."""
    return measure_language(model, batches(offset), range(LAYERS + 1))


def test_states_of_a_language_are_those_of_its_content_tokens(model: LlamaForCausalLM) -> None:
    found = measured(model, 0)
    assert found.items == list(range(SENTENCES))
    rows = torch.cat([each.inputs["input_ids"] for each in batches(0)])
    with torch.no_grad():
        hidden = model(rows, output_hidden_states=True).hidden_states
    for layer in range(LAYERS):  # transformers reports the last state after the final norm
        tokens = hidden[layer][:, 1:].flatten(0, 1).double()
        statistics = found.moments.statistics(layer)
        torch.testing.assert_close(statistics.mean, tokens.mean(dim=0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(statistics.covariance, torch.cov(tokens.T, correction=0), rtol=1e-4, atol=1e-6)
        pooled = torch.stack([each[layer] for each in found.pooled])
        torch.testing.assert_close(pooled, hidden[layer][:, 1:].mean(dim=1), rtol=1e-4, atol=1e-5)


def turned(model: LlamaForCausalLM, at: int, back: int) -> list:
    """Hooks that turn the states between two layers by a random matrix, as if a language had a subspace of its own."""
    matrix = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(8)))[0]
    stretch = matrix * torch.linspace(0.2, 5, HIDDEN)
    inverse = torch.linalg.inv(stretch)
    return [
        state_hook(model, at, lambda hidden: hidden @ stretch),
        state_hook(model, back, lambda hidden: hidden @ inverse),
    ]


def test_the_distance_is_largest_where_a_language_has_a_subspace_of_its_own(model: LlamaForCausalLM) -> None:
    """The same texts under another name: distances are 0 but for the layers whose states are turned."""
    dominant = measured(model, 0)
    same = compare(dominant, measured(model, 0))
    assert float(same.values["sum"][0].abs().max()) < 1e-6
    torch.testing.assert_close(same.values["retrieval"], torch.ones_like(same.values["retrieval"]))
    torch.testing.assert_close(same.values["cka"], torch.ones_like(same.values["cka"]), rtol=1e-6, atol=1e-6)
    hooks = turned(model, 2, 3)
    try:
        moved = compare(dominant, measured(model, 0))
    finally:
        for hook in hooks:
            hook.remove()
    distances = moved.values["riemannian"][0]
    assert int(distances.argmax()) == 2
    assert float(distances[:2].max()) < 1e-6 < 0.5 < float(distances[2])


def test_replicates_are_those_of_the_other_groups_of_sentences(model: LlamaForCausalLM) -> None:
    """Those of the covariances' distance are linearised, so their standard error is compared, and that within 20 %."""
    n_groups = 8

    def measured(*without: int) -> LayerMeasures:
        kept = ([_without(each, without, n_groups) for each in batches(offset, n=400)] for offset in (0, 100))
        return compare(*(measure_language(model, each, range(LAYERS + 1), n_groups) for each in kept))

    found = measured()
    alone = [measured(group) for group in range(n_groups)]
    for name, tolerance in (("riemannian", 0.2), ("mean_distance", 1e-6), ("retrieval", None)):
        assert found.values[name].shape == (n_groups + 1, LAYERS + 1)
        exact = torch.stack([each.values[name][0] for each in alone])
        if tolerance is not None:
            error = jackknife_error(found.values[name][1:])
            assert (error > 0).all()
            torch.testing.assert_close(error, jackknife_error(exact), rtol=tolerance, atol=0)


def _without(batch: ProbeBatch, groups: tuple[int, ...], n_groups: int) -> ProbeBatch:
    kept = [number for number, item in enumerate(batch.items) if item % n_groups not in groups]
    return ProbeBatch(
        {**batch.inputs, "input_ids": batch.inputs["input_ids"][kept]},
        torch.arange(len(kept))[:, None].expand(-1, WORDS),
        batch.content[kept],
        [batch.items[number] for number in kept],
    )


def test_layers_are_measured_in_as_many_passes_as_the_memory_needs(model: LlamaForCausalLM) -> None:
    """With the same result, also of the means."""
    texts = {"en": 0, "de": 100, "xx": 0}

    def sentences(language: str) -> list[ProbeBatch]:
        return [] if language == "xx" else batches(texts[language])

    whole, parts = (
        probe_languages(model, list(texts), sentences, memory=memory) for memory in (1 << 30, 2 * 8 * HIDDEN**2 * 8 * 3)
    )
    assert layer_passes(LAYERS + 1, HIDDEN, 2 * 8 * HIDDEN**2 * 8 * 3) == [range(3), range(3, 6), range(6, 7)]
    assert list(parts.measures) == ["de"]
    assert list(parts.means) == ["en", "de"]
    for name, values in whole.measures["de"].values.items():
        torch.testing.assert_close(parts.measures["de"].values[name], values, rtol=1e-9, atol=1e-12)
    for part, name in ((part, name) for part in ("en", "de") for name in ("mean", "text_mean", "text_deviation")):
        torch.testing.assert_close(getattr(parts.means[part], name), getattr(whole.means[part], name))


def test_retrieval_is_not_decided_by_two_dimensions() -> None:
    generator = torch.Generator().manual_seed(6)
    shared = torch.randn(60, 32, generator=generator)
    one, two = (shared + 0.3 * torch.randn(60, 32, generator=generator) for _ in range(2))
    assert float(retrieved(one, two).mean()) > 0.95
    for side in (one, two):
        side[:, :2] = 5000 + 800 * torch.randn(60, 2, generator=generator)
    assert float(retrieved(one, two).mean()) > 0.9


def of_states(states_STH: Tensor) -> LanguageStates:
    """Measured states of one layer, (sentences, tokens, H)."""
    items = list(range(len(states_STH)))
    moments = TokenMoments(8, 1, states_STH.shape[2])
    groups = torch.tensor(items).repeat_interleave(states_STH.shape[1]) % 8
    moments.add(0, states_STH.flatten(0, 1), groups)
    return LanguageStates(moments, list(states_STH.mean(dim=1, keepdim=True)), items)


def test_no_measure_is_decided_by_two_dimensions() -> None:
    """In two of 32 dimensions both languages have large states that vary without regard to the sentence."""
    generator = torch.Generator().manual_seed(6)
    sentences = torch.randn(240, 1, 32, generator=generator)
    tokens = [0.5 * torch.randn(240, 12, 32, generator=generator) for _ in range(2)]
    spread = torch.linspace(0.4, 1.6, 32)
    one, two = (spread * (sentences + each) for each in tokens)
    two = two[..., torch.randperm(32, generator=generator)] + 0.4
    plain = compare(of_states(one), of_states(two))
    for side in (one, two):
        side[..., :2] = 5000 + 800 * torch.randn(240, 12, 2, generator=generator)
    found = compare(of_states(one), of_states(two))
    for name in ("riemannian", "mean_distance", "principal_angle", "cka"):
        before, after = (float(each.values[name][0, 0]) for each in (plain, found))
        assert after == pytest.approx(before, rel=0.25, abs=0.05), name
    for name, size in (("riemannian", 0.3), ("mean_distance", 0.2), ("principal_angle", 0.3)):
        assert float(plain.values[name][0, 0]) > size, name


def test_measures_do_not_depend_on_the_scale_of_a_dimension() -> None:
    generator = torch.Generator().manual_seed(7)
    one, two = (
        torch.randn(120, 12, 32, generator=generator) @ torch.randn(32, 32, generator=generator) for _ in range(2)
    )
    scale = torch.ones(32)
    scale[:2] = 1000
    plain, scaled = compare(of_states(one), of_states(two)), compare(of_states(one * scale), of_states(two * scale))
    for name, values in plain.values.items():
        torch.testing.assert_close(scaled.values[name], values, rtol=1e-4, atol=1e-6, msg=name)


def test_states_without_translations_have_no_retrieval(model: LlamaForCausalLM) -> None:
    one, two = measured(model, 0), measured(model, 100)
    two.items = [item + 1000 for item in two.items]
    found = compare(one, two)
    assert found.pairs == 0
    assert found.values["retrieval"].isnan().all()
    assert found.values["sum"].isfinite().all()
    assert choose_area({"de": found}).rule == "sum"


def measures(**curves: list[float]) -> LayerMeasures:
    values = {name: torch.tensor([curve, curve], dtype=torch.float64) for name, curve in curves.items()}
    return LayerMeasures(100, 10, 10, False, values)


def test_the_area_is_the_best_run_of_30_percent_of_the_layers() -> None:
    low = [9.0, 5, 5, 5, 1, 1, 1, 5, 5, 5, 5]
    found = choose_area({"de": measures(retrieval=[float("nan")] * 11, sum=low, riemannian=low[::-1])})
    assert (found.area, found.rule, found.agreement) == ((4, 7), "sum", 1.0)
    assert found.by_rule == {"sum": (4, 7), "riemannian": (4, 7)}
    high = [0.0, 0, 0, 0, 0, 0.3, 0.9, 0.8, 0.9, 0.2, 0.9]
    found = choose_area({"de": measures(retrieval=high, sum=low, riemannian=low)})
    assert (found.area, found.rule) == ((6, 9), "retrieval")
    assert found.by_rule["sum"] == (4, 7)
    assert found.runners_up[0] == (4, 7)  # at most half of an area is shared with another one
    assert all(abs(a - b) >= 2 for a, _ in found.runners_up for b in (6,))


def test_candidates_leave_out_the_embeddings_and_the_output() -> None:
    assert candidates(18)[0] == (1, 6)
    assert candidates(18)[-1] == (13, 18)
    assert candidates(2) == [(1, 2)]
    assert candidates(1) == [(0, 1)]


def test_the_mean_is_over_languages_in_which_a_measure_is_defined() -> None:
    nan = float("nan")
    found = mean_curves({"de": measures(sum=[1.0, nan]), "sw": measures(sum=[3.0, 2.0])}, "sum")
    assert found.tolist() == [[2.0, 2.0], [2.0, 2.0]]
    with pytest.raises(ModelError, match="one besides the dominant one"):
        choose_area({})


def test_nothing_is_measured_of_a_language_without_sentences(model: LlamaForCausalLM) -> None:
    found = measure_language(model, [], range(LAYERS + 1))
    assert isinstance(found, LanguageStates)
    assert (found.items, float(found.moments.tokens.sum())) == ([], 0.0)
    assert isinstance(found.moments.products, Tensor)
