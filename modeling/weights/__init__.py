"""Reading, matching, checking and writing of weight files."""
