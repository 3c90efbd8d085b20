"""Encoders for labelled tasks: heads, losses and hidden states."""
