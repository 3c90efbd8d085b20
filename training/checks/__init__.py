"""What is checked of a run before its first step."""
