"""What became of the events of the last minute, counted in Redis for all workers together."""

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import redis

BUCKET_SECONDS: Final = 10
BUCKETS: Final = 6  # that make the last minute, and the one under way


class Outcomes:
    """Counts by outcome: "applied", "duplicate", "waiting", the reason of a new dead letter, or "again" of an old one.

    Each method may raise redis.RedisError.
    """

    def __init__(self, client: redis.Redis, stream: str) -> None:
        self._redis: Any = client
        self._prefix = f"{stream}:outcomes"

    def add(self, pipeline: Any, counts: Mapping[str, int]) -> None:
        """Queue the commands that add to the counts."""
        key = self._keys()[0]
        for outcome, count in counts.items():
            pipeline.hincrby(key, outcome, count)
        pipeline.expire(key, BUCKET_SECONDS * (BUCKETS + 2))

    def last_minute(self) -> Counter[str]:
        """The counts of the last 60 to 70 seconds."""
        counts: Counter[str] = Counter()
        with self._redis.pipeline(transaction=False) as pipeline:
            for key in self._keys():
                pipeline.hgetall(key)
            for bucket in pipeline.execute():
                counts.update({outcome.decode(): int(count) for outcome, count in bucket.items()})
        return counts

    def forget(self) -> None:
        """Begin anew."""
        self._redis.delete(*self._keys())

    def _keys(self) -> list[str]:
        """The buckets, the one under way first."""
        now = int(time.time() // BUCKET_SECONDS)
        return [f"{self._prefix}:{now - n}" for n in range(BUCKETS + 1)]
