"""X-Mixup's consistency of pairs equals a plain loop; the representations that it compares."""

import math

import torch

from modeling.xmixup.consistency import consistency, content_mask, representations


def test_content_excludes_padding_and_special_tokens() -> None:
    ids = torch.tensor([[0, 5, 6, 2, 2, 7, 2], [0, 8, 2, 1, 1, 1, 1]])
    mask = torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0]])
    assert content_mask(ids, mask, (0, 2)).tolist() == [
        [False, True, True, False, False, True, False],
        [False, True, False, False, False, False, False],
    ]
    assert torch.equal(content_mask(ids, mask, ()), mask.bool())


def test_representations_are_the_first_token_or_the_mean_over_content() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3, 4, 5, requires_grad=True)
    content = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    assert torch.equal(representations(hidden), hidden[:, 0])
    found = representations(hidden, content)
    torch.testing.assert_close(found[0], (hidden[0, 1] + hidden[0, 2]) / 2)
    torch.testing.assert_close(found[1], hidden[1, 3])
    assert torch.equal(found[2], torch.zeros(5))  # and not NaN
    found.sum().backward()
    assert torch.equal(hidden.grad.abs().sum(dim=2) > 0, content)
    low = representations(hidden.bfloat16(), content)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, representations(hidden.bfloat16().float(), content))


def test_consistency_of_each_pair_equals_loops() -> None:
    torch.manual_seed(1)
    vectors, logits = torch.randn(6, 4, requires_grad=True), (3 * torch.randn(6, 3)).requires_grad_()
    expected = []
    for pair in range(3):
        target, source = vectors[pair].tolist(), vectors[3 + pair].tolist()
        distance = sum((t - s) ** 2 for t, s in zip(target, source, strict=True)) / 4
        probabilities = []
        for row in (pair, 3 + pair):
            total = sum(math.exp(logit) for logit in logits[row].tolist())
            probabilities.append([math.exp(logit) / total for logit in logits[row].tolist()])
        divergence = sum(s * math.log(s / t) for t, s in zip(*probabilities, strict=True))  # of source from target
        expected.append((distance, distance + divergence))
    torch.testing.assert_close(consistency(vectors, 3), torch.tensor([pair[0] for pair in expected]))
    both = consistency(vectors, 3, logits)
    torch.testing.assert_close(both, torch.tensor([pair[1] for pair in expected]))
    both.sum().backward()
    assert (vectors.grad.abs().sum(dim=1) > 0).all()  # both sides get gradients
    assert (logits.grad.abs().sum(dim=1) > 0).all()


def test_consistency_of_equal_sides_is_zero_and_of_no_pairs_empty() -> None:
    half = torch.randn(2, 4)
    same = torch.cat([half, half])
    assert torch.equal(consistency(same, 2, same), torch.zeros(2))
    assert consistency(torch.randn(3, 4), 0, torch.randn(3, 2)).shape == (0,)


def test_consistency_of_confident_predictions_is_finite() -> None:
    logits = torch.tensor([[500.0, 0, -500], [-500, 0, 500]]).requires_grad_()
    found = consistency(torch.zeros(2, 3), 1, logits)
    found.sum().backward()
    assert found.isfinite().all()
    assert logits.grad.isfinite().all()
