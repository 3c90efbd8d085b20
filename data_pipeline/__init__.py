"""From files to batches: records -> sources -> index -> order -> mixture -> plan -> chat -> packing -> loader."""
