"""The training loop: Trainer, per-step sums, guard, resume."""
