"""What lies in a run's folder: its start, lock, date and status."""
