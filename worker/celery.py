"""What `celery -A worker worker` and `celery -A worker beat` find: the app. They need nothing but the environment."""

import logging
import sys
from typing import Any

from celery.signals import setup_logging

from worker.app import make_app
from worker.errors import SettingsError
from worker.logs import set_up_logs
from worker.settings import load_settings


@setup_logging.connect
def _set_up_logs(loglevel: int | None = None, **_: Any) -> None:
    """`-l` may ask for more than INTERVIEW_LOG_LEVEL; Celery's own default, WARNING, hides that a worker started."""
    ours = logging.getLevelNamesMapping()[settings.log_level]
    set_up_logs(min(loglevel or ours, ours))


try:
    settings = load_settings()
    app = make_app(settings)
except SettingsError as error:
    print(f"celery: {error}", file=sys.stderr)  # noqa: T201 - the one line before logs exist
    raise SystemExit(2) from None
