"""Moments of pooled states are those of all sentences together; normalised states carry no constant of a language."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from modeling.errors import ModelError
from modeling.shifcon.contrastive import contrastive_losses, pair_cosines, retrieval
from modeling.shifcon.normalisation import Normalisation, Normalise, PooledMoments

LANGUAGES = ("en", "de", "sw")
LAYERS, HIDDEN = (3, 4), 6


def sentences(number: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Pooled states at two layers with means far from 0, and languages; -1: no language."""
    generator = torch.Generator().manual_seed(seed)
    languages = torch.randint(-1, 3, (number,), generator=generator)
    states = [1e4 + 100 * languages[:, None] + torch.randn(number, HIDDEN, generator=generator) for _ in LAYERS]
    return states, languages


def moments_of(pooled: list[Tensor], languages: Tensor, sizes: list[int]) -> PooledMoments:
    """Of a rank, batch by batch."""
    moments = PooledMoments(len(LANGUAGES), len(LAYERS), HIDDEN)
    parts = [each.split(sizes) for each in (*pooled, languages)]
    for *states, of_part in zip(*parts, strict=True):
        moments.add(states, of_part)
    return moments


def over_ranks(ranks: list[PooledMoments]) -> list[PooledMoments]:
    """What each rank, a thread here, finds to be the moments of all."""
    barrier, given = threading.Barrier(len(ranks), timeout=20), {}

    def all_sum(rank: int, value: Tensor) -> Tensor:
        given[rank] = value
        barrier.wait()
        total = sum(given[each] for each in range(len(ranks)))
        barrier.wait()
        return torch.as_tensor(total)

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(lambda rank: ranks[rank].over_ranks(partial(all_sum, rank)), range(len(ranks))))


@pytest.mark.parametrize("sizes", [[40], [1, 0, 25, 14]])
def test_moments_are_those_of_all_sentences_together(sizes: list[int]) -> None:
    pooled, languages = sentences(40)
    moments = moments_of(pooled, languages, sizes)
    for number in range(len(LANGUAGES)):
        own = torch.stack([each[languages == number] for each in pooled], dim=1).double()
        assert moments.sentences[number] == len(own)
        torch.testing.assert_close(moments.mean[number], own.mean(dim=0), rtol=1e-12, atol=0)
        torch.testing.assert_close(moments.variance()[number], own.var(dim=0), rtol=1e-9, atol=0)


def test_moments_over_ranks_are_those_of_all_sentences() -> None:
    pooled, languages = sentences(60)
    whole = moments_of(pooled, languages, [60])
    cuts = [0, 7, 7, 60]  # the second rank has nothing
    ranks = [moments_of([each[a:b] for each in pooled], languages[a:b], [b - a]) for a, b in pairwise(cuts)]
    for merged in over_ranks(ranks):
        torch.testing.assert_close(merged.sentences, whole.sentences)
        torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(merged.variance(), whole.variance(), rtol=1e-9, atol=0)


def normalisation(pooled: list[Tensor], languages: Tensor, kind: Normalise = "standardised") -> Normalisation:
    return Normalisation.of(moments_of(pooled, languages, [len(languages)]), LANGUAGES, "en", LAYERS, kind)


@pytest.mark.parametrize("kind", ["standardised", "centred"])
def test_states_are_centred_by_their_language_and_divided_by_the_dominant_deviation(kind: Normalise) -> None:
    pooled, languages = sentences(50)
    found = normalisation(pooled, languages, kind).apply(pooled, languages)
    for states, raw in zip(found, pooled, strict=True):
        deviation = raw[languages == 0].double().std(dim=0) if kind == "standardised" else 1.0
        for number in range(len(languages)):
            language = int(languages[number])
            if language < 0:
                continue
            mean = raw[languages == language].double().mean(dim=0)
            expected = (raw[number].double() - mean) / deviation
            torch.testing.assert_close(states[number].double(), expected, rtol=2e-3, atol=2e-3)  # fp32 about 1e4


def test_a_constant_of_a_language_changes_nothing() -> None:
    """As the shift adds one: at the layer where it is added, the loss sees the same states."""
    pooled, languages = ([each - 1e4 for each in part] if isinstance(part, list) else part for part in sentences(50))
    constant = torch.randn(len(LANGUAGES), HIDDEN, generator=torch.Generator().manual_seed(5)) * 10
    moved = [each + constant[languages] for each in pooled]
    plain = normalisation(pooled, languages).apply(pooled, languages)
    shifted = normalisation(moved, languages).apply(moved, languages)
    for one, other in zip(plain, shifted, strict=True):
        known = languages >= 0
        torch.testing.assert_close(one[known], other[known], rtol=1e-3, atol=1e-3)


def test_a_dimension_that_hardly_varies_is_not_divided_by_its_deviation() -> None:
    pooled, languages = sentences(50)
    for each in pooled:
        each[:, 2] = 7.0
    found = normalisation(pooled, languages)
    for layer in range(len(LAYERS)):
        assert found.deviation[0, layer, 2] == pytest.approx(0.01 * float(found.deviation[0, layer].median()), rel=0.05)
    for each in pooled:
        each[:] = 7.0
    with pytest.raises(ModelError, match="states of 'en' do not vary"):
        normalisation(pooled, languages)


def test_two_dimensions_of_huge_variance_decide_no_similarity() -> None:
    """Translations share 30 dimensions; two others, of a thousand times the size, say nothing about the pair."""
    generator = torch.Generator().manual_seed(2)
    number, hidden = 64, 32
    shared = torch.randn(number, hidden, generator=generator)
    one, other = (shared + 0.3 * torch.randn(number, hidden, generator=generator) for _ in range(2))
    for side in (one, other):
        side[:, :2] = 1e4 + 1e3 * torch.randn(number, 2, generator=generator)
    states, languages = torch.cat([one, other]), torch.arange(2).repeat_interleave(number)
    moments = PooledMoments(2, 1, hidden)
    moments.add([states], languages)
    pairs = torch.arange(2 * number).view(2, number).T[None]
    excluded = torch.zeros(1, number, number, dtype=torch.bool)
    found = {}
    for kind in ("standardised", "centred", "none"):
        pooled = [states]
        if kind != "none":
            pooled = Normalisation.of(moments, ("en", "de"), "en", [0], kind).apply(pooled, languages)  # type: ignore[arg-type]
        cosines = pair_cosines(torch.stack(pooled), pairs)
        found[kind] = float(retrieval(cosines, excluded).found) / number
        loss = float(contrastive_losses(cosines, excluded, 10.0)) / number
        assert (loss < 1.0) == (kind == "standardised"), (kind, loss)
    assert found["standardised"] > 0.95
    assert max(found["centred"], found["none"]) < 0.1


def test_retrieval_counts_pairs_that_have_candidates() -> None:
    cosines = torch.tensor([[[[0.9, 0.1, 0.0], [0.2, 0.1, 0.0], [0.0, 0.3, 0.0]]]])
    excluded = torch.zeros(1, 3, 3, dtype=torch.bool)
    found, by_chance, pairs = (float(each) for each in retrieval(cosines, excluded))
    assert (found, pairs) == (1, 3)  # only the first column's largest value is on the diagonal; ties go to the first
    assert by_chance == pytest.approx(1.0)
    excluded[0, :, 2] = torch.tensor([True, True, False])  # the third pair has no other candidate
    excluded[0, 2, 1] = True  # and the second one only one
    found, by_chance, pairs = (float(each) for each in retrieval(cosines, excluded))
    assert (found, pairs) == (1, 2)
    assert by_chance == pytest.approx(1 / 3 + 1 / 2)


def test_saved_moments_are_read_unchanged(tmp_path: Path) -> None:
    pooled, languages = sentences(50)
    saved = normalisation(pooled, languages)
    saved.save(tmp_path / "moments.safetensors")
    loaded = Normalisation.load(tmp_path / "moments.safetensors")
    assert (loaded.languages, loaded.layers) == (saved.languages, saved.layers)
    for name in ("mean", "deviation", "sentences"):
        assert torch.equal(getattr(loaded, name), getattr(saved, name))
