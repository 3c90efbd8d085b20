"""Samples -> Batches: packing within a token budget, padding, collation into tensors."""
