"""What a process needs to apply events: its clients, made after the fork, and a drain for each of its slots."""

import itertools
import threading
from functools import cache
from typing import Final

from worker import slots, tracing
from worker.apply.applier import Applier
from worker.apply.drain import Drain
from worker.database import Database
from worker.dead_share import DeadShare
from worker.hold import Hold
from worker.queue.slot import slot_of_process
from worker.settings import Settings, load_settings
from worker.slots import Slot
from worker.stream import connect


class Context:
    """One process's settings and clients; its threads may share it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.database = Database(settings)
        # No retries: after a failover they would reach another server, where these entry ids may mean other events.
        self.redis = connect(settings, slots.worker_id(), retries=0)
        self._dead_share = DeadShare(
            self.redis, settings.stream, limit=settings.dead_share_limit, at_least=settings.dead_share_from
        )

    def drain(self, number: int) -> Drain:
        """A drain for the slot of this number."""
        slot = Slot(number)
        hold = Hold(self.redis, self.settings)
        applier = Applier(self.database, hold, self._dead_share)
        return Drain(self.settings, self.redis, applier, hold, self._dead_share, slot)

    def warm_up(self) -> None:
        """Make the client of Supabase now, which takes a moment, and not at the first event."""
        _ = self.database.client

    def close(self) -> None:
        """Give the connections back."""
        self.redis.close()
        self.database.close()


@cache
def process_context() -> Context:
    """This process's context, made once, after the fork."""
    settings = load_settings()
    tracing.set_up(settings.stream)
    return Context(settings)


_thread: Final = threading.local()
_thread_numbers: Final = itertools.count()


def slot_drain() -> Drain:
    """The drain of the slot that this process, or this thread, is."""
    if not hasattr(_thread, "drain"):
        number = slot_of_process()
        _thread.drain = process_context().drain(next(_thread_numbers) if number is None else number)
    drain: Drain = _thread.drain
    return drain
