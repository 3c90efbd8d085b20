"""Scores: MGSM, answer extraction, statistics, and the quickstart that tells the whole story at toy scale."""
