"""The LM head in training: label positions only, losses in chunks."""
