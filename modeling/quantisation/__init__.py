"""Frozen linear layers with quantised weights (QLoRA): the layer, and the number formats."""
