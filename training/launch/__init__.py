"""Starting and supervising ranks: launcher, preflight, watchdog, logs, signals."""
