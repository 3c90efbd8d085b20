"""Encoders of labelled tasks: heads, losses, states."""
