"""The error that the user of training can mend.

In: nothing. Out: `ConfigError`. Next: every file of `training` raises it; `crosslift.py` prints it.
"""

from __future__ import annotations


class ConfigError(Exception):
    """One line that names the file, key or argument, what is wrong and what would be right."""

    exit_status = 2
