"""Retries for storage that is temporarily unreadable: a hanging network disk, an unavailable bucket, a moved file."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import tenacity

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

    def log_outage(state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            log.warning("%s: cannot be read (%s); retrying for %g s", source, state.outcome.exception(), seconds)

    backoff = tenacity.wait_exponential(multiplier=FIRST_WAIT, max=LONGEST_WAIT)
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(OSError),
        wait=lambda state: min(backoff(state), seconds - state.idle_for),
        stop=lambda state: state.idle_for >= seconds,
        before_sleep=log_outage,
        sleep=sleep,
        reraise=True,
    )
    result = retrying(read)
    if waited := retrying.statistics["idle_for"]:
        log.warning("%s: can be read again, after %.1f s", source, waited)
    return result
