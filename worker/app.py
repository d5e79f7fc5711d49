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

from celery import Celery

from worker.queue.pool import shorten_the_end_of_pool_processes
from worker.queue.transport import STREAM_OPTION
from worker.settings import Settings
from worker.supervisor.bootstep import Supervisor

MAINTENANCE_SECONDS = 300.0


def make_app(settings: Settings) -> Celery:
    """A Celery app with the supervisor, the tasks, and settings for a worker that runs for months."""
    url = settings.redis_url.get_secret_value()
    app = Celery("worker", broker=url, include=["worker.apply.tasks"])
    app.conf.update(
        task_default_queue=settings.queue,
        task_acks_late=True,  # a message in hand is one running task: so no slot's worth of messages is fetched ahead
        task_reject_on_worker_lost=False,  # the stream remembers what the lost process was at
        task_ignore_result=True,
        task_serializer="json",
        accept_content=["json"],
        worker_pool=settings.pool,
        worker_concurrency=settings.concurrency,
        worker_prefetch_multiplier=1,  # what waits, waits on the queue, open to all workers
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
        broker_transport="worker.queue.transport:Transport",
        broker_use_ssl=_tls(url),
        broker_transport_options={
            STREAM_OPTION: settings.stream,
            "client_name": f"interview-queue-{uuid.uuid4().hex[:12]}",  # of this process, which can wake itself by it
            "socket_timeout": 15,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "health_check_interval": 30,  # seconds; each is two commands of Redis
        },
    )
    app.steps["worker"].add(Supervisor)
    shorten_the_end_of_pool_processes()
    return app


def _tls(url: str) -> dict[str, Any] | None:
    """TLS as redis-py has it: certificates are checked unless the URL says otherwise (kombu would not check)."""
    if not url.startswith("rediss://"):
        return None
    options = {name: value for name, value in parse_qsl(urlsplit(url).query) if name.startswith("ssl_")}
    return {"ssl_cert_reqs": ssl.CERT_REQUIRED} | options
