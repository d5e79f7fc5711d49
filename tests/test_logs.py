"""The log: JSON lines; what a library repeats is told once a minute."""

import logging

import pytest

from worker.logs import REPEAT_SECONDS, OnceAMinute


def record(name: str, message: str, *, at: float = 0.0, error: Exception | None = None) -> logging.LogRecord:
    told = logging.LogRecord(
        name, logging.WARNING, __file__, 1, message, (), (type(error), error, None) if error else None
    )
    told.created = 1_000_000_000 + at
    return told


def shown(*records: logging.LogRecord) -> list[bool]:
    once = OnceAMinute()
    return [bool(once.filter(each)) for each in records]


def test_a_line_that_a_library_repeats_is_shown_once_a_minute() -> None:
    times = (0.0, 0.1, REPEAT_SECONDS - 0.1, REPEAT_SECONDS, REPEAT_SECONDS + 0.1)
    assert shown(*(record("celery.worker", "lost (1)", at=at) for at in times)) == [True, False, False, True, False]


@pytest.mark.parametrize("other", [
    record("celery.worker", "found (1)"),
    record("kombu", "lost (1)"),
    record("celery.worker", "lost (1)", error=ValueError()),
])  # fmt: skip
def test_another_line_is_shown_at_once(other: logging.LogRecord) -> None:
    assert shown(record("celery.worker", "lost (1)"), other) == [True, True]


def test_our_own_lines_are_all_shown() -> None:
    assert all(shown(*(record(name, "pack.applied") for name in ("worker.apply", "events.spool") for _ in range(3))))
