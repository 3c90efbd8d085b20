"""Parallel arithmetic word problems at toy scale: the situations, their phrasings per language, the corpus."""
