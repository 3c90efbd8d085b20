"""Slurm: will own job specs, their rendering, submission and requeueing. Nothing is here yet.

Until then `srun python -m training CONFIG`, one task a GPU, with MASTER_ADDR and MASTER_PORT set, starts the loop.
"""
