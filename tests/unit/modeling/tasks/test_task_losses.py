"""Task losses against loops over label units."""

import math

import torch
from torch import Tensor

from modeling.tasks.task_losses import (
    classification_losses,
    span_log_probabilities,
    span_losses,
    tagging_losses,
    word_logits,
)


def log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = math.log(sum(math.exp(logit - top) for logit in logits)) + top
    return [logit - total for logit in logits]


def cross_entropy(logits: list[float], classes: list[float]) -> float:
    return -sum(p * log for p, log in zip(classes, log_softmax(logits), strict=True) if p)


def probabilities(rows: int, classes: int) -> Tensor:
    table = torch.rand(rows, classes).softmax(dim=1)
    table[0] = torch.eye(classes)[1]  # a hard label
    return table


def test_classification_takes_the_rows_of_its_units() -> None:
    torch.manual_seed(0)
    logits, classes, rows = torch.randn(5, 3) * 4, probabilities(4, 3), torch.tensor([4, 0, 2, 2])
    expected = [cross_entropy(logits[row].tolist(), classes[n].tolist()) for n, row in enumerate(rows.tolist())]
    torch.testing.assert_close(classification_losses(logits, classes, rows), torch.tensor(expected))


def test_tagging_pools_the_logits_of_each_word() -> None:
    torch.manual_seed(1)
    logits, classes = torch.randn(3, 6, 4, requires_grad=True), probabilities(6, 4)
    # word 3 has tokens that are not adjacent, word 5 has none (truncated), -1 are special tokens and padding
    token_word = torch.tensor([[-1, 0, 0, 0, 1, -1], [-1, 3, 2, 3, -1, -1], [-1, 4, 4, -1, -1, -1]])
    expected, pooled = [], []
    for word in range(6):
        tokens = [(r, t) for r in range(3) for t in range(6) if token_word[r, t] == word]
        mean = [sum(logits[r, t, c].item() for r, t in tokens) / max(len(tokens), 1) for c in range(4)]
        pooled.append(mean)
        expected.append(cross_entropy(mean, classes[word].tolist()))
    losses = tagging_losses(logits, classes, token_word)
    torch.testing.assert_close(word_logits(logits, token_word, 6), torch.tensor(pooled))
    torch.testing.assert_close(losses, torch.tensor(expected))
    losses.sum().backward()
    assert torch.equal(logits.grad.abs().sum(dim=2) > 0, token_word >= 0)
    weights = torch.randn(6, 4)
    (gradient,) = torch.autograd.grad((word_logits(logits, token_word, 6) * weights).sum(), logits)
    sizes = torch.bincount(token_word[token_word >= 0], minlength=6)
    for row, token in (token_word >= 0).nonzero().tolist():
        word = token_word[row, token]
        torch.testing.assert_close(gradient[row, token], weights[word] / sizes[word])


def test_tagging_loss_of_a_batch_without_words() -> None:
    """An idle micro-batch: a stand-in word of weight 0, with or without a token."""
    logits = torch.randn(1, 1, 4, requires_grad=True)
    for word in (0, -1):
        losses = tagging_losses(logits, torch.eye(4)[:1], torch.tensor([[word]]))
        assert losses.shape == (1,)
        (losses * 0).sum().backward()
        assert losses.isfinite().all()
    assert tagging_losses(logits, torch.zeros(0, 4), torch.tensor([[-1]])).shape == (0,)


def test_span_losses_ignore_padding() -> None:
    torch.manual_seed(2)
    start, end = torch.randn(3, 5) * 3, torch.randn(3, 5) * 3
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    spans, rows = torch.tensor([[1, 2], [0, 0], [0, 0], [3, 4]]), torch.tensor([1, 2, 0, 0])
    expected = []
    for (first, last), row in zip(spans.tolist(), rows.tolist(), strict=True):
        width = int(mask[row].sum())
        expected.append(
            -(log_softmax(start[row, :width].tolist())[first] + log_softmax(end[row, :width].tolist())[last]) / 2
        )
    losses = span_losses(start, end, mask, spans, rows)
    torch.testing.assert_close(losses, torch.tensor(expected))
    start[mask == 0] += 50
    assert torch.equal(span_losses(start, end, mask, spans, rows), losses)
    torch.testing.assert_close(span_log_probabilities(start, mask).exp().sum(dim=1), torch.ones(3))
    assert (span_log_probabilities(start, mask).exp()[mask == 0] == 0).all()


def test_losses_are_fp32_whatever_the_logits_are() -> None:
    torch.manual_seed(4)
    logits = torch.randn(2, 3, 5).bfloat16()
    token_word, spans, rows = torch.tensor([[0, 0, 0], [1, -1, -1]]), torch.zeros(2, 2).long(), torch.arange(2)
    classes, mask = torch.eye(5)[:2], torch.ones(2, 5)
    for losses, exact in [
        (classification_losses(logits[0], classes, rows), classification_losses(logits[0].float(), classes, rows)),
        (tagging_losses(logits, classes, token_word), tagging_losses(logits.float(), classes, token_word)),
        (
            span_losses(logits[:, 0], logits[:, 1], mask, spans, rows),
            span_losses(logits[:, 0].float(), logits[:, 1].float(), mask, spans, rows),
        ),
    ]:
        assert losses.dtype == torch.float32
        assert torch.equal(losses, exact)
