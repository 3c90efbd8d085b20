"""The training loop: Trainer, per-step sums, evaluation, guard, resume."""
