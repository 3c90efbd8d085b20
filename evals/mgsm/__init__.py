"""MGSM-style problems: prompts, answers as numbers, scores."""
