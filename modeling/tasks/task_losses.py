"""Losses of the encoder tasks: one fp32 number in nats per label unit (a row, a word or an answer span).

They are neither weighted nor scaled; `training/objectives/finetune.py` does that.

Shapes: R rows, T tokens, N label units, C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEVER = torch.finfo(torch.float32).min  # a logit without weight in a softmax


def soft_cross_entropy(logits_NC: Tensor, classes_NC: Tensor) -> Tensor:
    """(N,) fp32: cross entropy against class probabilities; a hard label is a one-hot row."""
    return -(classes_NC * logits_NC.float().log_softmax(dim=1)).sum(dim=1)


def classification_losses(logits_RC: Tensor, classes_NC: Tensor, rows_N: Tensor) -> Tensor:
    """(N,) fp32: unit n is row `rows_N[n]`, its label the probabilities `classes_NC[n]`."""
    return soft_cross_entropy(logits_RC[rows_N], classes_NC)


def word_logits(logits_RTC: Tensor, token_word_RT: Tensor, n_words: int) -> Tensor:
    """(N, C) fp32: the mean of the logits of each word's tokens; zeros for a word without a token.

    Tokens are sorted by their words and summed by segments, which gives the same bits on every run.

    Args:
        logits_RTC: of all tokens.
        token_word_RT: (R, T) int64, the word of each token in range(N), -1 for none.
        n_words: N.
    """
    words, order = token_word_RT.flatten().sort(stable=True)
    # an additional first segment holds the tokens of no word
    lengths = words.new_zeros(n_words + 1).index_add_(0, words + 1, torch.ones_like(words))  # bincount reads its size
    in_order = logits_RTC.flatten(0, 1)[order].float()
    sums = torch.segment_reduce(in_order, "sum", lengths=lengths, axis=0, unsafe=True, initial=0)
    return sums[1:] / lengths[1:, None].clamp(min=1)


def tagging_losses(logits_RTC: Tensor, classes_NC: Tensor, token_word_RT: Tensor) -> Tensor:
    """(N,) fp32: cross entropy of each word's mean logits against its tag probabilities."""
    return soft_cross_entropy(word_logits(logits_RTC, token_word_RT, len(classes_NC)), classes_NC)


def span_log_probabilities(logits_RT: Tensor, attention_mask_RT: Tensor) -> Tensor:
    """(R, T) fp32: log softmax over a row's valid tokens; padding gets no probability."""
    return logits_RT.float().masked_fill(attention_mask_RT == 0, NEVER).log_softmax(dim=1)


def span_losses(
    start_logits_RT: Tensor, end_logits_RT: Tensor, attention_mask_RT: Tensor, spans_N2: Tensor, rows_N: Tensor
) -> Tensor:
    """(N,) fp32: mean of the cross entropies of an answer's first and last token, in row `rows_N[n]`.

    spans_N2: (N, 2) int64 token positions, both inclusive; (0, 0) where the row holds no answer.
    """
    start, end = (span_log_probabilities(logits, attention_mask_RT) for logits in (start_logits_RT, end_logits_RT))
    return -(start[rows_N, spans_N2[:, 0]] + end[rows_N, spans_N2[:, 1]]) / 2
