"""Ranks as processes: launcher, nodes, preflight, watchdog, logs, signals."""
