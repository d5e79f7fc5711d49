"""The Celery app: `celery -A worker worker` needs nothing but the environment.

Celery on Redis may lose a message when a worker is killed, and nothing here depends on it remembering: the stream
does. So the settings below are about running and draining well, not about durability.
"""

import logging
import sys
from typing import Any

from celery import Celery
from celery.signals import setup_logging

from worker.errors import SettingsError
from worker.intake import IntakeStep
from worker.logs import set_up_logs
from worker.settings import Settings, load_settings

QUEUE = "interview"


def make_app(settings: Settings) -> Celery:
    """A Celery app with the intake, the task and every setting that TRAPS taught us."""
    app = Celery("worker", broker=settings.redis_url.get_secret_value(), include=["worker.tasks"])
    app.conf.update(
        task_default_queue=QUEUE,
        task_acks_late=True,  # acknowledge after the commit, so that a crash means redelivery
        task_reject_on_worker_lost=True,
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        worker_pool=settings.pool,
        worker_concurrency=settings.concurrency,
        worker_prefetch_multiplier=2,  # one pack runs in a slot, one is at hand
        worker_hijack_root_logger=False,
        worker_enable_remote_control=True,
        worker_cancel_long_running_tasks_on_connection_loss=False,  # the RPC goes on, and a repeat is harmless
        worker_send_task_events=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,  # READONLY or OOM from Redis must not end the worker
        broker_pool_limit=None,
        broker_transport_options={
            "visibility_timeout": settings.visibility_timeout_seconds,
            "socket_timeout": 15,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 15,
        },
    )
    app.steps["worker"].add(IntakeStep)
    return app


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
