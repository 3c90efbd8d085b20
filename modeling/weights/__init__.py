"""Weight files: reading, matching, checking, writing."""
