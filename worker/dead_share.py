"""The limit on the share of dead letters: a bad deploy must not turn a whole stream into them.

When too many of the last minute's events have become new dead letters, a latch closes, a key in Redis that holds all
workers (worker.hold) until a person opens it with `interviews resume`. What fails until the latch closes is dead and
replayable as ever; the rest waits in the stream.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

import redis

from worker.errors import Misconfigured
from worker.outcomes import Outcomes

NOT_DEAD: Final = {"applied", "duplicate", "waiting", "again"}  # the outcomes that are no reason of a new dead letter
REMEDY: Final = (
    "see 'interviews dlq list', mend or roll back what was deployed, then 'interviews resume'; "
    "where these events are to become dead letters: 'interviews resume --accept 60'"
)


class DeadShare:
    """Watches the share of new dead letters. `limit` is a share from 0 to 1 (1: none), `at_least` a number of them."""

    def __init__(self, client: redis.Redis, stream: str, *, limit: float = 1.0, at_least: int = 0) -> None:
        self._redis: Any = client
        self._outcomes = Outcomes(client, stream)
        self._latch = latch_key(stream)
        self._accept = f"{stream}:dead_share:accept"
        self._limit = limit
        self._at_least = at_least

    def check(self) -> None:
        """Raise Misconfigured while the latch is closed."""
        try:
            reason = self._redis.get(self._latch)
        except redis.RedisError:
            return  # nothing that we know of forbids to go on
        if reason:
            raise Misconfigured(reason.decode(), remedy=REMEDY)

    def count(self, pipeline: Any, outcomes: Mapping[str, int]) -> None:
        """Queue the commands that count what became of a pack; a full Redis refuses them."""
        self._outcomes.add(pipeline, outcomes)

    def close_where_too_many(self, outcomes: Mapping[str, int]) -> None:
        """Close the latch where too much of the last minute died, if any of this pack did; where Redis can tell."""
        if self._limit >= 1.0 or outcomes.keys() <= NOT_DEAD:
            return
        with suppress(redis.RedisError):
            self._close_where_too_many()

    def _close_where_too_many(self) -> None:
        counts = self._outcomes.last_minute()
        total = counts.total() - counts["again"]
        dead = {reason: count for reason, count in counts.items() if reason not in NOT_DEAD}
        if sum(dead.values()) < max(self._at_least, self._limit * total) or self._redis.exists(self._accept):
            return
        most = max(dead, key=dead.__getitem__)
        reason = f"{sum(dead.values())} of the last minute's {total} events became dead letters, {dead[most]} as {most}"
        self._redis.set(self._latch, reason, nx=True)

    def resume(self, *, accept_seconds: int = 0) -> bool:
        """Open the latch, and for `accept_seconds` never close it; answer whether it was closed."""
        self._outcomes.forget()
        if accept_seconds:
            self._redis.set(self._accept, 1, ex=accept_seconds)
        return bool(self._redis.delete(self._latch))


def latch_key(stream: str) -> str:
    """The Redis key of the latch, beside its stream."""
    return f"{stream}:dead_share"
