"""A run's folder: preparation, lock, date and status."""
