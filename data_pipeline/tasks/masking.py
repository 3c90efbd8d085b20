"""Masking for masked language modelling (BERT, arXiv 1810.04805, section 3.1).

Shapes: T tokens of a window, n of them to be predicted.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
MASKED, REPLACED = 0.8, 0.1  # shares of the tokens to be predicted; the others are unchanged


def mask_tokens(
    input_ids: Ids, content: npt.NDArray[np.bool_], probability: float, mask_id: int, ordinary_ids: Ids, seed: int
) -> tuple[Ids, Ids]:
    """Masks tokens of a window, as a pure function of the arguments.

    Args:
        input_ids: (T,) the window.
        content: (T,) True for tokens of the text; only these are chosen, each with `probability`, at least one.
        ordinary_ids: ids of tokens that are not special; a replaced token becomes one of them.

    Returns:
        The masked tokens (T,) and the positions (n,) of the tokens to be predicted.
    """
    generator = np.random.default_rng(seed)
    candidates = np.flatnonzero(content)
    chosen = candidates[generator.random(len(candidates)) < probability]
    if not len(chosen):
        chosen = generator.choice(candidates, 1)
    draw = generator.random(len(chosen))
    others = ordinary_ids[generator.integers(len(ordinary_ids), size=len(chosen))]
    masked = input_ids.copy()
    masked[chosen] = np.where(
        draw < MASKED, np.int32(mask_id), np.where(draw < MASKED + REPLACED, others, input_ids[chosen])
    )
    return masked, chosen.astype(np.int32)
