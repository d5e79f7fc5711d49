"""A pack: entries that one consumer has claimed, and applies together."""

import time
from collections.abc import Callable
from typing import Any, Final

import redis

from worker.logs import get_logger
from worker.slots import Slot, State
from worker.stream import Attempt, Entry, EventStream

REFRESH_SHARE: Final = 4  # claims older than a quarter of the reclaim time are refreshed

log = get_logger(__name__)


class Pack:
    """Entries and their claim. `reclaim_ms`: how long a claim may be idle before others take it."""

    def __init__(
        self, stream: EventStream, consumer: str, entries: list[Entry], *, reclaim_ms: int, slot: Slot
    ) -> None:
        self.entries = entries
        self.attempt: Attempt | None = None  # of a suspect, which is applied alone
        self.lost: set[str] = set()  # ids of entries that another consumer has claimed meanwhile
        self._stream = stream
        self._consumer = consumer
        self._reclaim_ms = reclaim_ms
        self._slot = slot
        self._refreshed_at = time.monotonic()
        self._held = False

    def begin_attempt(self) -> Attempt:
        """Begin to apply this pack's only entry, a suspect."""
        self.attempt = self._stream.attempt(self.entries[0].id)
        return self.attempt

    def leave(self) -> None:
        """A request with these events leaves for Supabase: a process that ends from now on is not their fault."""
        self._slot.step(State.APPLYING)
        if self.attempt is not None:
            self.attempt.withdraw()

    def wait(self) -> None:
        """A hold goes on: keep the claim, and do not count this delivery."""
        self._slot.step(State.HOLDING)
        self.refresh(held=True)

    def refresh(self, *, held: bool = False) -> None:
        """Keep the claim where it is old enough to need it; let go of what others have claimed meanwhile."""
        age_ms = (time.monotonic() - self._refreshed_at) * 1000
        due_ms = self._reclaim_ms // REFRESH_SHARE
        due = age_ms >= due_ms
        if not due and self._held == held:
            return
        min_idle_ms = due_ms // 2 if due else 0  # 0: only `held` has changed; the claims are fresh
        try:
            own = self._stream.refresh(self._consumer, self.entries, min_idle_ms=min_idle_ms, held=held)
        except redis.RedisError as error:
            log.warning("claim.not_refreshed", error=type(error).__name__, events=len(self.entries))
            return  # others may claim them, and apply them again: harmless
        self._refreshed_at, self._held = time.monotonic(), held
        lost = {entry.id for entry in self.entries} - own
        if lost:
            log.info("claim.lost", events=len(lost))
            self.entries = [entry for entry in self.entries if entry.id in own]
            self.lost |= lost

    def give_back(self, reason: str) -> None:
        """Leave the pack to another consumer, at once."""
        log.info("pack.given_back", reason=reason, events=len(self.entries))
        try:
            self._stream.give_back(self._consumer, self.entries, idle_ms=self._reclaim_ms)
        except redis.RedisError:
            log.warning("pack.kept_claimed", seconds=self._reclaim_ms / 1000)  # claimed by another after that

    def acknowledge(self, then: Callable[[Any], None]) -> None:
        """Take the entries out of the stream; see EventStream.acknowledge."""
        if self.entries:
            self._stream.acknowledge(
                [entry.id for entry in self.entries], attempted=self.attempt is not None, then=then
            )
