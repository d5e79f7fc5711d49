"""The Celery tasks. A message carries no event: it says that there is work, and the stream remembers what."""

import gc
from typing import Any, Final

from celery import shared_task
from celery.signals import worker_process_init, worker_process_shutdown

from worker import tracing
from worker.apply.context import process_context, slot_drain
from worker.logs import get_logger
from worker.queue.messages import TASK
from worker.queue.slot import slot_of_process
from worker.slots import Slot

# A pack allocates some thousands of objects and frees them at its end, so few collections run within one. What was
# loaded is frozen, so each collection may search all that is left: it is little.
GC_THRESHOLDS: Final = (20_000, 1, 1)

log = get_logger(__name__)


@shared_task(name=TASK)
def apply_events(*args: object, **kwargs: object) -> None:
    """Claim, apply and acknowledge events until the stream is empty, or for some seconds."""
    if args or kwargs:
        log.warning("message.ignored", why="it has arguments; the events themselves are in the stream")
        return
    slot_drain().run()


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
    """A process of the pool begins: its slot is idle, whatever the process before it did, and its clients are made."""
    number = slot_of_process()
    if number is not None:
        Slot(number)
    process_context().warm_up()
    gc.freeze()  # what was loaded stays, and need not be searched for garbage
    gc.set_threshold(*GC_THRESHOLDS)


@worker_process_shutdown.connect
def _end_process(**_: Any) -> None:
    """A process of the pool ends without atexit."""
    tracing.shut_down()
