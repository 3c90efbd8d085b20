"""The loop and all that surrounds a step. `trainer.py` is the place to start reading."""
