"""X-Mixup: mixing by cross-attention, its ratio, and the consistency loss."""
