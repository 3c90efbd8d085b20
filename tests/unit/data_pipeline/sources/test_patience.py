"""Retries of reads from unreadable storage: they succeed if it recovers in time, else the last error is raised."""

from __future__ import annotations

import logging

import pytest

from data_pipeline.sources.patience import LONGEST_WAIT, retry_reading


class Storage:
    """Fails for the given number of reads."""

    def __init__(self, failures: float) -> None:
        self.failures = failures
        self.slept: list[float] = []

    def read(self) -> str:
        self.failures -= 1
        if self.failures >= 0:
            raise OSError(5, "Input/output error")
        return "row"


@pytest.mark.parametrize("failures", [0, 1, 7])
def test_storage_that_recovers_in_time_is_read(failures: int, caplog: pytest.LogCaptureFixture) -> None:
    storage = Storage(failures)
    with caplog.at_level(logging.WARNING):
        assert retry_reading(storage.read, "en.jsonl", 300, storage.slept.append) == "row"
    assert len(storage.slept) == failures
    assert len(caplog.messages) == (2 if failures else 0), "logged once, whatever the number of attempts"
    assert all(message.startswith("en.jsonl: can") for message in caplog.messages)
    assert storage.slept == sorted(storage.slept)
    assert max(storage.slept, default=0) <= LONGEST_WAIT


def test_retries_end_after_the_given_time_with_the_last_error() -> None:
    storage = Storage(float("inf"))
    with pytest.raises(OSError, match="Input/output error"):
        retry_reading(storage.read, "en.jsonl", 100, storage.slept.append)
    assert sum(storage.slept) == pytest.approx(100)


def test_zero_seconds_mean_one_attempt() -> None:
    storage = Storage(1)
    with pytest.raises(OSError, match="Input/output error"):
        retry_reading(storage.read, "en.jsonl", 0, storage.slept.append)
    assert storage.slept == []


def test_other_errors_are_not_retried() -> None:
    def broken() -> None:
        raise ValueError("not a disk's")

    with pytest.raises(ValueError, match="not a disk's"):
        retry_reading(broken, "en.jsonl", 300, sleep=lambda seconds: pytest.fail("it waited"))
