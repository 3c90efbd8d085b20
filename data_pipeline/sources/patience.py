"""Retries for storage that is temporarily unreadable: a hanging network disk, an unavailable bucket, a moved file."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger(__name__)
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between two attempts; doubled each time

Result = TypeVar("Result")


def retry_reading(
    read: Callable[[], Result], source: str, seconds: float, sleep: Callable[[float], None] = time.sleep
) -> Result:
    """Call `read`, and retry for `seconds` in total while it raises OSError; log the outage once and its end.

    Raises:
        OSError: the last one, after `seconds`.
    """
    waited, pause = 0.0, FIRST_WAIT
    while True:
        try:
            result = read()
        except OSError as error:
            if waited >= seconds:
                raise
            if not waited:
                log.warning("%s: cannot be read (%s); retrying for %g s", source, error, seconds)
            pause = min(pause, seconds - waited)
            sleep(pause)
            waited += pause
            pause = min(2 * pause, LONGEST_WAIT)
        else:
            if waited:
                log.warning("%s: can be read again, after %.1f s", source, waited)
            return result
