"""What evals raises when the user can mend it.

In: nothing. Out: `EvalError`. Next: the command line prints its one line and ends with `exit_status`.
"""

from __future__ import annotations


class EvalError(Exception):
    """One line that names the file, line or key, what is wrong and what would be right."""

    exit_status = 2
