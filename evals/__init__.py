"""Evaluation: MGSM, XTREME, statistics, representations, and the quickstart at toy scale."""
