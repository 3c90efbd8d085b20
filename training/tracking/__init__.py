"""Experiment tracking: the run's record, MLflow fed from it, scores, plots."""
