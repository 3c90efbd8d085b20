"""Changes to models: loading, adapters, the shift, mixing, losses and generation."""

import os

import torch
from transformers.utils import logging

# transformers imports deepspeed if it is installed, and deepspeed logs a guess of its device unless it is set.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
logging.disable_progress_bar()
