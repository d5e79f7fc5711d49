"""Publishing events to the Redis stream: one XADD each, confirmed, retried, pipelined where there are many.

Any language can do the same with `XADD interview:events * event '<JSON>'`.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from types import TracebackType
from typing import Any, Final, Self

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import FullJitterBackoff
from redis.retry import Retry

from events.contract import Event
from events.errors import PublishError

STREAM: Final = "interview:events"
FIELD: Final = "event"
CHUNK: Final = 500  # events in one round trip to Redis
BACKOFF: Final = FullJitterBackoff(cap=1.0, base=0.05)  # seconds

# Redis is away, or answers that it cannot take an event just now: it loads its data, is a replica, or is full.
TRANSIENT: Final = (
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
    redis.exceptions.BusyLoadingError,
    redis.exceptions.ReadOnlyError,
    redis.exceptions.OutOfMemoryError,
)


def _options(timeout: float) -> dict[str, Any]:
    return {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "socket_keepalive": True,
        "health_check_interval": 15,
        "client_name": "interview-publisher",
    }


def _redis_url(url: str | None) -> str:
    found = url or os.environ.get("REDIS_URL")
    if not found:
        raise ValueError("no Redis: set REDIS_URL, as redis://127.0.0.1:6379/0, or give Publisher an url")
    return found


def _chunks(events: Iterable[Event]) -> Iterator[list[bytes]]:
    """Encode every event before the first is sent, so that an invalid one is found while nothing has left."""
    encoded = iter([event.to_json() for event in events])
    while chunk := list(islice(encoded, CHUNK)):
        yield chunk


def _entry_ids(answers: list[Any]) -> list[str]:
    return [entry_id.decode() if isinstance(entry_id, bytes) else entry_id for entry_id in answers]


@contextmanager
def _told_as_publish_error(published: list[str]) -> Iterator[None]:
    try:
        yield
    except redis.exceptions.RedisError as error:
        raise PublishError(
            f"Redis did not confirm the event ({type(error).__name__}): publish it again, a repeat is harmless",
            published=len(published),
        ) from error


class Publisher:
    """Publishes events; one instance may be shared by threads.

        with Publisher() as publisher:
            publisher.publish(Answered.new("session_api_123456", questions_answered=5))

    `url` is a redis:// or rediss:// URL, $REDIS_URL by default. A call takes at most about
    `timeout` seconds x (`retries` + 1) and a second of backoff for each, and then raises PublishError.
    """

    def __init__(self, url: str | None = None, *, stream: str = STREAM, timeout: float = 2.0, retries: int = 5) -> None:
        self.stream = stream
        retry = Retry(BACKOFF, retries, supported_errors=TRANSIENT)
        self._redis = redis.Redis.from_url(_redis_url(url), retry=retry, **_options(timeout))

    def publish(self, event: Event) -> str:
        """Publish one event; answer its stream entry id once Redis has it. Raises InvalidEvent, PublishError."""
        return self.publish_many([event])[0]

    def publish_many(self, events: Iterable[Event]) -> list[str]:
        """Publish events, hundreds in a round trip; answer their entry ids in order once Redis has them all."""
        published: list[str] = []
        with _told_as_publish_error(published):
            for chunk in _chunks(events):
                pipeline = self._redis.pipeline(transaction=False)
                for raw in chunk:
                    pipeline.xadd(self.stream, {FIELD: raw})
                published += _entry_ids(pipeline.execute())
        return published

    def close(self) -> None:
        """Give the connections back."""
        self._redis.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncPublisher:
    """Publisher for asyncio: the same calls, awaited."""

    def __init__(self, url: str | None = None, *, stream: str = STREAM, timeout: float = 2.0, retries: int = 5) -> None:
        self.stream = stream
        retry = AsyncRetry(BACKOFF, retries, supported_errors=TRANSIENT)
        self._redis = redis.asyncio.Redis.from_url(_redis_url(url), retry=retry, **_options(timeout))

    async def publish(self, event: Event) -> str:
        """As Publisher.publish."""
        return (await self.publish_many([event]))[0]

    async def publish_many(self, events: Iterable[Event]) -> list[str]:
        """As Publisher.publish_many."""
        published: list[str] = []
        with _told_as_publish_error(published):
            for chunk in _chunks(events):
                pipeline = self._redis.pipeline(transaction=False)
                for raw in chunk:
                    pipeline.xadd(self.stream, {FIELD: raw})
                published += _entry_ids(await pipeline.execute())
        return published

    async def close(self) -> None:
        """Give the connections back."""
        await self._redis.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
