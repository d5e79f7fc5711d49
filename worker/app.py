"""The Celery app, as a function of the settings.

Celery on Redis may lose a message when a worker is killed, and nothing here depends on it remembering: the stream
does. So the settings below are about running and draining well, not about durability.
"""

import ssl
import tempfile
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import billiard.pool
from celery import Celery

from worker.settings import Settings
from worker.supervisor import Supervisor
from worker.transport import STREAM_OPTION

MAINTENANCE_SECONDS = 300.0


def make_app(settings: Settings) -> Celery:
    """A Celery app with the intake, the task, and settings for a worker that runs for months."""
    url = settings.redis_url.get_secret_value()
    app = Celery("worker", broker=url, include=["worker.tasks"])
    app.conf.update(
        task_default_queue=settings.queue,
        task_acks_late=True,  # acknowledge after the commit, so that a crash means redelivery
        task_reject_on_worker_lost=False,  # the stream hands the pack out again, and counts how often
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
        beat_schedule={
            "expire waiting events": {"task": "interview.expire_waiting", "schedule": MAINTENANCE_SECONDS},
            "purge the ledger": {"task": "interview.purge", "schedule": MAINTENANCE_SECONDS},
        },
        beat_schedule_filename=str(Path(tempfile.gettempdir()) / "interviews-beat-schedule"),
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_channel_error_retry=True,  # READONLY or OOM from Redis must not end the worker
        broker_pool_limit=None,
        broker_transport="worker.transport:Transport",
        broker_use_ssl=_tls(url),
        broker_transport_options={
            STREAM_OPTION: settings.stream,
            "client_name": f"interview-queue-{uuid.uuid4().hex[:12]}",  # of this process, which can wake itself by it
            "socket_timeout": 15,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 15,
        },
    )
    app.steps["worker"].add(Supervisor)
    # At the end a pool process waits for the main process to read its last result, which sometimes it no longer does;
    # 1 s instead of 30 s, as nothing of ours needs that result. (A constant of the module: there is no setting.)
    billiard.pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT = 10
    return app


def _tls(url: str) -> dict[str, Any] | None:
    """TLS as redis-py has it: certificates are checked unless the URL says otherwise (kombu would not check)."""
    if not url.startswith("rediss://"):
        return None
    said = {name: value for name, value in parse_qsl(urlsplit(url).query) if name.startswith("ssl_")}
    return {"ssl_cert_reqs": ssl.CERT_REQUIRED} | said
