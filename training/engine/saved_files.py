"""The engine's files in a checkpoint: their names, and what a run must keep to load them. Light to import."""

from __future__ import annotations

TAG = "zero"  # DeepSpeed's name for a checkpoint: the folder of its files inside ours

# Keys of a run file that the saved state depends on: with other values it cannot be loaded.
FIXED_KEYS = ("precision", "zero_stage")


def shard_of(rank: int) -> str:
    """The file that holds a rank's part of the weights under ZeRO-3, by its name in a checkpoint."""
    return f"{TAG}/zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


def needs_shared_disk(zero_stage: int) -> str | None:
    """Why a run's checkpoints must lie on one disk that all ranks share, as the end of a sentence; None: they need not.

    Below stage 3 the weights are saved by rank 0 alone, so that the other nodes' disks would lack them.
    """
    return None if zero_stage == 3 else "which needs zero_stage=3"
