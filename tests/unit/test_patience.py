"""patience.py: storage that comes back in time is waited for, and what does not is an error."""

from __future__ import annotations

import logging

import pytest

from data_pipeline.sources.patience import LONGEST_WAIT, patiently


class Storage:
    """Away for so many reads."""

    def __init__(self, failures: float) -> None:
        self.failures = failures
        self.slept: list[float] = []

    def read(self) -> str:
        self.failures -= 1
        if self.failures >= 0:
            raise OSError(5, "Input/output error")
        return "row"


@pytest.mark.parametrize("failures", [0, 1, 7])
def test_what_comes_back_in_time_is_read(failures: int, caplog: pytest.LogCaptureFixture) -> None:
    storage = Storage(failures)
    with caplog.at_level(logging.WARNING):
        assert patiently(storage.read, "en.jsonl", 300, storage.slept.append) == "row"
    assert len(storage.slept) == failures
    assert len(caplog.messages) == (2 if failures else 0), "said once, whatever the number of tries"
    assert all(message.startswith("en.jsonl: can") for message in caplog.messages)
    assert storage.slept == sorted(storage.slept)
    assert max(storage.slept, default=0) <= LONGEST_WAIT


def test_patience_ends_and_the_error_is_the_last_one() -> None:
    storage = Storage(float("inf"))
    with pytest.raises(OSError, match="Input/output error"):
        patiently(storage.read, "en.jsonl", 100, storage.slept.append)
    assert sum(storage.slept) == pytest.approx(100)


def test_no_patience_is_one_try() -> None:
    storage = Storage(1)
    with pytest.raises(OSError, match="Input/output error"):
        patiently(storage.read, "en.jsonl", 0, storage.slept.append)
    assert storage.slept == []


def test_other_errors_are_not_waited_for() -> None:
    def broken() -> None:
        raise ValueError("not a disk's")

    with pytest.raises(ValueError, match="not a disk's"):
        patiently(broken, "en.jsonl", 300, sleep=lambda seconds: pytest.fail("it waits"))
