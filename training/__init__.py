"""Training: the loop, and what prepares, runs and ends it. `loop/trainer.py` is the place to start reading."""
