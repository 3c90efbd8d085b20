"""Pooling is the mean over content tokens; the contrastive loss equals a plain loop over pairs."""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from data_pipeline.batching.batch import ContrastSets
from modeling.errors import ModelError
from modeling.shifcon.contrastive import ContentPooling, contrastive_losses, pair_cosines
from modeling.shifcon.language_vectors import LanguageVectors
from modeling.shifcon.shift import LanguageShift
from training.objectives.base import LossTerm
from training.objectives.contrast import ContrastiveConfig, contrastive_terms

IDS = torch.arange(1, 21).view(2, 10)
SEGMENTS = torch.tensor([[0, 0, 0, 0, 2, 2, 2, -1, -1, -1], [1, 1, 1, 1, 1, 1, 1, 1, 3, 3]])
CONTENT = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 0, 1, 1], [0, 0, 1, 0, 1, 1, 0, 1, 0, 0]]).bool()  # segment 3 has none


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, initializer_range=0.3)).train()


def by_loop(pooled: list[Tensor], pairs: Tensor, sets: Tensor, groups: Tensor, content: Tensor, scale: float) -> float:
    """Reference implementation: each layer, each pair, both directions, over the permitted candidates."""

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(a @ b / (a.norm() * b.norm()))

    def is_candidate(i: int, j: int) -> bool:
        if i == j:
            return True
        same_text = bool({*content[i].tolist()} & {*content[j].tolist()})
        return bool(sets[i] == sets[j]) and not bool(groups[i] == groups[j]) and not same_text

    total = 0.0
    for states in (layer.detach() for layer in pooled):
        for i, (dominant, other) in enumerate(pairs.tolist()):
            candidates = [j for j in range(len(pairs)) if is_candidate(i, j)]
            positive = math.exp(scale * cosine(states[dominant], states[other]))
            row = sum(math.exp(scale * cosine(states[dominant], states[pairs[j, 1]])) for j in candidates)
            column = sum(math.exp(scale * cosine(states[pairs[j, 0]], states[other])) for j in candidates)
            total += (-math.log(positive / row) - math.log(positive / column)) / 2 / len(pooled)
    return total


def make_pairs(number: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pairs": torch.randperm(2 * number, generator=generator).view(number, 2),
        "sets": torch.randint(0, 3, (number,), generator=generator),
        "groups": torch.arange(number) + 100,
        "content": torch.arange(2 * number).view(number, 2) + 2**60,
    }


def in_sets(pairs: Tensor, sets: Tensor, groups: Tensor, content: Tensor) -> dict[str, Tensor]:
    """The arguments of `contrastive_losses`: (C, P, 2) and (C, P, P), padded to the largest set."""
    places = [[i for i in range(len(pairs)) if sets[i] == number] for number in sorted(set(sets.tolist()))]
    most = max(map(len, places), default=0)
    padded = torch.zeros(len(places), most, 2, dtype=torch.int64)
    excluded = torch.ones(len(places), most, most, dtype=torch.bool)
    for number, place in enumerate(places):
        for a, i in enumerate(place):
            padded[number, a] = pairs[i]
            for b, j in enumerate(place):
                same_text = bool({*content[i].tolist()} & {*content[j].tolist()})
                excluded[number, a, b] = bool(groups[i] == groups[j]) or same_text
    for i in range(most):
        excluded[:, i, i] = False
    return {"pairs": padded, "excluded": excluded}


def losses_of(pooled: list[Tensor], made: dict[str, Tensor], scale: float) -> Tensor:
    """(C,)"""
    sets = in_sets(**made)
    return contrastive_losses(pair_cosines(torch.stack(pooled), sets["pairs"]), sets["excluded"], scale)


def term_of(pooled: list[Tensor], sets: ContrastSets | None, scale: float) -> LossTerm:
    """ShifCon's contrastive term on the only rank."""
    terms, _ = contrastive_terms(pooled, sets, ContrastiveConfig(weight=1.0, scale=scale))
    return terms["contrastive"]


def sets_on_one_rank(made: dict[str, Tensor]) -> ContrastSets:
    """The sets as a micro-batch holds them, if all their samples are on this rank."""
    own = torch.arange(2 * len(made["pairs"]))
    arguments = in_sets(**made)
    is_reported = torch.ones(len(arguments["pairs"]), dtype=torch.bool)
    return ContrastSets(own, own[:0], (0,), (0,), **arguments, is_reported=is_reported)


def states(number: int, layers: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(number, 8, generator=generator, requires_grad=True) for _ in range(layers)]


def test_pooling_is_the_mean_over_content_tokens_of_each_segment() -> None:
    model = tiny()
    pooling = ContentPooling(model, range(1, 4))
    with pooling.batch(SEGMENTS, CONTENT, 5) as pooled:
        reported = model(IDS, output_hidden_states=True).hidden_states
    assert [state.shape for state in pooled] == [(5, 16)] * 3
    for layer, state in zip((1, 2, 3), pooled, strict=True):
        for segment in (0, 1, 2):
            tokens = ((segment == SEGMENTS) & CONTENT).nonzero().tolist()
            expected = torch.stack([reported[layer][b, t] for b, t in tokens]).mean(0)
            torch.testing.assert_close(state[segment], expected)
        assert (state[3:] == 0).all()  # one without content, one without tokens


def test_pooling_at_one_chosen_layer() -> None:
    model = tiny()
    pooling = ContentPooling(model, [2])
    with pooling.batch(SEGMENTS, CONTENT, 3) as pooled:
        reported = model(IDS, output_hidden_states=True).hidden_states
    assert len(pooled) == 1
    for segment in (0, 1, 2):
        torch.testing.assert_close(pooled[0][segment], reported[2][(segment == SEGMENTS) & CONTENT].mean(0))


def test_layers_are_pooled_in_ascending_order_each_once() -> None:
    model = tiny()
    pooling = ContentPooling(model, [4, 1, 4])
    assert pooling.layers == (1, 4)
    with pooling.batch(SEGMENTS, CONTENT, 3) as pooled:
        reported = model(IDS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(pooled[0][0], reported[1][(SEGMENTS == 0) & CONTENT].mean(0))
    assert len(pooled) == 2
    with pytest.raises(ModelError, match="layer 5 does not exist"):
        ContentPooling(model, [5])
    with pytest.raises(ModelError, match="no layers to pool at"):
        ContentPooling(model, [])


def test_pooling_uses_shifted_states_in_fp32() -> None:
    model = tiny().to(torch.bfloat16)
    shift = LanguageShift(model, 1, 3)
    mean = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(2))
    norm, tokens = torch.ones(2, 2), torch.ones(2, dtype=torch.int64)
    shift.set_vectors(LanguageVectors(("en", "de"), "en", (1, 3), (1, 3), mean, norm, tokens, "", ""))
    pooling = ContentPooling(model, range(1, 3))
    with pooling.batch(SEGMENTS, CONTENT, 4) as plain:
        model(IDS)
    with shift.batch(torch.ones(2, 10, dtype=torch.long)), pooling.batch(SEGMENTS, CONTENT, 4) as shifted:
        model(IDS)
    assert shifted[0].dtype == torch.float32
    difference = (mean[0, 0] - mean[1, 0]).expand(3, -1)
    torch.testing.assert_close((shifted[0] - plain[0])[:3], difference, rtol=0.02, atol=0.02)


def test_a_batch_pools_one_forward_pass_and_nothing_is_pooled_outside() -> None:
    model = tiny()
    pooling = ContentPooling(model, range(1, 3))
    with pooling.batch(SEGMENTS, CONTENT, 4) as pooled:
        model(IDS)
        with pytest.raises(ModelError, match="a second forward pass"):
            model(IDS)
    model(IDS)
    assert len(pooled) == 2
    pooling.remove()
    with pooling.batch(SEGMENTS, CONTENT, 4) as pooled:
        model(IDS)
    assert pooled == []


@pytest.mark.parametrize("scale", [1.0, 12.5])
@pytest.mark.parametrize("number", [1, 2, 7, 24])
def test_losses_equal_a_plain_loop(number: int, scale: float) -> None:
    """Of each set by itself; padding to the largest set adds nothing."""
    pooled, pairs = states(2 * number), make_pairs(number)
    losses = losses_of(pooled, pairs, scale)
    assert losses.shape == (len(pairs["sets"].unique()),)
    for loss, each in zip(losses.tolist(), pairs["sets"].unique(), strict=True):
        alone = {key: value[pairs["sets"] == each] for key, value in pairs.items()}
        assert loss == pytest.approx(by_loop(pooled, **alone, scale=scale), rel=1e-4, abs=1e-5)
    assert losses.sum().item() == pytest.approx(by_loop(pooled, **pairs, scale=scale), rel=1e-4, abs=1e-5)


def test_pairs_of_the_same_item_or_text_are_not_negatives() -> None:
    pooled, pairs = states(16), make_pairs(8)
    pairs["sets"].zero_()
    plain = losses_of(pooled, pairs, 5.0).item()
    changes = {
        "same item": ("groups", (0,), (3,)),
        "same dominant text": ("content", (1, 0), (4, 0)),
        "same other text": ("content", (2, 1), (5, 1)),
        "one's translation is another's original": ("content", (6, 1), (7, 0)),
    }
    for name, (key, source, target) in changes.items():
        changed = {**pairs, key: pairs[key].clone()}
        changed[key][target] = changed[key][source]
        loss = losses_of(pooled, changed, 5.0).item()
        assert loss < plain - 1e-3, name
        assert loss == pytest.approx(by_loop(pooled, **changed, scale=5.0), rel=1e-4), name


def test_the_losses_of_several_sets_are_those_of_each_alone() -> None:
    pooled, pairs = states(24), make_pairs(12)
    together = losses_of(pooled, pairs, 4.0)
    alone = torch.cat([
        losses_of(pooled, {key: value[pairs["sets"] == number] for key, value in pairs.items()}, 4.0)
        for number in range(3)
    ])  # fmt: skip
    torch.testing.assert_close(together, alone)
    gradients = [torch.autograd.grad(losses.sum(), pooled) for losses in (together, alone)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_set_of_one_pair_gives_zero_and_no_gradient() -> None:
    """Also if another set has more pairs, up to whose number it is padded."""
    pooled, pairs = states(6), make_pairs(3)
    pairs["sets"] = torch.arange(3)
    losses = losses_of(pooled, pairs, 7.0)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 0.0, 0.0]
    assert all((state.grad == 0).all() for state in pooled)
    pooled, pairs["sets"] = states(6), torch.tensor([0, 0, 1])
    losses = losses_of(pooled, pairs, 7.0)
    losses.sum().backward()
    assert losses[0] > 0
    assert losses[1] == 0.0
    assert all((state.grad[pairs["pairs"][2]] == 0).all() for state in pooled)


def test_loss_of_perfect_and_reversed_alignment() -> None:
    eye = torch.eye(4, 8)
    pairs = make_pairs(4)
    pairs["pairs"] = torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]])
    pairs["sets"].zero_()
    right = losses_of([torch.cat([eye, eye])], pairs, 50.0)
    wrong = losses_of([torch.cat([eye, eye.roll(1, 0)])], pairs, 50.0)
    assert right.item() == pytest.approx(0.0, abs=1e-6)
    assert wrong.item() == pytest.approx(4 * 50.0, rel=1e-4)


@pytest.mark.parametrize("sets", ["none", "of other ranks"])
@pytest.mark.parametrize("idle", [False, True])
def test_the_loss_without_pairs_is_zero_with_gradients_for_all_pooled_layers(idle: bool, sets: str) -> None:
    model = tiny()
    pooling = ContentPooling(model, range(1, 3))
    ids = torch.tensor([[1]]) if idle else IDS  # an idle rank's micro-batch: one token, no content
    segments, content = (torch.tensor([[0]]), torch.tensor([[False]])) if idle else (SEGMENTS, CONTENT)
    with pooling.batch(segments, content, 1 if idle else 4) as pooled:
        model(ids)
    assert all(state.isfinite().all() for state in pooled)
    no_pairs = {key: value[:0] for key, value in make_pairs(1).items()}
    term = term_of(pooled, None if sets == "none" else sets_on_one_rank(no_pairs), 3.0)
    assert term.reported is not None
    assert (term.sum.item(), term.reported.item()) == (0.0, 0.0)
    term.sum.backward()
    gradients = [parameter.grad for parameter in model.model.layers[:2].parameters()]
    assert all(gradient is not None and (gradient == 0).all() for gradient in gradients)


def test_pairs_whose_content_is_empty_give_finite_gradients() -> None:
    model = tiny()
    pooling = ContentPooling(model, range(1, 3))
    with pooling.batch(SEGMENTS, CONTENT & (SEGMENTS != 0), 4) as pooled:
        model(IDS)
    pairs = make_pairs(2)
    pairs |= {"pairs": torch.tensor([[0, 1], [2, 3]]), "sets": torch.zeros(2, dtype=torch.long)}
    losses_of(pooled, pairs, 10.0).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.model.layers[:2].parameters())


def test_autocast_does_not_lower_the_precision() -> None:
    model = tiny()
    pooling = ContentPooling(model, range(1, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pooling.batch(SEGMENTS, CONTENT, 4) as pooled:
            model(IDS)
        inside = losses_of(states(14), make_pairs(7), 9.0)
    assert pooled[0].dtype == torch.float32
    assert torch.equal(inside, losses_of(states(14), make_pairs(7), 9.0))


def test_no_operation_synchronizes_with_the_device() -> None:
    """Fake tensors have no values: an operation that reads one, and so waits for the GPU, raises."""
    norm, tokens = torch.ones(2, 2), torch.ones(2, dtype=torch.int64)
    mean = torch.ones(2, 2, 16)
    vectors = LanguageVectors(("en", "de"), "en", (1, 3), (1, 3), mean, norm, tokens, "", "")
    sets = sets_on_one_rank(make_pairs(2))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = tiny()
        shift = LanguageShift(model, 1, 3)
        shift.set_vectors(vectors)
        pooling = ContentPooling(model, range(1, 3))
        languages = torch.zeros(2, 10, dtype=torch.long)
        # A ready-made mask, because transformers itself reads positions to make one.
        mask = torch.zeros(2, 1, 10, 10)
        with shift.batch(languages), pooling.batch(SEGMENTS.clone(), CONTENT.clone(), 4) as pooled:
            model(IDS.clone(), attention_mask=mask, use_cache=False)
        tensors = {
            spec.name: value.clone() for spec in fields(sets) if isinstance(value := getattr(sets, spec.name), Tensor)
        }
        term_of(pooled, replace(sets, **tensors), 3.0).sum.backward()
        with shift.batch(languages):
            assert shift._token_languages(languages, 10, 6, 1, False).shape == (6, 1)
        with pytest.raises(DataDependentOutputException):
            pooled[0].sum().item()
