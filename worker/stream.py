"""The Redis stream: what is not done yet. The one module that speaks to it.

Entries are claimed by consumers of one group, and leave the stream only when their events stand in Postgres.
Redis 6.2 to 8. Every call may raise redis.RedisError; the callers wait and try again. All that takes entries out works
while Redis is full (`maxmemory`), too: it needs no command that a full Redis refuses.
"""

import json
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from events.publisher import FIELD
from worker.settings import StreamSettings

GROUP: Final = "workers"
SOCKET_TIMEOUT_SECONDS: Final = 20.0  # longer than any blocking read
PAGE: Final = 1000  # entries of which no event is read, in one command
SLICE: Final = 48  # entries whose events are read in one command: anyone can add events of megabytes
PACK_BYTES: Final = 4 << 20  # of events in a pack; 1,000 events of 256 KiB would be 250 MiB in one RPC
FORGET_ATTEMPTS_SECONDS: Final = 7 * 86_400  # of an entry that somebody deleted by hand meanwhile

# Deletes consumers that are idle and hold nothing. In a script, so that none can claim something in between.
_FORGET_CONSUMERS: Final = """
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


class IdleEntry(NamedTuple):
    """An entry that its consumer has left idle: its id, and how often it has been delivered."""

    id: str
    deliveries: int


class Claimed(NamedTuple):
    """Entries that were claimed; `full`: as many as were asked for, or PACK_BYTES of them, so there may be more."""

    entries: list[Entry]
    full: bool


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


def connect(settings: StreamSettings, name: str = "interview-worker", *, retries: int = 1) -> redis.Redis:
    """A client that raises at once when Redis is away: the callers know how to wait.

    `retries` on another connection, for one that Redis has closed meanwhile.
    """
    return redis.Redis.from_url(
        settings.redis_url.get_secret_value(),
        socket_timeout=SOCKET_TIMEOUT_SECONDS,
        socket_connect_timeout=5,
        socket_keepalive=True,
        health_check_interval=15,
        client_name=name,
        retry=Retry(NoBackoff(), retries),
    )


class EventStream:
    """The stream of one name, through one consumer group."""

    def __init__(self, client: redis.Redis, key: str) -> None:
        self.key = key
        self._redis: Any = client  # redis-py types each answer as "maybe awaitable"

    def add(self, events: Iterable[bytes]) -> list[str]:
        """Append events as they are, in one round trip; return their entry ids."""
        with self._redis.pipeline(transaction=False) as pipeline:
            for raw in events:
                pipeline.xadd(self.key, {FIELD: raw})
            return [entry_id.decode() for entry_id in pipeline.execute()]

    # ------------------------------------------------------------------------------------- what there is to do

    def wait_for_undelivered(self, *, block_ms: int) -> bytes | None:
        """Wait until an entry is there that no consumer was given, and return its id; None where none is.

        `block_ms` 0: do not wait.
        """
        found = self._redis.xread({self.key: self._last_delivered_id()}, count=1, block=block_ms or None)
        return next((entry_id for entry_id, _ in _read(found)), None)

    def _last_delivered_id(self) -> bytes:
        try:
            groups = self._redis.xinfo_groups(self.key)
        except redis.ResponseError as error:  # no such key
            if "no such key" not in str(error):
                raise
            groups = []
        for group in groups:
            if group["name"] == GROUP.encode():
                last: bytes = group["last-delivered-id"]
                return last
        self._create_group()
        return b"0-0"

    def is_delivered(self, entry_id: bytes) -> bool:
        """Whether a consumer was given this entry, or a later one."""
        return _ordered(entry_id) <= _ordered(self._last_delivered_id())

    def _create_group(self) -> None:
        """Create the group, from the first entry on; harmless where it exists."""
        try:
            self._redis.xgroup_create(self.key, GROUP, id="0", mkstream=True)
        except redis.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    def idle(self, *, idle_ms: int, count: int) -> list[IdleEntry]:
        """Claimed entries that have been idle for at least `idle_ms`, the oldest first; claims nothing."""
        try:
            pending = self._redis.xpending_range(self.key, GROUP, min="-", max="+", count=count, idle=idle_ms)
        except redis.ResponseError as error:
            if not _no_group(error):
                raise
            return []
        return [IdleEntry(each["message_id"].decode(), each["times_delivered"]) for each in pending]

    # ------------------------------------------------------------------------------------------------ claiming

    def claim(self, consumer: str, count: int, *, block_ms: int) -> Claimed:
        """Claim new entries, waiting `block_ms` (at least 1) for the first; not many more than PACK_BYTES of them.

        Where there is no group yet, it is created. A full Redis refuses that: then a slice is given out without a
        claim, to make room. Others may be given it as well, which is harmless.
        """
        try:
            return self._claim(consumer, count, block_ms)
        except redis.ResponseError as error:
            if not _no_group(error):
                raise
        try:
            self._create_group()  # the first worker ever, or the group went with a flush
        except redis.exceptions.OutOfMemoryError:
            oldest = self._redis.xrange(self.key, count=min(SLICE, count))
            return Claimed([_entry(*each) for each in oldest], full=False)
        return self._claim(consumer, count, block_ms)

    def _claim(self, consumer: str, count: int, block_ms: int) -> Claimed:
        entries: list[Entry] = []
        size = 0
        while len(entries) < count and size < PACK_BYTES:
            asked = min(SLICE, count - len(entries))
            found = self._read_new(consumer, asked, None if entries else block_ms)
            entries += found
            size += sum(len(entry.event) for entry in found)
            if len(found) < asked:
                return Claimed(entries, full=False)
        return Claimed(entries, full=True)

    def _read_new(self, consumer: str, count: int, block_ms: int | None) -> list[Entry]:
        found = self._redis.xreadgroup(GROUP, consumer, {self.key: ">"}, count=count, block=block_ms)
        return [_entry(*each) for each in _read(found)]

    def reclaim(self, consumer: str, idle: Sequence[IdleEntry], *, idle_ms: int) -> Claimed:
        """Claim the given entries that are still idle; not many more than PACK_BYTES. Counts a delivery of each."""
        entries: list[Entry] = []
        size = 0
        for start in range(0, len(idle), SLICE):
            if size >= PACK_BYTES:
                return Claimed(entries, full=True)
            asked = idle[start : start + SLICE]
            found = self._claim_idle(consumer, asked, idle_ms)
            entries += found
            size += sum(len(entry.event) for entry in found)
        return Claimed(entries, full=False)

    def _claim_idle(self, consumer: str, idle: Sequence[IdleEntry], idle_ms: int) -> list[Entry]:
        ids = [each.id for each in idle]
        claimed = [each for each in self._redis.xclaim(self.key, GROUP, consumer, idle_ms, ids) if each[1]]
        deliveries = {each.id: each.deliveries + 1 for each in idle}
        entries = [
            Entry(entry_id.decode(), raw_event(fields), deliveries[entry_id.decode()]) for entry_id, fields in claimed
        ]
        if len(entries) < len(ids):
            self._drop_deleted(set(ids) - {entry.id for entry in entries})
        return entries

    def _drop_deleted(self, ids: Iterable[str]) -> None:
        """Drop the claims on entries that somebody deleted by hand: Redis 6.2 hands them out again and again."""
        gone = [entry_id for entry_id in ids if not self._redis.xrange(self.key, entry_id, entry_id)]
        if gone:
            self._redis.xack(self.key, GROUP, *gone)

    # ------------------------------------------------------------------------------- what becomes of a claim

    def refresh(self, consumer: str, entries: Sequence[Entry], *, min_idle_ms: int, held: bool) -> set[str]:
        """Keep the claims of a consumer fresh; return the ids of the entries that are still its own.

        An entry that another consumer has claimed meanwhile stays with that one. `held`: this delivery was no attempt
        and is not counted.
        """
        own = self._own(consumer, entries)
        # An entry that another consumer claims between these two commands has been idle for less than `min_idle_ms`.
        self._set_claims(consumer, own, min_idle_ms=min_idle_ms, idle_ms=0, uncounted=held)
        return {entry.id for entry in own}

    def give_back(self, consumer: str, entries: Sequence[Entry], *, idle_ms: int) -> None:
        """Let others reclaim these entries at once, as if idle for `idle_ms`; the delivery was no attempt."""
        own = self._own(consumer, entries)
        self._set_claims(consumer, own, min_idle_ms=0, idle_ms=idle_ms, uncounted=True)

    def _own(self, consumer: str, entries: Sequence[Entry]) -> list[Entry]:
        """Those of these entries (in order of their ids) that the consumer still holds."""
        if not entries:
            return []
        own: set[str] = set()
        start, last = entries[0].id, entries[-1].id
        while page := self._redis.xpending_range(
            self.key, GROUP, min=start, max=last, count=PAGE, consumername=consumer
        ):
            own |= {each["message_id"].decode() for each in page}
            start = f"({page[-1]['message_id'].decode()}"
        return [entry for entry in entries if entry.id in own]

    def _set_claims(
        self, consumer: str, entries: Sequence[Entry], *, min_idle_ms: int, idle_ms: int, uncounted: bool
    ) -> None:
        by_deliveries: dict[int, list[str]] = {}
        for entry in entries:
            by_deliveries.setdefault(entry.deliveries - uncounted, []).append(entry.id)
        for deliveries, ids in by_deliveries.items():
            self._redis.xclaim(
                self.key, GROUP, consumer, min_idle_ms, ids, idle=idle_ms, retrycount=deliveries, justid=True
            )

    def acknowledge(
        self, entry_ids: Sequence[str], *, attempted: bool = False, then: Callable[[Any], None] = lambda pipeline: None
    ) -> None:
        """Take entries out: their events stand in Postgres. `attempted`: attempts to apply them alone were counted.

        `then` may queue more commands in the same round trip, which may fail. No MULTI: a full Redis refuses one. So an
        entry may be deleted and its claim stay; whoever tries to reclaim it drops the claim.
        """
        with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.xdel(self.key, *entry_ids)
            pipeline.xack(self.key, GROUP, *entry_ids)
            if attempted:
                pipeline.delete(*map(self._attempts_key, entry_ids))
            then(pipeline)
            for answer in pipeline.execute(raise_on_error=False)[:2]:
                if isinstance(answer, Exception):
                    raise answer

    # ------------------------------------------------------------------------------------------------ attempts

    def attempt(self, entry_id: str) -> "Attempt":
        """An attempt to apply an entry alone, which is not counted yet."""
        return Attempt(self._redis, self._attempts_key(entry_id))

    def _attempts_key(self, entry_id: str) -> str:
        return f"{self.key}:attempts:{entry_id}"

    # ---------------------------------------------------------------------------------------------- housekeeping

    def forget_consumers(self, *, idle_ms: int) -> int:
        """Delete consumers that are idle and hold nothing (those of processes that ended); return how many.

        A full Redis refuses it: then they stay until there is room.
        """
        try:
            return int(self._redis.eval(_FORGET_CONSUMERS, 1, self.key, GROUP, idle_ms))
        except redis.ResponseError as error:
            if not (_no_group(error) or "OOM" in str(error)):
                raise
            return 0

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


class Attempt:
    """An attempt to apply an entry alone: a name in a set, so that it counts once however often it is counted."""

    def __init__(self, client: Any, key: str) -> None:
        self._redis = client
        self._key = key
        self._name = uuid.uuid4().hex

    def count(self) -> int:
        """Count this attempt; return how many are counted. A full Redis refuses (redis.exceptions.OutOfMemoryError)."""
        with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.sadd(self._key, self._name)
            pipeline.scard(self._key)
            pipeline.expire(self._key, FORGET_ATTEMPTS_SECONDS)
            return int(pipeline.execute()[1])

    def withdraw(self) -> None:
        """Do not count this attempt: what happens from now on says nothing about the event."""
        self._redis.srem(self._key, self._name)


def raw_event(fields: Mapping[bytes, bytes]) -> bytes:
    """The event in a stream entry; of an entry that has none, all its fields as JSON, to be dead-lettered."""
    raw = fields.get(FIELD.encode())
    if raw is not None:
        return raw
    return json.dumps({_readable(name): _readable(value) for name, value in fields.items()}).encode()


def _readable(value: bytes) -> str:
    return value.decode(errors="backslashreplace")


def _entry(entry_id: bytes, fields: Mapping[bytes, bytes]) -> Entry:
    return Entry(entry_id.decode(), raw_event(fields))


def _read(reply: Any) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """The entries in a reply about one stream: a dict in RESP3, with one more list around them, else pairs."""
    streams = reply.values() if isinstance(reply, dict) else [entries for _, entries in reply or []]
    return [each for entries in streams for each in (entries[0] if isinstance(entries[0], list) else entries)]


def _ordered(entry_id: bytes) -> tuple[int, ...]:
    """An entry id as it is compared: milliseconds and a number."""
    return tuple(int(part) for part in entry_id.split(b"-"))


def _no_group(error: redis.ResponseError) -> bool:
    return "NOGROUP" in str(error)  # in a script's error, further on
