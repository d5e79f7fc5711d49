"""The Celery task. It carries work and is never the only copy of an event: the stream remembers."""

import gc
from dataclasses import dataclass
from functools import cache
from typing import Any

import redis
from celery import Task, shared_task
from celery.signals import worker_process_init, worker_process_shutdown
from celery.worker.request import Request

from worker import tracing
from worker.apply import Applier
from worker.database import Database
from worker.dead_share import DeadShare
from worker.errors import PackGivenBack
from worker.hold import Hold
from worker.logs import get_logger
from worker.pack import Message, Pack
from worker.settings import Settings, load_settings
from worker.stream import EventStream, connect

log = get_logger(__name__)


class PackRequest(Request):  # type: ignore[misc]  # Celery ships no types
    """Tells `celery inspect active` and `reserved` what argsrepr says, and not the candidates' data."""

    def info(self, safe: bool = True) -> dict[str, Any]:
        """As the base, and always safe."""
        told: dict[str, Any] = super().info(safe=True)
        return told


class PackTask(Task):  # type: ignore[misc]
    """A task whose arguments nobody is shown."""

    Request = PackRequest


@shared_task(name="interview.apply_events", base=PackTask)
def apply_events(consumer: str, pack: Message) -> None:
    """Apply one pack, claimed from the stream by `consumer`."""
    unpacked = Pack.from_message(pack)
    try:
        process_context().applier.apply(unpacked)
    except PackGivenBack as given_back:
        log.info("pack.given_back", reason=str(given_back), events=len(unpacked.events))
        _give_back(consumer, unpacked)
    except redis.RedisError as error:
        log.warning("pack.not_acknowledged", error=type(error).__name__, events=len(unpacked.events))


@shared_task(name="interview.expire_waiting")
def expire_waiting() -> None:
    """Turn events that have waited for their session too long into dead letters."""
    context = process_context()
    count = context.database.expire_waiting(hours=context.settings.waiting_hours)
    if count:
        log.warning("events.orphaned", count=count, hours=context.settings.waiting_hours)


@shared_task(name="interview.purge")
def purge() -> None:
    """Remove the ledger of sessions that ended long ago, where the settings say how long that is."""
    context = process_context()
    if context.settings.keep_ledger_days is not None:
        count = context.database.purge(days=context.settings.keep_ledger_days)
        log.info("ledger.purged", count=count, days=context.settings.keep_ledger_days)


@worker_process_init.connect
def _begin_process(**_: Any) -> None:
    """A process of the pool begins: what was loaded stays, and need not be searched for garbage with each pack."""
    gc.freeze()


@worker_process_shutdown.connect
def _end_process(**_: Any) -> None:
    """A process of the pool ends without atexit."""
    tracing.shut_down()


def _give_back(consumer: str, pack: Pack) -> None:
    context = process_context()
    try:
        idle_ms = int(context.settings.reclaim_seconds * 1000)
        context.stream.give_back(consumer, pack.entry_ids, idle_ms=idle_ms)
    except redis.RedisError:
        log.warning("pack.kept_claimed", seconds=context.settings.reclaim_seconds)  # claimed by another after that


@dataclass(frozen=True)
class Context:
    """What one process needs to apply packs."""

    settings: Settings
    stream: EventStream
    database: Database
    applier: Applier


@cache
def process_context() -> Context:
    """This process's context, made at its first pack: after the fork."""
    settings = load_settings()
    tracing.set_up(settings.stream)
    client = connect(settings)
    stream = EventStream(client, settings.stream)
    hold = Hold(
        client,
        settings.stream,
        backoff_seconds=settings.backoff_seconds,
        rpc_timeout_seconds=settings.rpc_timeout_seconds,
        hold_seconds=settings.hold_seconds,
    )
    dead_share = DeadShare(client, settings.stream, limit=settings.dead_share_limit, at_least=settings.dead_share_from)
    database = Database(settings)
    return Context(settings, stream, database, Applier(database, stream, hold, dead_share))
