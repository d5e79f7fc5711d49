"""A worker whose pulse is quick and whose dispatcher dies at its first step: `celery -A tests.hurt_worker worker`."""

import os
from unittest.mock import patch

from worker.celery import app
from worker.supervisor.dispatcher import Dispatcher

__all__ = ["app"]

step = Dispatcher.step
died: list[bool] = []


def die_once(dispatcher: Dispatcher) -> None:
    if "HURT_DISPATCHER" in os.environ and not died:
        died.append(True)
        raise SystemExit  # not even logged: a thread ends silently on it
    step(dispatcher)


patch("worker.supervisor.pulse.PULSE_SECONDS", 0.1).start()
patch.object(Dispatcher, "step", die_once).start()
