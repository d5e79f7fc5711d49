"""Logs as JSON lines on standard error: an event name and fields, ids and never content."""

import logging
import sys
from typing import Any, Final

import structlog

_SHARED: tuple[Any, ...] = (
    structlog.stdlib.add_log_level,
    structlog.stdlib.add_logger_name,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
)
# Celery tells of every message at INFO; a pack is our unit, and our own lines tell of it.
_QUIET = {
    "celery.app.trace": logging.ERROR,
    "celery.worker.strategy": logging.WARNING,
    "celery.pool": logging.INFO,
    "httpx": logging.WARNING,
}
OURS: Final = {"worker", "events"}
REPEAT_SECONDS: Final = 60.0
REMEMBERED: Final = 1000  # lines


class OnceAMinute(logging.Filter):
    """Lets each line of a library pass once a minute: Celery tells ten times a second that Redis is full."""

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[object, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to show a record; our own are all shown."""
        if record.name.partition(".")[0] in OURS:
            return True
        line = (record.name, record.getMessage(), record.exc_info and record.exc_info[0])
        if record.created < self._next.get(line, 0.0):
            return False
        if len(self._next) >= REMEMBERED:
            self._next.clear()
        self._next[line] = record.created + REPEAT_SECONDS
        return True


def set_up_logs(level: str | int) -> None:
    """Send our own and all libraries' log records to standard error as JSON."""
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=_SHARED,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    handler.addFilter(OnceAMinute())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name, quiet in _QUIET.items():
        logging.getLogger(name).setLevel(quiet)
    structlog.configure(
        processors=[*_SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger whose first argument is the event's name, as `pack.applied`."""
    logger: structlog.stdlib.BoundLogger = structlog.stdlib.get_logger(name)
    return logger
