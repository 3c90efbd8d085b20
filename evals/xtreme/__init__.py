"""XTREME: predictions in its file layout, scored as its own scorer does, and whole runs."""
