"""The loop of the task: reclaim when due, claim, apply, acknowledge, again, until the stream is empty."""

import time
from typing import Any, Final

import redis

from worker import slots, stopping
from worker.apply.applier import Applier
from worker.apply.pack import Pack
from worker.dead_share import DeadShare, latch_key
from worker.errors import PackGivenBack
from worker.hold import Hold, hold_key
from worker.logs import get_logger
from worker.settings import Settings
from worker.slots import Slot, State
from worker.stream import Entry, EventStream, IdleEntry

DRAIN_SECONDS: Final = 5.0  # then the slot is free for other tasks; the dispatcher sends another message
LINGER_MS: Final = 1000  # wait this long for more events before ending: a steady trickle needs no message
SUSPECT_DELIVERIES: Final = 3  # after this many deliveries an entry is applied alone
FORGET_FACTOR: Final = 10  # x the reclaim time: consumers idle for longer are deleted

log = get_logger(__name__)


class Drain:
    """Claims and applies events for one slot."""

    def __init__(
        self,
        settings: Settings,
        client: redis.Redis,
        applier: Applier,
        hold: Hold,
        dead_share: DeadShare,
        slot: Slot,
    ) -> None:
        self.consumer = slots.new_consumer()
        self._redis: Any = client
        self._stream = EventStream(client, settings.stream)
        self._applier = applier
        self._hold = hold
        self._dead_share = dead_share
        self._slot = slot
        self._held_by = [hold_key(settings.stream), latch_key(settings.stream)]
        self._pack_size = settings.pack_size
        self._reclaim_ms = int(settings.reclaim_seconds * 1000)
        self._reclaim_every = settings.reclaim_seconds / 4
        self._next_reclaim = 0.0

    def run(self, *, suspects: bool = True) -> None:
        """Drain the stream until it is empty, the worker stops, or DRAIN_SECONDS are over.

        Redis being away ends it, with a log line. `suspects`: apply these, too.
        """
        ends_at = time.monotonic() + DRAIN_SECONDS
        try:
            while not stopping.stopping() and time.monotonic() < ends_at:
                self._slot.step(State.WAITING)
                if self._must_hold() or not (self._apply_idle(ends_at, suspects=suspects) or self._apply_new()):
                    break
        except PackGivenBack:
            pass  # and another drain goes on with it
        except redis.RedisError as error:
            log.warning("drain.redis_away", error=f"{type(error).__name__}: {error}")
        finally:
            self._slot.step(State.IDLE)

    def _must_hold(self) -> bool:
        """Whether a hold is in force. Where the latch of the dead share is closed, wait here until it is open."""
        hold, latch = self._redis.mget(self._held_by)
        if latch and not hold:
            self._slot.step(State.HOLDING)
            self._hold.run(self._dead_share.check, waiting=lambda: self._slot.step(State.HOLDING))
        return bool(hold)

    # ------------------------------------------------------------------------------------------------ new entries

    def _apply_new(self) -> bool:
        """Claim and apply a pack; return whether there was one."""
        entries, full = self._stream.claim(self.consumer, self._pack_size, block_ms=LINGER_MS)
        if full:
            slots.note_full_claim()
        if entries:
            self._apply(entries)
        return bool(entries)

    def _apply(self, entries: list[Entry], *, alone: bool = False) -> None:
        pack = Pack(self._stream, self.consumer, entries, reclaim_ms=self._reclaim_ms, slot=self._slot)
        self._slot.step(State.APPLYING)
        try:
            if alone:
                self._applier.apply_alone(pack)
            else:
                self._applier.apply(pack)
        except PackGivenBack as given_back:
            pack.give_back(str(given_back))
            raise
        self._slot.count_pack()

    # ----------------------------------------------------------------------------------- what others have left idle

    def _apply_idle(self, ends_at: float, *, suspects: bool) -> bool:
        """Where it is due, reclaim and apply what other consumers have left idle; return whether anything was."""
        now = time.monotonic()
        if slots.take_reclaim():
            self._next_reclaim = 0.0
        if now < self._next_reclaim:
            return False
        idle = self._stream.idle(idle_ms=self._reclaim_ms, count=self._pack_size)
        unsuspected = [each for each in idle if each.deliveries < SUSPECT_DELIVERIES]
        claimed = self._stream.reclaim(self.consumer, unsuspected, idle_ms=self._reclaim_ms)
        if claimed.entries:
            log.info("drain.reclaimed", events=len(claimed.entries))
            self._apply(claimed.entries)
        alone = [each for each in idle if each.deliveries >= SUSPECT_DELIVERIES] if suspects else []
        applied_alone = self._apply_alone(alone, ends_at)
        if claimed.entries or applied_alone:
            return True  # and look again at once: there may be more
        self._stream.forget_consumers(idle_ms=FORGET_FACTOR * self._reclaim_ms)
        self._next_reclaim = now + self._reclaim_every
        return False

    def _apply_alone(self, idle: list[IdleEntry], ends_at: float) -> int:
        """Apply suspects one by one while there is time; return how many were applied."""
        applied = 0
        for each in idle:
            if stopping.stopping() or time.monotonic() > ends_at:
                break
            entries, _ = self._stream.reclaim(self.consumer, [each], idle_ms=self._reclaim_ms)
            if not entries:
                continue
            log.info("drain.reclaimed", events=1, deliveries=entries[0].deliveries)
            try:
                self._apply(entries, alone=True)
            except redis.exceptions.OutOfMemoryError:
                log.warning("suspect.set_aside", entry=entries[0].id, why="Redis is full, and cannot count an attempt")
            else:
                applied += 1
        return applied
