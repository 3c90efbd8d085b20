"""The run's record and what is made of it: MLflow, scores, plots."""
