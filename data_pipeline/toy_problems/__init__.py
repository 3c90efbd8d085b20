"""Parallel arithmetic word problems at toy scale: situations, phrasings per language, the corpus, a labelled task."""
