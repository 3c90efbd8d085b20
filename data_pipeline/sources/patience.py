"""Waits for storage that is away for a while: a network disk that hangs up, a bucket that says no, a file being moved.

In: a reading function. Out: what it reads, later, or its last error. Next: `index.py` reads every row through it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger(__name__)
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between two tries, doubled each time

Read = TypeVar("Read")


def patiently(read: Callable[[], Read], what: str, seconds: float, sleep: Callable[[float], None] = time.sleep) -> Read:
    """`read()`, tried again for `seconds` while it raises OSError; says so once, and when it works again.

    Raises the last OSError.
    """
    waited, wait = 0.0, FIRST_WAIT
    while True:
        try:
            found = read()
        except OSError as error:
            if waited >= seconds:
                raise
            if not waited:
                log.warning("%s: cannot be read (%s); trying again for %g s", what, error, seconds)
        else:
            if waited:
                log.warning("%s: can be read again, after %.1f s", what, waited)
            return found
        wait = min(wait, seconds - waited)
        sleep(wait)
        waited += wait
        wait = min(2 * wait, LONGEST_WAIT)
