"""Which tokens of a text are to be predicted, and what stands in their place (BERT, arXiv 1810.04805, section 3.1).

In: the tokens of a window and a seed. Out: the tokens as the model sees them, and what was there. Next: `reader.py`.

Shapes: T tokens of a window, n of them to be predicted.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
MASKED, REPLACED = 0.8, 0.1  # of the tokens to be predicted; the others stay as they are


def mask_tokens(
    input_ids: Ids, content: npt.NDArray[np.bool_], probability: float, mask_id: int, ordinary_ids: Ids, seed: int
) -> tuple[Ids, Ids]:
    """The tokens (T,) with some of them covered, and the positions (n,) of those to be predicted, n at least 1.

    Only tokens of the text, `content` (T,), are chosen: each with `probability`, one in any case. A replaced
    token becomes one of `ordinary_ids`, tokens that are not special. A pure function of its input.
    """
    generator = np.random.default_rng(seed)
    candidates = np.flatnonzero(content)
    chosen = candidates[generator.random(len(candidates)) < probability]
    if not len(chosen):
        chosen = generator.choice(candidates, 1)
    fate = generator.random(len(chosen))
    others = ordinary_ids[generator.integers(len(ordinary_ids), size=len(chosen))]
    covered = input_ids.copy()
    covered[chosen] = np.where(
        fate < MASKED, np.int32(mask_id), np.where(fate < MASKED + REPLACED, others, input_ids[chosen])
    )
    return covered, chosen.astype(np.int32)
