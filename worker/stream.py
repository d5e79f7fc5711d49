"""The Redis stream: what is not done yet. The one module that speaks to it.

Entries are claimed by consumers of one group, and leave the stream only when their events stand in Postgres.
Redis 6.2 to 8. Every call may raise redis.RedisError; the callers wait and try again.
"""

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from events.publisher import FIELD
from worker.pack import raw_event
from worker.settings import StreamSettings

GROUP: Final = "workers"
SOCKET_TIMEOUT_SECONDS: Final = 15.0  # longer than any blocking read
PAGE: Final = 1000  # entries in one command
FORGET_ATTEMPTS_SECONDS: Final = 7 * 86_400  # of an entry that somebody deleted by hand meanwhile

# Deletes consumers that are idle and hold nothing. In a script, so that none can claim something in between.
_FORGET_CONSUMERS: Final = """
redis.replicate_commands()
local forgotten = 0
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local field = {}
  for i = 1, #consumer, 2 do field[consumer[i]] = consumer[i + 1] end
  if field['pending'] == 0 and field['idle'] > tonumber(ARGV[2]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], field['name'])
    forgotten = forgotten + 1
  end
end
return forgotten
"""


class Entry(NamedTuple):
    """A claimed stream entry: its id, its raw event, and how often it has been delivered."""

    id: str
    event: bytes
    deliveries: int = 1


@dataclass(frozen=True)
class StreamState:
    """How the stream stands: entries in it, the age of the oldest in seconds (0 if none), those claimed by consumer."""

    length: int
    oldest_seconds: float
    claimed: dict[str, int]

    @property
    def pending(self) -> int:
        """Entries that are claimed."""
        return sum(self.claimed.values())


def connect(settings: StreamSettings, name: str = "interview-worker") -> redis.Redis:
    """A client that raises at once when Redis is away: the callers know how to wait."""
    return redis.Redis.from_url(
        settings.redis_url.get_secret_value(),
        socket_timeout=SOCKET_TIMEOUT_SECONDS,
        socket_connect_timeout=5,
        socket_keepalive=True,
        health_check_interval=15,
        client_name=name,
        retry=Retry(NoBackoff(), 1),
    )


class EventStream:
    """The stream of one name, through one consumer group."""

    def __init__(self, client: redis.Redis, key: str) -> None:
        self.key = key
        self._redis: Any = client  # redis-py types each answer as "maybe awaitable"

    def add(self, events: Iterable[bytes]) -> list[str]:
        """Append events as they are, in one round trip; answer their entry ids."""
        with self._redis.pipeline(transaction=False) as pipeline:
            for raw in events:
                pipeline.xadd(self.key, {FIELD: raw})
            return [entry_id.decode() for entry_id in pipeline.execute()]

    def ensure_group(self) -> None:
        """Create the group, from the first entry on; harmless where it exists."""
        try:
            self._redis.xgroup_create(self.key, GROUP, id="0", mkstream=True)
        except redis.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    def claim_new(self, consumer: str, count: int, *, block_ms: int) -> list[Entry]:
        """Claim up to `count` entries that nobody has had, waiting up to `block_ms` for the first."""
        answer = self._redis.xreadgroup(GROUP, consumer, {self.key: ">"}, count=count, block=block_ms)
        streams = answer.items() if isinstance(answer, dict) else answer or []
        return [
            Entry(entry_id.decode(), raw_event(fields)) for _, found in streams for entry_id, fields in _flat(found)
        ]

    def claim_idle(self, consumer: str, count: int, *, idle_ms: int) -> list[Entry]:
        """Claim up to `count` entries whose consumer has not touched them for `idle_ms`."""
        cursor = b"0-0"
        found: list[tuple[bytes, dict[bytes, bytes]]] = []
        while not found:
            cursor, claimed, *_ = self._redis.xautoclaim(
                self.key, GROUP, consumer, idle_ms, start_id=cursor, count=count
            )
            found = [(entry_id, fields) for entry_id, fields in claimed if fields]
            if len(found) < len(claimed):
                self._forget_deleted(consumer)
            if cursor == b"0-0":  # looked at all
                break
        if not found:
            return []
        pending = self._redis.xpending_range(
            self.key, GROUP, min=found[0][0], max=found[-1][0], count=10 * PAGE, consumername=consumer
        )
        deliveries = {each["message_id"]: each["times_delivered"] for each in pending}
        return [Entry(entry_id.decode(), raw_event(fields), deliveries.get(entry_id, 1)) for entry_id, fields in found]

    def done(self, entry_ids: Sequence[str], *, attempted: bool = False) -> None:
        """Take entries out: their events stand in Postgres; `attempted`: tries of them were counted."""
        with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.xack(self.key, GROUP, *entry_ids)
            pipeline.xdel(self.key, *entry_ids)
            if attempted:
                pipeline.delete(*map(self._attempts, entry_ids))
            pipeline.execute()

    def give_back(self, consumer: str, entry_ids: Sequence[str], *, idle_ms: int) -> None:
        """Let others claim these entries at once, as if they had been idle for `idle_ms`."""
        self._redis.xclaim(self.key, GROUP, consumer, 0, list(entry_ids), idle=idle_ms, justid=True)

    def keep(self, consumer: str) -> None:
        """Keep the claim on all entries of a consumer fresh: its tasks hold them through an outage."""
        for page in self._pending_pages(consumer):
            self._redis.xclaim(self.key, GROUP, consumer, 0, page, idle=0, justid=True)

    def count_attempt(self, entry_id: str) -> int:
        """Note that an entry is about to be tried alone; answer how often it has been, this time included.

        Each try is a name in a set, so that it is one try even where the answer is lost and the command sent again.
        """
        attempts = self._attempts(entry_id)
        with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.sadd(attempts, uuid.uuid4().hex)
            pipeline.scard(attempts)
            pipeline.expire(attempts, FORGET_ATTEMPTS_SECONDS)
            return int(pipeline.execute()[1])

    def _attempts(self, entry_id: str) -> str:
        return f"{self.key}:attempts:{entry_id}"

    def forget_consumers(self, *, idle_ms: int) -> int:
        """Delete consumers that are idle and hold nothing (those of workers that ended); answer how many."""
        return int(self._redis.eval(_FORGET_CONSUMERS, 1, self.key, GROUP, idle_ms))

    def state(self) -> StreamState:
        """How the stream stands now."""
        seconds, _ = self._redis.time()
        oldest = self._redis.xrange(self.key, count=1)
        try:
            consumers = self._redis.xinfo_consumers(self.key, GROUP)
        except redis.ResponseError:  # no stream or no group yet
            consumers = []
        return StreamState(
            length=int(self._redis.xlen(self.key)),
            oldest_seconds=max(0.0, seconds - int(oldest[0][0].split(b"-")[0]) / 1000) if oldest else 0.0,
            claimed={consumer["name"].decode(): consumer["pending"] for consumer in consumers},
        )

    def _forget_deleted(self, consumer: str) -> None:
        """Drop claims on entries that somebody deleted by hand: Redis 6.2 hands them out again and again."""
        for page in self._pending_pages(consumer):
            gone = [entry_id for entry_id in page if not self._redis.xrange(self.key, entry_id, entry_id)]
            if gone:
                self._redis.xack(self.key, GROUP, *gone)

    def _pending_pages(self, consumer: str) -> Iterable[list[bytes]]:
        start = "-"
        while page := self._redis.xpending_range(
            self.key, GROUP, min=start, max="+", count=PAGE, consumername=consumer
        ):
            yield [each["message_id"] for each in page]
            start = f"({page[-1]['message_id'].decode()}"


def _flat(found: Any) -> Iterable[tuple[bytes, dict[bytes, bytes]]]:
    """A stream's entries; in RESP3's answer they are wrapped in one more list."""
    return found[0] if found and isinstance(found[0], list) else found
