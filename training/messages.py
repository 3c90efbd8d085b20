"""Messages to the user: one line on stderr, marked as crosslift's."""

from __future__ import annotations

import sys

PREFIX = "crosslift: "


def print_message(text: str) -> None:
    """Print one line to the terminal."""
    print(f"{PREFIX}{text}", file=sys.stderr, flush=True)
