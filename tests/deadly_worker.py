"""A worker whose process dies at once when it reads a deadly event: `celery -A tests.deadly_worker worker`."""

import os
import signal
from typing import Any
from unittest.mock import patch

from events import parse_event
from worker.celery import app

__all__ = ["app"]


def die_of(raw: bytes) -> Any:
    if b"deadly" in raw:
        os.kill(os.getpid(), signal.SIGKILL)
    return parse_event(raw)


patch("worker.apply.applier.parse_event", die_of).start()
