"""The engine's files in a checkpoint: their names, and the keys that must not change to load them. Light to import."""

from __future__ import annotations

TAG = "zero"  # DeepSpeed's name of a checkpoint: the folder of its files in a checkpoint of crosslift

# Keys of a run file that the saved state depends on: with other values it cannot be loaded.
FIXED_KEYS = ("precision", "zero_stage")


def shard_of(rank: int) -> str:
    """Name in a checkpoint of the file with a rank's part of the weights under ZeRO-3."""
    return f"{TAG}/zero_pp_rank_{rank}_mp_rank_00_model_states.pt"


def needs_shared_disk(zero_stage: int) -> str | None:
    """Why a run's checkpoints need a disk that all ranks share, as the end of a sentence; None if they do not.

    Below stage 3 only rank 0 saves the weights, so the disks of the other nodes would lack them.
    """
    return None if zero_stage == 3 else "which needs zero_stage=3"
