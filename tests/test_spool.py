"""The publisher's spool: what Redis does not take waits on the disk and arrives, in order, whatever ends in between."""

import asyncio
import json
import logging
import os
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import pytest
import redis

from events import (
    Answered,
    AsyncPublisher,
    Event,
    Finished,
    InvalidEvent,
    Publisher,
    PublishError,
    SpoolError,
    Started,
)
from events import spool as spool_module
from events.publisher import CHUNK
from events.spool import MIN_BYTES, Drainer, Spool
from tests.worker_process import wait_until
from worker.embedded import Stack

ASIDE = 9  # the number of a Redis database that no worker reads
QUICK: dict[str, Any] = {"timeout": 0.3, "retries": 0}


class AnyPublisher(Protocol):
    def publish(self, event: Event) -> str | None: ...
    def publish_many(self, events: Iterable[Event]) -> list[str | None]: ...
    def flush(self, timeout: float = 10.0) -> int: ...
    def close(self) -> None: ...


class Awaited:
    """An AsyncPublisher whose calls are awaited for us, in a loop of its own."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self._loop = self._runner.get_loop()
        self._publisher = AsyncPublisher(*arguments, **options)

    def publish(self, event: Event) -> str | None:
        return self._runner.run(self._publisher.publish(event))

    def publish_many(self, events: Iterable[Event]) -> list[str | None]:
        return self._runner.run(self._publisher.publish_many(events))

    def flush(self, timeout: float = 10.0) -> int:
        return self._runner.run(self._publisher.flush(timeout))

    def close(self) -> None:
        if not self._loop.is_closed():
            self._runner.run(self._publisher.close())
            self._runner.close()


Open = Callable[..., AnyPublisher]


@pytest.fixture(params=[Publisher, Awaited], ids=["sync", "async"])
def publisher_on(request: pytest.FixtureRequest, path: Path, stream: str) -> Iterator[Open]:
    """Opens publishers of either kind on the test's spool and stream; all are closed in the end."""
    opened: list[AnyPublisher] = []

    def publisher_on(url: str, **options: Any) -> AnyPublisher:
        opened.append(request.param(url, **({"stream": stream, "spool": path} | QUICK | options)))
        return opened[-1]

    yield publisher_on
    for each in opened:
        each.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "interviews.spool"


@pytest.fixture
def stream() -> str:
    return f"test:{uuid.uuid4()}"


@pytest.fixture
def url(stack: Stack, stream: str) -> Iterator[str]:
    """The stack's Redis; the stream of the test is gone afterwards."""
    url = stack.environment["REDIS_URL"].removesuffix("/0") + f"/{ASIDE}"
    yield url
    with redis.Redis.from_url(url) as client:
        client.delete(stream)


@contextmanager
def away(stack: Stack) -> Iterator[None]:
    """An outage of Redis."""
    stack.redis.stop()
    try:
        yield
    finally:
        stack.redis.start()


@contextmanager
def configured(url: str, name: str, value: object) -> Iterator[None]:
    with redis.Redis.from_url(url) as client:
        before = cast("dict[str, str]", client.config_get(name))[name]
        client.config_set(name, str(value))
        try:
            yield
        finally:
            client.config_set(name, before)


@contextmanager
def full(url: str) -> Iterator[None]:
    """A Redis that refuses every write: its memory is full."""
    with configured(url, "maxmemory", 1):
        yield


def answers(count: int, session: str = "session") -> list[Event]:
    return [Answered.new(f"{session}_{number}", questions_answered=number) for number in range(count)]


def large(session_id: str) -> Event:
    return Finished.new(session_id, feedback={"text": "x" * 200_000})


def subjects(url: str, stream: str) -> list[str]:
    """The sessions of the events in the stream, in order."""
    with redis.Redis.from_url(url) as client:
        found = cast("list[tuple[bytes, dict[bytes, bytes]]]", client.xrange(stream))
    return [json.loads(fields[b"event"])["subject"] for _, fields in found]


def stream_has(url: str, stream: str, entries: int) -> bool:
    with redis.Redis.from_url(url) as client:
        return cast("int", client.xlen(stream)) >= entries


def names(events: list[Event]) -> list[str]:
    return [event.subject for event in events]


def once(found: list[str]) -> list[str]:
    """Without repeats, which are harmless, in the order of the first."""
    return list(dict.fromkeys(found))


# ---------------------------------------------------------------------------------------------------- an outage


def test_an_event_published_in_an_outage_is_in_the_stream_after_it_without_another_call(
    publisher_on: Open, stack: Stack, url: str, stream: str
) -> None:
    publisher = publisher_on(url)
    events = answers(4)
    assert publisher.publish(events[0]) is not None

    with away(stack):
        assert [publisher.publish(event) for event in events[1:]] == [None, None, None]

    wait_until(lambda: len(subjects(url, stream)) == 4, "the spool is drained in the background")
    assert subjects(url, stream) == names(events)


def test_a_newer_event_does_not_overtake_those_in_the_spool(
    publisher_on: Open, stack: Stack, url: str, stream: str
) -> None:
    publisher = publisher_on(url)
    events = answers(2)
    with away(stack):
        publisher.publish_many(events)

    def publish_one_more() -> bool:
        events.extend(answers(1, f"later_{len(events)}"))
        return publisher.publish(events[-1]) is not None

    wait_until(publish_one_more, "Redis takes events again")
    assert subjects(url, stream) == names(events)


def test_events_of_a_process_that_ended_in_an_outage_are_drained_by_the_next_start(
    publisher_on: Open, stack: Stack, url: str, stream: str
) -> None:
    events = answers(2 * CHUNK + 1)
    with away(stack):
        first = publisher_on(url)
        assert first.publish_many(events) == [None] * len(events)
        first.close()

    second = publisher_on(url)
    assert second.flush() == 0

    assert subjects(url, stream) == names(events)


def test_flush_answers_how_many_still_wait(publisher_on: Open, stack: Stack, url: str, stream: str) -> None:
    publisher = publisher_on(url)
    with away(stack):
        publisher.publish_many(answers(3))
        assert publisher.flush(0.1) == 3

    assert publisher.flush() == 0
    assert len(subjects(url, stream)) == 3


def test_closing_brings_spooled_events_to_the_stream(publisher_on: Open, stack: Stack, url: str, stream: str) -> None:
    publisher = publisher_on(url, timeout=10)
    with away(stack):
        publisher.publish_many(answers(3))

    publisher.close()

    assert len(subjects(url, stream)) == 3


def test_without_a_spool_there_is_nothing_to_flush(url: str) -> None:
    with Publisher(url) as publisher:
        assert publisher.flush() == 0


def test_a_redis_that_answers_too_late_means_the_spool(publisher_on: Open, url: str, stream: str) -> None:
    publisher = publisher_on(url)
    events = answers(5)

    with redis.Redis.from_url(url) as client:
        client.client_pause(60_000, all=False)  # writes only, or nobody could end it
        try:
            assert [publisher.publish(event) for event in events] == [None] * 5
        finally:
            client.client_unpause()

    assert publisher.flush() == 0
    assert once(subjects(url, stream)) == names(events)


def test_a_full_redis_means_the_spool(publisher_on: Open, url: str, stream: str) -> None:
    publisher = publisher_on(url)
    events = answers(5)

    with full(url):
        assert [publisher.publish(event) for event in events] == [None] * 5

    assert publisher.flush() == 0
    assert subjects(url, stream) == names(events)


def test_a_redis_that_refuses_writes_as_a_replica_means_the_spool(publisher_on: Open, url: str, stream: str) -> None:
    publisher = publisher_on(url)
    events = answers(5)

    with redis.Redis.from_url(url) as client:
        client.replicaof("127.0.0.1", "1")
        try:
            assert [publisher.publish(event) for event in events] == [None] * 5
        finally:
            client.replicaof("no", "one")

    assert publisher.flush() == 0
    assert subjects(url, stream) == names(events)


def test_what_redis_confirmed_before_the_outage_is_not_spooled(publisher_on: Open, url: str, stream: str) -> None:
    publisher = publisher_on(url)
    events = [*answers(CHUNK), *(large(f"large_{number}") for number in range(40))]

    with redis.Redis.from_url(url) as client:
        room = cast("dict[str, int]", client.info("memory"))["used_memory"] + 4_000_000
    with configured(url, "maxmemory", room):
        entry_ids = publisher.publish_many(events)
        waiting = publisher.flush(0)

    assert None not in entry_ids[:CHUNK]
    assert entry_ids[CHUNK:] == [None] * 40
    assert waiting <= 40
    assert publisher.flush() == 0
    assert once(subjects(url, stream)) == names(events)
    assert [name for name in subjects(url, stream) if name.startswith("session")] == names(events[:CHUNK])


def test_publishing_goes_on_while_redis_restarts(publisher_on: Open, stack: Stack, url: str, stream: str) -> None:
    publisher = publisher_on(url)
    spooled, over = threading.Event(), threading.Event()

    def publish_until_over() -> list[Event]:
        events: list[Event] = []
        while not over.is_set():
            events += answers(10, f"session_{len(events)}")
            if None in publisher.publish_many(events[-10:]):
                spooled.set()
        return events

    # Redis is started by the main thread, because the embedded servers end with the thread that started them.
    with ThreadPoolExecutor(1) as thread:
        publishing = thread.submit(publish_until_over)
        try:
            wait_until(partial(stream_has, url, stream, 1), "it publishes")
            with away(stack):
                wait_until(spooled.is_set, "it spools")
        finally:
            over.set()
        events = publishing.result()

    assert publisher.flush() == 0
    assert once(subjects(url, stream)) == names(events)


def test_in_an_outage_only_the_first_call_waits_for_redis(
    publisher_on: Open, stack: Stack, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = publisher_on(url)
    tried: list[str] = []

    def watch(client: type) -> None:
        pipeline = client.pipeline  # type: ignore[attr-defined]

        def watched(self: Any, **options: Any) -> Any:
            tried.append(threading.current_thread().name)
            return pipeline(self, **options)

        monkeypatch.setattr(client, "pipeline", watched)

    watch(redis.Redis)
    watch(redis.asyncio.Redis)
    with away(stack):
        for event in answers(20):
            publisher.publish(event)

    assert [name for name in tried if name != "interview-spool"] == ["MainThread"]


def test_an_invalid_event_is_not_spooled(publisher_on: Open, stack: Stack, url: str) -> None:
    publisher = publisher_on(url)

    with away(stack):
        with pytest.raises(InvalidEvent):
            publisher.publish_many([*answers(2), Finished.new("session_1", feedback={"text": "x" * 300_000})])
        assert publisher.flush(0) == 0


def test_threads_share_a_publisher_and_its_spool(stack: Stack, url: str, stream: str, path: Path) -> None:
    events = answers(200)
    with Publisher(url, stream=stream, spool=path, **QUICK) as publisher, ThreadPoolExecutor(8) as threads:
        with away(stack):
            assert list(threads.map(publisher.publish, events)) == [None] * 200
        assert publisher.flush() == 0

    assert sorted(subjects(url, stream)) == sorted(names(events))


# -------------------------------------------------------------------------------------------------------- bounds


def test_a_full_spool_is_a_publish_error_and_what_it_took_arrives(
    publisher_on: Open, stack: Stack, url: str, stream: str
) -> None:
    publisher = publisher_on(url, spool_max_bytes=MIN_BYTES)
    taken: list[Event] = []

    def publish_until_full() -> None:
        while len(taken) < 6:
            event = large(f"session_{len(taken)}")
            assert publisher.publish(event) is None
            taken.append(event)

    with away(stack), pytest.raises(PublishError, match="is full") as caught:
        publish_until_full()
    assert caught.value.published == 0
    assert len(taken) >= 3

    assert publisher.flush() == 0
    assert publisher.publish(large("session_last")) is not None
    assert subjects(url, stream) == [*names(taken), "session_last"]


def test_many_events_that_do_not_fit_are_all_refused(publisher_on: Open, stack: Stack, url: str, stream: str) -> None:
    publisher = publisher_on(url, spool_max_bytes=MIN_BYTES)

    with away(stack):
        publisher.publish(large("session_0"))
        with pytest.raises(PublishError, match="is full"):
            publisher.publish_many([large(f"session_{number}") for number in range(1, 10)])
        assert publisher.flush(0) == 1

    assert publisher.flush() == 0
    assert subjects(url, stream) == ["session_0"]


def test_the_files_size_stays_within_its_bound(stack: Stack, url: str, path: Path) -> None:
    with Publisher(url, spool=path, spool_max_bytes=MIN_BYTES, **QUICK) as publisher:
        with away(stack):
            for event in answers(1000, "x" * 150):
                publisher.publish(event)
            with pytest.raises(PublishError):
                publisher.publish_many(answers(10_000, "x" * 150))
        assert 300_000 < path.stat().st_size <= MIN_BYTES


def test_a_bound_that_holds_no_event_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="at least"):
        Publisher("redis://127.0.0.1:1/0", spool=path, spool_max_bytes=1000)


# ------------------------------------------------------------------------------------------------------ the file


def _garbage(path: Path) -> None:
    path.write_bytes(b"no database" * 1000)


def _someone_elses(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("create table accounts (id integer)")
    connection.close()


def _torn(path: Path) -> None:
    spool = Spool(path)
    spool.append("stream", [b"x" * 100_000])
    spool.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * 8192 + whole[12288:])


@pytest.mark.parametrize("spoil", [_garbage, _someone_elses, _torn, Path.mkdir], ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("kind", [Publisher, AsyncPublisher])
def test_a_file_that_is_no_spool_is_an_error_at_once(
    kind: type[Publisher | AsyncPublisher], spoil: Callable[[Path], None], path: Path
) -> None:
    spoil(path)

    with pytest.raises(SpoolError, match=r"the spool \S+interviews\.spool cannot be used: ") as caught:
        kind("redis://127.0.0.1:1/0", spool=path)

    assert "\n" not in str(caught.value)


def test_a_folder_that_does_not_exist_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(SpoolError, match="No such file or directory"):
        Publisher("redis://127.0.0.1:1/0", spool=tmp_path / "nowhere" / "spool")


def test_a_file_that_cannot_be_written_is_an_error_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Spool(path).close()
    connect = sqlite3.connect
    # Read-only by SQLite's own means: the tests may run as root, for whom every file can be written.
    monkeypatch.setattr(sqlite3, "connect", lambda name, **kw: connect(f"file:{name}?mode=ro", uri=True, **kw))

    with pytest.raises(SpoolError, match="readonly"):
        Publisher("redis://127.0.0.1:1/0", spool=path)


def test_only_the_engines_user_may_read_the_spool(stack: Stack, url: str, path: Path) -> None:
    with Publisher(url, spool=path, **QUICK) as publisher, away(stack):
        publisher.publish_many(answers(3))

        assert {file.name: file.stat().st_mode & 0o777 for file in path.parent.glob("interviews.spool*")} == {
            "interviews.spool": 0o600,
            "interviews.spool-lock": 0o600,
            "interviews.spool-shm": 0o600,
            "interviews.spool-wal": 0o600,
        }


def test_what_was_drained_is_no_longer_on_the_disk_nor_ever_in_the_log(
    publisher_on: Open, stack: Stack, url: str, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def on_disk() -> bytes:
        return b"".join(file.read_bytes() for file in path.parent.glob("interviews.spool*"))

    caplog.set_level(logging.DEBUG, "events")
    publisher = publisher_on(url)
    with away(stack):
        publisher.publish_many([Started.new("s", user_id=uuid.uuid4(), email="anna@example.com")] * 1000)
        assert b"anna@example.com" in on_disk()

    assert publisher.flush() == 0
    assert b"anna" not in on_disk()
    assert path.stat().st_size < 50_000
    assert "spool.began" in caplog.text
    assert "spool.drained events=1000" in caplog.text
    assert "anna" not in caplog.text


def test_a_spool_that_cannot_be_read_does_not_keep_events_from_redis(
    publisher_on: Open, url: str, stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Spool) -> bool:
        raise SpoolError("the disk is broken")

    publisher = publisher_on(url)
    with monkeypatch.context() as patch:
        patch.setattr(spool_module, "LOOK_SECONDS", 0)
        patch.setattr(Spool, "is_empty", broken)
        assert publisher.publish(answers(1)[0]) is not None

    assert subjects(url, stream) == ["session_0"]


def test_what_is_in_the_stream_is_not_sent_again_because_the_file_was_busy(
    stack: Stack, url: str, stream: str, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(spool_module, "BUSY_SECONDS", 0.05)
    with Publisher(url, stream=stream, spool=path, **QUICK) as publisher:
        with away(stack):
            publisher.publish_many(answers(3))
            writer = sqlite3.connect(path, isolation_level=None)
            writer.execute("begin immediate")
        wait_until(lambda: "database is locked" in caplog.text, "the drainer cannot delete")
        writer.execute("rollback")
        writer.close()
        assert publisher.flush() == 0

    assert subjects(url, stream) == names(answers(3))


def test_a_drainer_survives_what_it_does_not_know(path: Path) -> None:
    sent: list[bytes] = []
    trouble = [KeyError("?"), MemoryError()]

    def send(entries: Iterable[tuple[str, bytes]]) -> list[object]:
        if trouble:
            raise trouble.pop()
        sent.extend(event for _, event in entries)
        return [b"1-0" for _ in entries]

    drainer = Drainer(Spool(path), send)
    drainer.append("stream", [b"1", b"2"])

    assert drainer.flush(60) == 0
    assert sent == [b"1", b"2"]
    drainer.close(1)


def test_what_one_stream_refuses_does_not_go_to_another(stack: Stack, url: str, stream: str, path: Path) -> None:
    other = f"{stream}:other"
    with away(stack), Publisher(url, stream=other, spool=path, **QUICK) as publisher:
        publisher.publish_many(answers(2, "other"))

    with Publisher(url, stream=stream, spool=path, **QUICK) as publisher:
        assert publisher.flush() == 0

    assert subjects(url, stream) == []
    assert subjects(url, other) == ["other_0", "other_1"]
    with redis.Redis.from_url(url) as client:
        client.delete(other)


# ----------------------------------------------------------------------------------------------------- processes

ENGINE = """
import sys
from events import Answered, Publisher

url, stream, path, session, count = sys.argv[1:]
publisher = Publisher(url, stream=stream, spool=path, timeout=0.3, retries=0)
for number in range(int(count)):
    publisher.publish(Answered.new(f"{session}_{number}", questions_answered=number))
    print(f"{session}_{number}", flush=True)
sys.stdin.read()
publisher.close()
"""

FORKING = """
import os, sys
from events import Answered, Publisher

url, stream, path = sys.argv[1:]
publisher = Publisher(url, stream=stream, spool=path, timeout=0.3, retries=0)
publisher.publish(Answered.new("before", questions_answered=0))
child = os.fork()
who = "parent" if child else "child"
for number in range(20):
    publisher.publish(Answered.new(f"{who}_{number}", questions_answered=number))
print(who, flush=True)
sys.stdin.read()
left = publisher.flush(60)
publisher.close()
if child:
    _, status = os.waitpid(child, 0)
    left += status
os._exit(left)
"""

FORKING_WHILE_A_THREAD_CONNECTS = """
import os, signal, sys, threading, time
import redis
from events import Answered, Publisher

url, stream, path = sys.argv[1:]
connecting, may_connect = threading.Event(), threading.Event()
init = redis.Connection.__init__

def wait_in_thread(self, *arguments, **options):
    if threading.current_thread() is not threading.main_thread():
        connecting.set()
        may_connect.wait()
    init(self, *arguments, **options)

redis.Connection.__init__ = wait_in_thread
publisher = Publisher(url, stream=stream)
threading.Thread(target=publisher.publish, args=[Answered.new("parent", questions_answered=1)], daemon=True).start()
connecting.wait()
child = os.fork()
if child == 0:
    signal.alarm(30)
    publisher.publish(Answered.new("child", questions_answered=1))
    os._exit(0)
_, status = os.waitpid(child, 0)
may_connect.set()
os._exit(os.waitstatus_to_exitcode(status))
"""

Python = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def python() -> Iterator[Python]:
    """Starts engines; none outlives the test."""
    with ExitStack() as started:

        def python(script: str, *arguments: object) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-c", script, *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=Path(__file__).parent.parent,
            )
            started.enter_context(process)
            started.callback(process.kill)
            return process

        yield python


def lines(process: subprocess.Popen[str], count: int) -> list[str]:
    """So many lines of what it prints."""
    assert process.stdout is not None
    return [process.stdout.readline().strip() for _ in range(count)]


def end(process: subprocess.Popen[str]) -> str:
    """Let it end; answer what more it printed."""
    output, _ = process.communicate("", timeout=60)
    assert process.returncode == 0
    return output


def kill(process: subprocess.Popen[str]) -> list[str]:
    """kill -9; answer what more it had printed."""
    process.kill()
    output, _ = process.communicate(timeout=60)
    return output.split()


def test_every_event_whose_publish_returned_is_in_the_stream_after_kills_while_spooling_and_while_draining(
    python: Python, stack: Stack, url: str, stream: str, path: Path
) -> None:
    returned: list[str] = []
    with away(stack):
        for session in ("first", "second", "third"):
            engine = python(ENGINE, url, stream, path, session, 100_000)
            returned += lines(engine, 400)
            returned += kill(engine)

    for entries in (1, CHUNK + 1):
        engine = python(ENGINE, url, stream, path, "none", 0)
        wait_until(partial(stream_has, url, stream, entries), "it drains")
        kill(engine)

    with Publisher(url, stream=stream, spool=path, **QUICK) as publisher:
        assert publisher.flush(60) == 0
    found = once(subjects(url, stream))
    assert set(returned) <= set(found)
    assert [name for name in found if name in set(returned)] == returned


def test_processes_that_share_a_spool_lose_nothing_and_keep_each_ones_order(
    python: Python, stack: Stack, url: str, stream: str, path: Path
) -> None:
    sessions, count = ("first", "second", "third"), 300
    with away(stack):
        engines = [python(ENGINE, url, stream, path, session, count) for session in sessions]
        for engine in engines:
            lines(engine, count // 2)
    for engine in engines:  # the other half, while the spool is drained
        lines(engine, count - count // 2)

    wait_until(lambda: len(once(subjects(url, stream))) == 3 * count, "all are in the stream")

    found = subjects(url, stream)
    assert len(found) == len(set(found))  # one drainer at a time
    for session in sessions:
        assert [name for name in found if name.startswith(session)] == [f"{session}_{n}" for n in range(count)]
    for engine in engines:
        end(engine)


def test_what_a_dead_process_left_is_drained_by_another_that_shares_the_spool_and_publishes(
    python: Python, stack: Stack, url: str, stream: str, path: Path
) -> None:
    with Publisher(url, stream=stream, spool=path, **QUICK) as living:
        with away(stack):
            engine = python(ENGINE, url, stream, path, "dead", 10)
            left = lines(engine, 10)
            kill(engine)

        def left_is_drained() -> bool:
            living.publish(answers(1, "living")[0])
            return set(left) <= set(subjects(url, stream))

        wait_until(left_is_drained, "the dead process' events are in the stream")


def test_a_publisher_and_its_spool_go_on_in_both_processes_after_a_fork(
    python: Python, stack: Stack, url: str, stream: str, path: Path
) -> None:
    with away(stack):
        forking = python(FORKING, url, stream, path)
        assert sorted(lines(forking, 2)) == ["child", "parent"]

    end(forking)

    found = once(subjects(url, stream))
    assert found[0] == "before"
    for who in ("parent", "child"):
        assert [name for name in found if name.startswith(who)] == [f"{who}_{number}" for number in range(20)]


def test_a_fork_publishes_though_a_thread_of_its_parent_was_just_connecting(
    python: Python, url: str, stream: str, path: Path
) -> None:
    end(python(FORKING_WHILE_A_THREAD_CONNECTS, url, stream, path))

    assert subjects(url, stream)[0] == "child"


def test_a_fork_does_not_keep_its_parents_drain_lock(path: Path) -> None:
    spool = Spool(path)
    with spool.drain_lock() as mine:
        child = os.fork()
        if child == 0:
            with spool.drain_lock() as childs:
                os._exit(int(childs) + 2 * len(spool._drain_locks))
        _, status = os.waitpid(child, 0)

    assert mine
    assert os.waitstatus_to_exitcode(status) == 2  # it did not get the lock, and holds one file only
    spool.close()


def test_many_processes_may_create_a_spool_at_once(python: Python, url: str, stream: str, path: Path) -> None:
    engines = [python(ENGINE, url, stream, path, f"session_{number}", 1) for number in range(5)]

    for engine in engines:
        end(engine)

    assert len(subjects(url, stream)) == 5
