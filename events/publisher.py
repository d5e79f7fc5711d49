"""Publishing events to the Redis stream: one XADD each, confirmed, retried, pipelined where there are many.

Any language can do the same with `XADD interview:events * event '<JSON>'`.
"""

import asyncio
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Final, Self
from weakref import WeakSet

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import FullJitterBackoff, NoBackoff
from redis.retry import Retry

from events.contract import Event
from events.errors import DurabilityError, PublishError, SpoolError
from events.spool import MAX_BYTES, Drainer, Spool

STREAM: Final = "interview:events"
FIELD: Final = "event"
CHUNK: Final = 500  # events in one round trip to Redis
BACKOFF: Final = FullJitterBackoff(cap=1.0, base=0.05)  # seconds

PROOF: Final = ("WAITAOF", 1, 0, 1)  # waits for nothing, and is refused where Redis cannot tell what is on its disk

# Redis is away, or answers that it cannot take an event just now: it loads its data, is a replica, or is full.
TRANSIENT: Final = (
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
    redis.exceptions.BusyLoadingError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.OutOfMemoryError,
)

log = logging.getLogger("events.publisher")


def _redis_url(url: str | None) -> str:
    found = url or os.environ.get("REDIS_URL")
    if not found:
        raise ValueError("no Redis: set REDIS_URL, as redis://127.0.0.1:6379/0, or give Publisher an url")
    return found


def _chunks(encoded: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    for start in range(0, len(encoded), CHUNK):
        yield encoded[start : start + CHUNK]


def _entry_ids(answers: Iterable[Any]) -> list[str]:
    return [entry_id.decode() if isinstance(entry_id, bytes) else entry_id for entry_id in answers]


@contextmanager
def _told_as_durability_error() -> Iterator[None]:
    try:
        yield
    except TRANSIENT:
        raise
    except redis.exceptions.ResponseError as error:
        raise DurabilityError(
            "durable=True needs WAITAOF: Redis 7.2 or newer with appendonly yes, and +waitaof for an ACL user "
            f"({str(error).partition(',')[0]})"
        ) from error


class _Publishing:
    """All that a publisher does but wait for Redis, which the two kinds do in their own ways."""

    def __init__(
        self,
        url: str | None = None,
        *,
        stream: str = STREAM,
        timeout: float = 2.0,
        retries: int = 5,
        spool: str | os.PathLike[str] | None = None,
        spool_max_bytes: int = MAX_BYTES,
        durable: bool = False,
    ) -> None:
        self.stream = stream
        self._url = _redis_url(url)
        self._timeout = timeout
        self._retries = retries
        self._durable = durable
        self._proved = not durable  # that Redis has WAITAOF
        self._drainer: Drainer | None = None
        self._connect()
        _publishers.add(self)
        if spool is not None:
            self._drainer = Drainer(Spool(spool, max_bytes=spool_max_bytes), self._send_spooled)

    def _connect(self) -> None:
        self._redis: Any = self._client()
        # The drainer's client tries once: the patience is the thread's.
        self._spooled_redis: Any = redis.Redis.from_url(self._url, retry=Retry(NoBackoff(), 0), **self._options())

    def connect_anew(self) -> None:
        """In a process just forked: leave the parent's clients alone.

        redis-py 8.1 (ConnectionPool.reset) waits for a lock that a thread of the parent may have held at the fork, for
        ever; it does so too when it closes a client that is forgotten.
        """
        for client in (self._redis, self._spooled_redis):
            client.auto_close_connection_pool = False
        self._connect()

    def _client(self) -> Any:
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        return {
            "socket_timeout": self._timeout * (2 if self._durable else 1),  # Redis waits for its disk, and then answers
            "socket_connect_timeout": self._timeout,
            "health_check_interval": 15,
            "client_name": "interview-publisher",
            **({} if self._url.startswith("unix://") else {"socket_keepalive": True}),
        }

    def _addressed(self, chunk: Sequence[bytes]) -> Iterator[tuple[str, bytes]]:
        return ((self.stream, event) for event in chunk)

    def _filled(self, pipeline: Any, entries: Iterable[tuple[str, bytes]]) -> Any:
        """The pipeline with (stream, event) pairs in it."""
        for stream, event in entries:
            pipeline.xadd(stream, {FIELD: event})
        if self._durable:
            pipeline.execute_command("WAITAOF", 1, 0, int(self._timeout * 1000))  # this disk, replicas, milliseconds
        return pipeline

    def _confirmed(self, answers: list[Any]) -> list[Any]:
        """The answers to the XADDs. Raises what WAITAOF answered, or TimeoutError where the disk is behind."""
        if not self._durable:
            return answers
        *answers, on_disk = answers
        if isinstance(on_disk, Exception):
            raise on_disk
        if on_disk[0] < 1:
            raise redis.exceptions.TimeoutError(f"not on Redis' disk after {self._timeout} s")
        return answers

    def _send_spooled(self, entries: Sequence[tuple[str, bytes]]) -> list[Any]:
        """As the drainer asks for."""
        if self._durable:  # each time, because to send and then be refused would fill the stream with repeats
            with _told_as_durability_error():
                self._spooled_redis.execute_command(*PROOF)
        else:  # a Redis that still loads its data would refuse the first of a batch, and perhaps not the last
            self._spooled_redis.ping()
        pipeline = self._filled(self._spooled_redis.pipeline(transaction=False), entries)
        return self._confirmed(pipeline.execute(raise_on_error=False))

    @property
    def _must_look(self) -> bool:
        return self._drainer is not None and self._drainer.must_look

    def _look(self) -> None:
        try:
            if self._drainer is not None:
                self._drainer.look()
        except SpoolError as error:
            log.warning("spool.unreadable reason=%s", error)  # Redis may do without it

    @property
    def _older_wait(self) -> bool:
        """Whether older events are in the spool, so that newer ones must follow them there."""
        return self._drainer is not None and self._drainer.active

    def _keep(
        self, encoded: Sequence[bytes], published: Sequence[str], error: redis.exceptions.RedisError | None = None
    ) -> list[str | None]:
        """Spool what is not published for certain; answer the entry ids, None for each spooled. Or PublishError."""
        why = f"Redis did not confirm the event ({type(error).__name__})" if error else "older events wait for Redis"
        again = "publish it again, a repeat is harmless"
        if self._drainer is None:
            raise PublishError(f"{why}: {again}", published=len(published)) from error
        if isinstance(self._drainer.problem, DurabilityError):  # it will not pass by waiting
            raise DurabilityError(*self._drainer.problem.args) from self._drainer.problem
        rest = encoded[len(published) :]
        try:
            self._drainer.append(self.stream, rest)
        except SpoolError as refused:
            raise PublishError(f"{why}, and {refused}: {again}", published=len(published)) from error or refused
        if error:
            log.warning("spool.began reason=%s path=%s", type(error).__name__, self._drainer.spool.path)
        return [*published, *([None] * len(rest))]


_publishers: "WeakSet[_Publishing]" = WeakSet()


def _after_fork_in_child() -> None:
    for publisher in _publishers:
        publisher.connect_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


class Publisher(_Publishing):
    """Publishes events; one instance may be shared by threads, and used after a fork.

        with Publisher(spool="/var/lib/engine/interviews.spool") as publisher:
            publisher.publish(Answered.new("session_api_123456", questions_answered=5))

    `url` is a redis://, rediss:// or unix:// URL, $REDIS_URL by default. A call takes at most about
    `timeout` seconds x (`retries` + 1) and a second of backoff for each, and then raises PublishError.

    `spool`, a path on a local disk, keeps such events instead: they are on that disk when the call returns, and a
    thread brings them to the stream, oldest first, once Redis is back. While any wait, later calls add to them at
    once and do not try Redis: so what a publisher publishes in turn arrives in turn. Processes may share a file; one
    file serves one Redis. `spool_max_bytes` bounds it, and a call that finds it full raises PublishError. What a
    process leaves is drained by the next that opens the file, or by another that shares it, at its next publish a
    second later. Raises SpoolError where the file cannot be used.

    `durable` waits until Redis has the events on its disk, for `timeout` seconds at most, and then goes on as above.
    The first call raises DurabilityError where Redis cannot tell. Redis should have `appendfsync always`:
    under `everysec` each round trip takes up to a second.
    """

    def _client(self) -> Any:
        retry = Retry(BACKOFF, self._retries, supported_errors=TRANSIENT)
        return redis.Redis.from_url(self._url, retry=retry, **self._options())

    def publish(self, event: Event) -> str | None:
        """Publish one event; answer its stream entry id once Redis has it, None once it is in the spool.

        Raises InvalidEvent, PublishError, DurabilityError.
        """
        return self.publish_many([event])[0]

    def publish_many(self, events: Iterable[Event]) -> list[str | None]:
        """Publish events, hundreds in a round trip; answer in their order what `publish` does for each.

        All are encoded before the first is sent, so that an invalid one is found while nothing has left.
        """
        encoded, published = [event.to_json() for event in events], list[str]()
        if not encoded:
            return []
        if self._must_look:
            self._look()
        if self._older_wait:
            return self._keep(encoded, published)
        try:
            if not self._proved:
                with _told_as_durability_error():
                    self._redis.execute_command(*PROOF)
                self._proved = True
            for chunk in _chunks(encoded):
                pipeline = self._filled(self._redis.pipeline(transaction=False), self._addressed(chunk))
                published += _entry_ids(self._confirmed(pipeline.execute()))
        except redis.exceptions.RedisError as error:
            return self._keep(encoded, published, error)
        return list[str | None](published)

    def flush(self, timeout: float = 10.0) -> int:
        """Bring spooled events to the stream now, in so many seconds at most; answer how many still wait."""
        return self._drainer.flush(timeout) if self._drainer else 0

    def close(self) -> None:
        """Flush, for the constructor's `timeout` at most, and give the connections back; the spool keeps the rest."""
        if self._drainer:
            self._drainer.close(self._timeout)
        self._spooled_redis.close()
        self._redis.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncPublisher(_Publishing):
    """Publisher for asyncio: the same calls, awaited; the spool's file is written in another thread."""

    def _client(self) -> Any:
        retry = AsyncRetry(BACKOFF, self._retries, supported_errors=TRANSIENT)
        return redis.asyncio.Redis.from_url(self._url, retry=retry, **self._options())

    async def publish(self, event: Event) -> str | None:
        """As Publisher.publish."""
        return (await self.publish_many([event]))[0]

    async def publish_many(self, events: Iterable[Event]) -> list[str | None]:
        """As Publisher.publish_many."""
        encoded, published = [event.to_json() for event in events], list[str]()
        if not encoded:
            return []
        if self._must_look:
            await asyncio.to_thread(self._look)
        if self._older_wait:
            return await asyncio.to_thread(self._keep, encoded, published)
        try:
            if not self._proved:
                with _told_as_durability_error():
                    await self._redis.execute_command(*PROOF)
                self._proved = True
            for chunk in _chunks(encoded):
                pipeline = self._filled(self._redis.pipeline(transaction=False), self._addressed(chunk))
                published += _entry_ids(self._confirmed(await pipeline.execute()))
        except redis.exceptions.RedisError as error:
            return await asyncio.to_thread(self._keep, encoded, published, error)
        return list[str | None](published)

    async def flush(self, timeout: float = 10.0) -> int:
        """As Publisher.flush."""
        return await asyncio.to_thread(self._drainer.flush, timeout) if self._drainer else 0

    async def close(self) -> None:
        """As Publisher.close."""
        if self._drainer:
            await asyncio.to_thread(self._drainer.close, self._timeout)
        self._spooled_redis.close()
        await self._redis.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
