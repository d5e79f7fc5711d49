"""A worker whose pulse is quick and whose intake dies at its first step: `celery -A tests.hurt_worker worker`."""

import os
from unittest.mock import patch

from worker.celery import app
from worker.intake import Intake

__all__ = ["app"]

step = Intake.step
died: list[bool] = []


def die_once(intake: Intake) -> None:
    if "HURT_INTAKE" in os.environ and not died:
        died.append(True)
        raise SystemExit  # not even logged: a thread ends silently on it
    step(intake)


patch("worker.supervisor.PULSE_SECONDS", 0.1).start()
patch.object(Intake, "step", die_once).start()
