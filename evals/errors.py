"""The exception for mistakes of the user in evaluations."""

from __future__ import annotations


class EvalError(Exception):
    """One line that names the file, line or key, what is wrong and what would be right."""

    exit_status = 2
