"""The publisher: what is in the stream when a call returns, and what is told when Redis does not take it."""

import asyncio
import json
import socket
import socketserver
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import redis
from fakeredis import TcpFakeServer

from events import (
    Answered,
    AsyncPublisher,
    DurabilityError,
    Event,
    Finished,
    InvalidEvent,
    Publisher,
    PublishError,
)
from events.publisher import CHUNK, STREAM
from worker.embedded import Stack

PublishMany = Callable[..., list[str]]
ASIDE = 9  # the number of a Redis database that no worker reads


def publish_many(url: str | None, events: list[Event], **options: Any) -> list[str]:
    with Publisher(url, **options) as publisher:
        return certain(publisher.publish_many(events))


def certain(entry_ids: list[str | None]) -> list[str]:
    """Without a spool every event has an entry id."""
    assert None not in entry_ids
    return cast("list[str]", entry_ids)


def publish_many_async(url: str | None, events: list[Event], **options: Any) -> list[str]:
    async def publish() -> list[str]:
        async with AsyncPublisher(url, **options) as publisher:
            return certain(await publisher.publish_many(events))

    return asyncio.run(publish())


both = pytest.mark.parametrize("publish", [publish_many, publish_many_async], ids=["sync", "async"])


@contextmanager
def fake_redis(port: int = 0) -> Iterator[str]:
    """A fake Redis behind a real port; answers its URL."""
    with TcpFakeServer(("127.0.0.1", port), server_type="redis") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"redis://127.0.0.1:{server.server_address[1]}/0"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def url() -> Iterator[str]:
    with fake_redis() as running:
        yield running


@pytest.fixture
def stream() -> str:
    return f"test:{uuid.uuid4()}"


@pytest.fixture
def real_url(stack: Stack, stream: str) -> Iterator[str]:
    """The stack's Redis; the stream of the test is gone afterwards."""
    url = stack.environment["REDIS_URL"].removesuffix("/0") + f"/{ASIDE}"
    yield url
    with redis.Redis.from_url(url) as client:
        client.delete(stream)


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is ours and where nobody listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield closed.getsockname()[1]


def answers(count: int) -> list[Event]:
    return [Answered.new(f"session_{number}", questions_answered=number) for number in range(count)]


def entries(url: str, stream: str) -> list[tuple[str, dict[bytes, bytes]]]:
    with redis.Redis.from_url(url) as client:
        found = cast("list[tuple[bytes, dict[bytes, bytes]]]", client.xrange(stream))
    return [(entry_id.decode(), fields) for entry_id, fields in found]


# ------------------------------------------------------------------------------------------------- what arrives


@both
@pytest.mark.parametrize("count", [0, 1, CHUNK, 2 * CHUNK + 1])
def test_events_are_in_the_stream_in_order_under_the_ids_that_are_answered(
    publish: PublishMany, url: str, stream: str, count: int
) -> None:
    events = answers(count)

    entry_ids = publish(url, events, stream=stream)

    assert entries(url, stream) == [
        (entry_id, {b"event": event.to_json()}) for entry_id, event in zip(entry_ids, events, strict=True)
    ]


def test_one_event_is_published_by_one_call(url: str, stream: str) -> None:
    (event,) = answers(1)

    with Publisher(url, stream=stream) as publisher:
        entry_id = publisher.publish(event)

    assert entries(url, stream) == [(entry_id, {b"event": event.to_json()})]


def test_one_event_is_published_by_one_awaited_call(url: str, stream: str) -> None:
    (event,) = answers(1)

    async def publish() -> str | None:
        async with AsyncPublisher(url, stream=stream) as publisher:
            return await publisher.publish(event)

    entry_id = asyncio.run(publish())

    assert entries(url, stream) == [(entry_id, {b"event": event.to_json()})]


@both
def test_the_stream_has_the_name_that_the_workers_read(publish: PublishMany, url: str) -> None:
    entry_ids = publish(url, answers(1))

    assert STREAM == "interview:events"
    assert [entry_id for entry_id, _ in entries(url, STREAM)] == entry_ids


def test_events_may_come_from_a_generator(url: str, stream: str) -> None:
    with Publisher(url, stream=stream) as publisher:
        assert len(publisher.publish_many(event for event in answers(3))) == 3


def test_one_publisher_serves_many_threads(real_url: str, stream: str) -> None:
    with Publisher(real_url, stream=stream) as publisher, ThreadPoolExecutor(8) as threads:
        entry_ids = certain(list(threads.map(publisher.publish, answers(200))))

    assert sorted(entry_ids) == sorted(entry_id for entry_id, _ in entries(real_url, stream))
    assert len(set(entry_ids)) == 200


@both
def test_a_real_redis_holds_what_was_published(publish: PublishMany, real_url: str, stream: str) -> None:
    events: list[Event] = [Finished.new("session_ü", feedback={"note": "Größe 👍", "none": None}), *answers(CHUNK)]

    entry_ids = publish(real_url, events, stream=stream)

    found = entries(real_url, stream)
    assert [entry_id for entry_id, _ in found] == entry_ids
    assert [fields for _, fields in found] == [{b"event": event.to_json()} for event in events]


# ---------------------------------------------------------------------------------------------- what is refused


@both
def test_an_invalid_event_among_many_keeps_all_of_them_back(publish: PublishMany, url: str, stream: str) -> None:
    too_large = Finished.new("session_1", feedback={"text": "x" * 300_000})

    with pytest.raises(InvalidEvent, match="too_large"):
        publish(url, [*answers(CHUNK + 1), too_large], stream=stream)

    assert entries(url, stream) == []


@both
def test_without_a_url_the_environment_has_it(
    publish: PublishMany, url: str, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", url)

    assert publish(None, answers(1), stream=stream) == [entry_id for entry_id, _ in entries(url, stream)]


@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.parametrize("kind", [Publisher, AsyncPublisher])
def test_without_any_url_the_error_names_the_variable(
    kind: type[Publisher | AsyncPublisher], value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    if value is not None:
        monkeypatch.setenv("REDIS_URL", value)

    with pytest.raises(ValueError, match="set REDIS_URL"):
        kind()


# ------------------------------------------------------------------------------------------------ Redis is ill


@both
def test_a_redis_that_is_away_is_a_publish_error_with_its_cause(
    publish: PublishMany, closed_port: int, stream: str
) -> None:
    with pytest.raises(PublishError, match="publish it again") as caught:
        publish(f"redis://127.0.0.1:{closed_port}/0", answers(3), stream=stream, retries=1)

    assert isinstance(caught.value.__cause__, redis.exceptions.ConnectionError)
    assert caught.value.published == 0


@both
def test_a_redis_that_never_answers_is_a_publish_error_with_its_cause(publish: PublishMany, stream: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(PublishError) as caught:
        publish(f"redis://127.0.0.1:{silent.getsockname()[1]}/0", answers(1), timeout=0.1, retries=0)

    assert isinstance(caught.value.__cause__, redis.exceptions.TimeoutError)


@both
def test_no_events_need_no_redis(publish: PublishMany, closed_port: int) -> None:
    assert publish(f"redis://127.0.0.1:{closed_port}/0", []) == []


@both
def test_a_key_that_is_no_stream_is_a_publish_error_with_its_cause(
    publish: PublishMany, real_url: str, stream: str
) -> None:
    with redis.Redis.from_url(real_url) as client:
        client.set(stream, "something else")

    with pytest.raises(PublishError) as caught:
        publish(real_url, answers(1), stream=stream)

    assert isinstance(caught.value.__cause__, redis.exceptions.ResponseError)
    assert caught.value.published == 0


@both
def test_a_publisher_tries_again_until_redis_is_there(publish: PublishMany, stream: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as dying, ThreadPoolExecutor(1) as threads:
        port = dying.getsockname()[1]
        result = threads.submit(publish, f"redis://127.0.0.1:{port}/0", answers(2), stream=stream, retries=1000)
        dying.accept()[0].close()  # the first try has come, and fails
        dying.close()
        with fake_redis(port) as url:
            entry_ids = result.result(timeout=60)
            assert [entry_id for entry_id, _ in entries(url, stream)] == entry_ids


@contextmanager
def room_for(url: str, bytes_more: int) -> Iterator[None]:
    """Let a real Redis take so much more before it is full."""
    with redis.Redis.from_url(url) as client:
        memory = cast("dict[str, int]", client.info("memory"))
        client.config_set("maxmemory", memory["used_memory"] + bytes_more)
        try:
            yield
        finally:
            client.config_set("maxmemory", 0)


@both
def test_a_full_redis_is_a_publish_error_with_its_cause(publish: PublishMany, real_url: str, stream: str) -> None:
    with room_for(real_url, -100_000), pytest.raises(PublishError) as caught:
        publish(real_url, answers(3), stream=stream, retries=1)

    assert isinstance(caught.value.__cause__, redis.exceptions.OutOfMemoryError)
    assert caught.value.published == 0
    assert entries(real_url, stream) == []


@both
def test_the_error_tells_how_many_are_in_the_stream_for_certain(
    publish: PublishMany, real_url: str, stream: str
) -> None:
    small, large = answers(CHUNK), [Finished.new("session_1", feedback={"text": "x" * 250_000}) for _ in range(40)]

    with room_for(real_url, 4_000_000), pytest.raises(PublishError) as caught:
        publish(real_url, [*small, *large], stream=stream, retries=0)

    assert caught.value.published == CHUNK
    stored = [fields[b"event"] for _, fields in entries(real_url, stream)]
    assert stored[:CHUNK] == [event.to_json() for event in small]
    assert len(stored) < CHUNK + len(large)


@both
def test_a_publish_error_and_its_cause_do_not_repeat_what_the_candidate_said(
    publish: PublishMany, real_url: str, stream: str
) -> None:
    event = Finished.new("session_1", feedback={"text": "what the candidate said"})

    with room_for(real_url, -100_000), pytest.raises(PublishError) as caught:
        publish(real_url, [event], stream=stream, retries=0)

    assert "candidate" not in f"{caught.value} {caught.value.__cause__}"


def test_a_publisher_goes_on_after_redis_was_restarted(stack: Stack, real_url: str, stream: str) -> None:
    first, second, third = answers(3)

    with Publisher(real_url, stream=stream, retries=0) as publisher:
        publisher.publish(first)
        stack.redis.stop()
        try:
            with pytest.raises(PublishError):
                publisher.publish(second)
        finally:
            stack.redis.start()
        publisher.publish(second)
        publisher.publish(third)

    subjects = [json.loads(fields[b"event"])["subject"] for _, fields in entries(real_url, stream)]
    assert subjects == ["session_0", "session_1", "session_2"]


def test_an_async_publisher_goes_on_after_redis_was_restarted(stack: Stack, real_url: str, stream: str) -> None:
    async def publish() -> None:
        async with AsyncPublisher(real_url, stream=stream) as publisher:
            await publisher.publish_many(answers(1))
            stack.redis.stop()
            stack.redis.start()
            await publisher.publish_many(answers(1))

    asyncio.run(publish())

    assert len(entries(real_url, stream)) == 2


# ------------------------------------------------------------------------------------------------ durable publish


@dataclass
class Redis72:
    """The commands of Redis 7.2 that a durable publisher sends, on a port; the embedded Redis is older.

    It answers as https://redis.io/docs/latest/commands/waitaof/ says; `disks` are its answers to WAITAOF in turn, the
    last of them for ever: how many disks have what was sent before, or an error.
    """

    disks: list[int | str]
    received: list[list[bytes]] = field(default_factory=list)

    def answer(self, command: list[bytes]) -> bytes:
        self.received.append(command)
        match command[0]:
            case b"XADD":
                return b"+%d-0\r\n" % len(self.sent())
            case b"WAITAOF":
                disks = self.disks.pop(0) if len(self.disks) > 1 else self.disks[0]
                return f"-{disks}\r\n".encode() if isinstance(disks, str) else b"*2\r\n:%d\r\n:0\r\n" % disks
        return b"+OK\r\n"

    def sent(self) -> list[bytes]:
        """The events, each once for every time that it came."""
        return [command[4] for command in self.received if command[0] == b"XADD"]

    def names(self) -> list[str]:
        """The commands that it had to do with publishing."""
        names = [command[0].decode() for command in self.received]
        return [name for name in names if name in {"XADD", "WAITAOF"}]

    @contextmanager
    def running(self) -> Iterator[str]:
        """Answers its URL."""
        redis_72 = self

        class Connection(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while header := self.rfile.readline():
                    parts = []
                    for _ in range(int(header[1:])):
                        size = int(self.rfile.readline()[1:])
                        parts.append(self.rfile.read(size + 2)[:-2])
                    self.wfile.write(redis_72.answer(parts))

        class Server(socketserver.ThreadingTCPServer):
            block_on_close = False

        with Server(("127.0.0.1", 0), Connection) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.02,))
            thread.start()
            try:
                yield f"redis://127.0.0.1:{server.server_address[1]}/0?protocol=2"
            finally:
                server.shutdown()
                thread.join()


BEHIND = 0  # no disk has it yet
UNKNOWN = "ERR unknown command 'WAITAOF', with args beginning with: '1' '0' '1' "
NO_AOF = "ERR WAITAOF cannot be used when numlocal is set but appendonly is disabled."


@both
def test_a_durable_publish_asks_for_redis_disk_after_the_events(publish: PublishMany) -> None:
    server = Redis72(disks=[1])
    events = answers(CHUNK + 1)

    with server.running() as url:
        entry_ids = publish(url, events, durable=True, timeout=2.0)

    assert len(entry_ids) == CHUNK + 1
    assert server.sent() == [event.to_json() for event in events]
    assert server.names() == ["WAITAOF", *["XADD"] * CHUNK, "WAITAOF", "XADD", "WAITAOF"]
    waits = [command[1:] for command in server.received if command[0] == b"WAITAOF"]
    assert waits == [[b"1", b"0", b"1"], [b"1", b"0", b"2000"], [b"1", b"0", b"2000"]]


@both
def test_an_event_that_is_not_on_redis_disk_in_time_is_a_publish_error(publish: PublishMany) -> None:
    with Redis72(disks=[1, BEHIND]).running() as url, pytest.raises(PublishError) as caught:
        publish(url, answers(1), durable=True)

    assert isinstance(caught.value.__cause__, redis.exceptions.TimeoutError)
    assert caught.value.published == 0


@both
@pytest.mark.parametrize("refusal", [UNKNOWN, NO_AOF, "NOPERM this user has no permissions to run 'waitaof'"])
def test_a_redis_that_cannot_promise_durability_is_one_line_and_takes_no_event(
    publish: PublishMany, refusal: str
) -> None:
    server = Redis72(disks=[refusal])

    with server.running() as url, pytest.raises(DurabilityError, match="WAITAOF: Redis 7") as caught:
        publish(url, answers(1), durable=True)

    assert "\n" not in str(caught.value)
    assert server.sent() == []


@both
def test_the_embedded_redis_cannot_promise_durability(publish: PublishMany, real_url: str, stream: str) -> None:
    with pytest.raises(DurabilityError, match="unknown command"):
        publish(real_url, answers(1), stream=stream, durable=True)

    assert entries(real_url, stream) == []


def test_what_is_not_on_redis_disk_is_spooled_until_it_is(tmp_path: Path) -> None:
    server = Redis72(disks=[1, BEHIND, 1, BEHIND, 1])
    (event,) = answers(1)

    with server.running() as url, Publisher(url, durable=True, spool=tmp_path / "spool") as publisher:
        assert publisher.publish(event) is None
        assert publisher.flush() == 0

    assert server.sent() == [event.to_json()] * 3


def test_a_spool_is_not_drained_into_a_redis_that_cannot_promise_durability(
    tmp_path: Path, closed_port: int, real_url: str, stream: str
) -> None:
    options: dict[str, Any] = {"stream": stream, "durable": True, "spool": tmp_path / "spool", "retries": 0}
    with Publisher(f"redis://127.0.0.1:{closed_port}/0", **options, timeout=0.1) as publisher:
        publisher.publish_many(answers(3))

    with Publisher(real_url, **options, timeout=0.1) as publisher:
        assert publisher.flush(1) == 3
        with pytest.raises(DurabilityError, match="unknown command"):
            publisher.publish_many(answers(1))

    assert entries(real_url, stream) == []


@both
def test_a_unix_socket_where_nobody_listens_is_a_publish_error(publish: PublishMany, tmp_path: Path) -> None:
    with pytest.raises(PublishError) as caught:
        publish(f"unix://{tmp_path}/nobody", answers(1), retries=0)

    assert isinstance(caught.value.__cause__, redis.exceptions.ConnectionError)
