"""Checks before the first step of a run."""
