"""X-Mixup: cross-attention mixing, its ratio, consistency losses."""
