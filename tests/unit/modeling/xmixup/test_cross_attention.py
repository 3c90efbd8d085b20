"""Entropies of small attention matrices equal values computed by hand."""

import math

import pytest
import torch
from torch import Tensor

from modeling.xmixup.cross_attention import attention_weights, pair_entropy, scaled_scores


def entropy(scores: Tensor, target: Tensor, source: Tensor, form: str = "true") -> Tensor:
    return pair_entropy(scores, attention_weights(scores, source), target, source, form)


def test_uniform_attention_has_the_entropy_of_its_valid_keys() -> None:
    scores = torch.zeros(2, 3, 4, 6)
    target = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]).bool()
    source = torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]).bool()
    expected = torch.tensor([math.log(5) + math.log(3), math.log(2) + math.log(1)])
    torch.testing.assert_close(entropy(scores, target, source), expected)


def test_an_aligned_pair_has_zero_entropy() -> None:
    scores = 200 * torch.eye(4).expand(1, 2, 4, 4)
    every = torch.ones(1, 4, dtype=torch.bool)
    assert entropy(scores, every, every).abs() < 1e-6
    permuted = scores[..., [2, 0, 3, 1]]
    assert entropy(permuted, every, every).abs() < 1e-6
    one_sided = scores.clone()
    one_sided[..., 1:, :] = one_sided[..., :1, :]  # all target tokens attend to one source token
    assert entropy(one_sided, every, every) > 1  # the source token attends to all target tokens


def test_gradients_equal_finite_differences() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    source = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    for form in ("true", "authors"):
        assert torch.autograd.gradcheck(lambda s, form=form: entropy(s, target, source, form), scores)


def test_scores_of_padding_change_only_the_authors_form() -> None:
    torch.manual_seed(0)
    scores = torch.randn(1, 2, 3, 4)
    target, source = torch.tensor([[1, 1, 0]]).bool(), torch.tensor([[1, 1, 1, 0]]).bool()
    other = scores.clone()
    other[:, :, 2] += 5
    other[..., 3] -= 5
    assert torch.equal(entropy(other, target, source), entropy(scores, target, source))
    assert (entropy(other, target, source, "authors") - entropy(scores, target, source, "authors")).abs() > 0.1
    # without padding both are the same entropy
    whole = torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(entropy(scores, *whole), entropy(scores, *whole, "authors"))


@pytest.mark.parametrize("form", ["true", "authors"])
def test_entropy_of_a_side_with_only_padding_is_finite(form: str) -> None:
    scores = torch.randn(1, 2, 3, 4, requires_grad=True)
    nothing, every = torch.zeros(1, 4, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
    found = entropy(scores, every, nothing, form)
    found.sum().backward()
    assert found.isfinite().all()
    assert scores.grad.isfinite().all()


def test_low_precision_is_converted_to_fp32() -> None:
    query, key = torch.randn(1, 2, 3, 8).bfloat16(), torch.randn(1, 2, 4, 8).bfloat16()
    scores = scaled_scores(query, key)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, query.float() @ key.float().mT / math.sqrt(8), rtol=1e-6, atol=1e-6)
