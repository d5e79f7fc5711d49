"""Answers lost on their way back: the work was done, who asked for it was not told, and nothing happens twice.

INTERVIEW_TEST_SEED=… repeats a run's events: each prints its seed.
"""

import asyncio
import os
import random
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Final, TypeVar
from urllib.parse import urlsplit

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from events import Event as ValidEvent
from events import Publisher, PublishError, parse_event
from tests.chaos.proxy import CHUNK, Proxy
from tests.database import Database, event
from tests.stories import Event, assert_rows_equal_their_stories, crowd, encoded, interview
from tests.worker_process import STREAM, Workers, wait_until
from worker.embedded import Stack
from worker.stream import EventStream

T = TypeVar("T")

CUTS: Final = 1_000
SETTINGS: Final = {
    "INTERVIEW_LOG_LEVEL": "DEBUG",  # tells of every pack
    "INTERVIEW_PACK_SIZE": "20",
    "INTERVIEW_BACKOFF_SECONDS": "0.01",
    "INTERVIEW_RECLAIM_SECONDS": "60",  # nobody else takes a pack that is tried again and again
    "INTERVIEW_RPC_TIMEOUT_SECONDS": "10",
    "INTERVIEW_DEAD_SHARE_LIMIT": "1",
}
RECLAIMING: Final = {"INTERVIEW_PACK_SIZE": "5", "INTERVIEW_RECLAIM_SECONDS": "2", "INTERVIEW_RPC_TIMEOUT_SECONDS": "1"}


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get("INTERVIEW_TEST_SEED") or random.randrange(2**32))
    print(f"INTERVIEW_TEST_SEED={seed}")  # pytest shows it where the test fails
    return random.Random(seed)


@pytest.fixture(autouse=True)
def _no_letters_of_others(database: Database) -> None:
    database.connection.execute("truncate public.interview_dead_letters")


def shuffled(some: list[T], rng: random.Random) -> list[T]:
    return rng.sample(some, len(some))


def started(session_id: str, user: uuid.UUID) -> Event:
    return event("started", session_id, user_id=str(user), email="e@example.com")


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port
    return port


def open_letters(database: Database) -> list[tuple[str, str]]:
    """Event ids with their reasons, once for each letter."""
    found = database.all("select event_id, reason from public.interview_dead_letters where status = 'open'")
    return sorted((row["event_id"], row["reason"]) for row in found)


def ledger_size(database: Database) -> int:
    return int(database.one("select count(*) as n from public.interview_events")["n"])


# ------------------------------------------------------------------------------------------- answers of Supabase


@pytest.fixture
def rest(stack: Stack) -> Iterator[Proxy]:
    """Stands before PostgREST."""
    with Proxy(port_of(stack.environment["SUPABASE_REST_URL"])).running() as proxy:
        yield proxy


@pytest.fixture
def commits(database: Database) -> Iterator[Callable[[], int]]:
    """Counts transactions that applied events or kept letters: one that is rolled back takes its note with it."""
    database.connection.execute("""
        create table public.commits_noted (transaction xid8 primary key);
        create function public.note_commit() returns trigger language plpgsql security definer as $$
        begin
          insert into public.commits_noted values (pg_current_xact_id()) on conflict do nothing;
          return null;
        end $$;
        create trigger note_commit after insert on public.interview_events
          for each statement execute function public.note_commit();  -- also where a repeat inserts nothing
        create trigger note_commit after insert on public.interview_dead_letters
          for each statement execute function public.note_commit();
    """)
    try:
        yield lambda: int(database.one("select count(*) as n from public.commits_noted")["n"])
    finally:
        database.connection.execute("drop function public.note_commit() cascade; drop table public.commits_noted")


def answers_received(workers: Workers) -> int:
    """How many answers of Supabase reached the tasks: of each pack one to its good events, one to its bad ones."""
    calls = 0
    for pack in workers.logged("pack.applied"):
        calls += not pack.keys().isdisjoint({"applied", "duplicate", "waiting"})
        calls += not pack.keys().isdisjoint({"invalid_event", "unsupported_type", "again"})
    return calls


def lose_answers(workers: Workers, rest: Proxy, events: list[Event], *, cuts: int) -> None:
    """Have the events applied while nine of ten answers of Supabase are lost, until so many are."""
    workers.stream.add(encoded(events))
    url = f"http://127.0.0.1:{rest.port}"
    rest.mode, rest.cut_share = "cut_replies", 0.9
    with workers.running("--concurrency=2", SUPABASE_URL=url, SUPABASE_REST_URL=url, **SETTINGS) as worker:
        wait_until(lambda: rest.cuts >= cuts or workers.stream.state().length == 0, f"{cuts} answers are lost")
        rest.mode = "pass"
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    assert rest.cuts >= cuts
    assert workers.logged("drain.reclaimed") == []  # a call is made again for a lost answer only


def test_a_thousand_answers_of_supabase_lost_after_the_commit_change_nothing(
    workers: Workers, rest: Proxy, database: Database, user: uuid.UUID, rng: random.Random, commits: Callable[[], int]
) -> None:
    before = ledger_size(database)
    good = crowd(user, rng, events=2_400)
    bad = [(event("answered", "bad", questions_answered=-n), "invalid_event") for n in range(1, 51)]
    bad += [(event("paused", "bad"), "unsupported_type") for _ in range(50)]

    lose_answers(workers, rest, shuffled([*good, *(each for each, _ in bad)], rng), cuts=CUTS)

    assert commits() - answers_received(workers) >= rest.cuts  # each lost answer was one to a committed transaction
    assert_rows_equal_their_stories(database, good)
    assert ledger_size(database) - before == len(good)
    assert open_letters(database) == sorted((each["id"], reason) for each, reason in bad)


def test_what_the_database_rejects_is_one_letter_however_often_the_answer_is_lost(
    workers: Workers, rest: Proxy, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    good = crowd(user, rng, events=300)
    sessions = [each["subject"] for each in good if each["type"] == "interview.started"]
    bad = [(started(f"nobody-{uuid.uuid4()}", uuid.uuid4()), "unknown_user") for _ in range(30)]
    bad += [(started(session_id, database.create_user()), "session_conflict") for session_id in sessions]
    database.apply(*(each for each in good if each["type"] == "interview.started"))  # whose session it is, is known

    lose_answers(workers, rest, shuffled([*good, *(each for each, _ in bad)], rng), cuts=CUTS // 20)

    assert_rows_equal_their_stories(database, good)
    assert open_letters(database) == sorted((each["id"], reason) for each, reason in bad)


# --------------------------------------------------------------------------------------------- answers of Redis


class RedisProxy(Proxy):
    """A proxy before Redis that loses answers to some commands only; counts those of each."""

    def __init__(self, target_port: int, commands: Iterable[str]) -> None:
        super().__init__(target_port)
        self.lost = Counter[str]()
        self._asks = {name: f"${len(name)}\r\n{name}\r\n".encode() for name in commands}  # as they travel

    async def _connection(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        try:
            with suppress(asyncio.CancelledError, OSError):
                await self._forward(client, to_client)
        finally:
            to_client.transport.abort()

    async def _forward(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_connection("127.0.0.1", self._target_port)
        asked = b""

        async def ask() -> None:
            nonlocal asked
            while chunk := await client.read(CHUNK):
                asked += chunk
                to_server.write(chunk)

        async def answer() -> None:
            nonlocal asked
            while chunk := await server.read(CHUNK):
                lossy = [name for name, words in self._asks.items() if words in asked]
                if lossy and self.mode == "cut_replies" and self._random.random() < self.cut_share:
                    self.lost.update(lossy)
                    return
                asked = b""
                to_client.write(chunk)

        pumps = [asyncio.create_task(ask()), asyncio.create_task(answer())]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            to_server.transport.abort()
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)


@contextmanager
def losing_answers(url: str, *commands: str) -> Iterator[tuple[RedisProxy, str]]:
    """A proxy before Redis that loses half of the answers to these, and the URL by way of it."""
    port = port_of(url)
    proxy = RedisProxy(port, commands)
    proxy.mode, proxy.cut_share = "cut_replies", 0.5
    with proxy.running():
        yield proxy, url.replace(f":{port}/", f":{proxy.port}/")


def executed(workers: Workers, command: str) -> int:
    """How often Redis has executed a command since its statistics were reset."""
    return int(workers.client.info("commandstats")[f"cmdstat_{command.lower()}"]["calls"])


def publish_until_confirmed(publisher: Publisher, events: list[ValidEvent]) -> None:
    while events:
        try:
            events = events[len(publisher.publish_many(events)) :]
        except PublishError as error:
            events = events[error.published :]


def test_an_event_whose_confirmation_is_lost_is_published_again_and_applied_once(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    stories = [interview(user, rng) for _ in range(80)]
    calls = [[parse_event(raw) for raw in encoded(story)] for story in stories[::2]]  # all events in one
    calls += [[parse_event(raw)] for story in stories[1::2] for raw in encoded(story)]  # one event in each
    workers.client.config_resetstat()

    with workers.running() as worker:
        with (
            losing_answers(workers.environment["REDIS_URL"], "XADD") as (proxy, url),
            Publisher(url) as publisher,
            ThreadPoolExecutor(16) as engine,
        ):
            list(engine.map(partial(publish_until_confirmed, publisher), shuffled(calls, rng)))
        workers.wait_until_empty()
        assert workers.stop(worker) == 0

    assert proxy.lost["XADD"] >= 300
    assert executed(workers, "XADD") >= 10 * len(stories) + 300  # what was not confirmed had been in the stream
    assert_rows_equal_their_stories(database, [each for story in stories for each in story])
    assert open_letters(database) == []


def test_a_worker_that_loses_answers_of_redis_applies_each_event_once(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    good = crowd(user, rng, events=1_500)
    bad = [(event("paused", "bad"), "unsupported_type") for _ in range(100)]
    workers.stream.add(encoded(shuffled([*good, *(each for each, _ in bad)], rng)))
    workers.client.config_resetstat()

    with (
        losing_answers(workers.environment["REDIS_URL"], "XREADGROUP", "XCLAIM", "LPUSH", "XDEL") as (proxy, url),
        workers.running("--concurrency=2", REDIS_URL=url, **SETTINGS | RECLAIMING) as worker,
    ):
        wait_until(lambda: proxy.lost["XDEL"] >= 200 or workers.stream.state().length == 0, "200 answers are lost")
        proxy.mode = "pass"
        workers.wait_until_empty()
        assert workers.stop(worker) == 0

    assert proxy.lost["XDEL"] >= 200
    assert executed(workers, "XDEL") >= len(workers.logged("pack.applied")) + 200  # what was not told had been done
    assert_rows_equal_their_stories(database, good)
    assert open_letters(database) == sorted((each["id"], reason) for each, reason in bad)


def test_a_try_whose_answer_is_lost_counts_once_though_it_is_sent_again(workers: Workers) -> None:
    with losing_answers(workers.environment["REDIS_URL"], "SADD") as (proxy, url):
        client = redis.Redis.from_url(url, retry=Retry(NoBackoff(), 50))
        stream = EventStream(client, STREAM)
        counted = [stream.attempt("1-1").count() for _ in range(20)]
        client.close()

    assert proxy.lost["SADD"] >= 3
    assert counted == list(range(1, 21))
    workers.stream.acknowledge(["1-1"], attempted=True)
    assert workers.stream.attempt("1-1").count() == 1
