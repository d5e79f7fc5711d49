"""A worker's end: at SIGTERM within its grace, at the second one now."""

import os
import signal
import threading
from contextlib import suppress
from typing import Any

from worker import metrics, stopping
from worker.logs import get_logger
from worker.queue.pool import pool_processes

log = get_logger(__name__)


class Shutdown:
    """Sees to it that the worker ends within `grace_seconds`, whatever it does."""

    def __init__(self, grace_seconds: float) -> None:
        self._grace_seconds = grace_seconds
        self._asked = False

    def begin(self, **_: Any) -> None:
        """SIGTERM: claim no more, before anything else stops, and end within the grace. Called again: end now."""
        stopping.stop()
        seconds, why = (0.0, "asked twice") if self._asked else (self._grace_seconds, "the grace is over")
        self._asked = True
        end = threading.Timer(seconds, end_now, (why,))
        end.daemon = True
        end.start()


def end_now(why: str) -> None:
    """End this process and its pool, whatever they do: their entries stay claimed, and others reclaim them."""
    log.error("worker.ended_at_once", why=why)
    for pid in pool_processes():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    metrics.clean_up()
    os._exit(1)
