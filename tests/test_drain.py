"""The task's loop on real servers, step by step: packs, suspects and poison, holds, a full Redis, memory."""

import random
import uuid
from collections.abc import Iterator

import psutil
import pytest

from events import parse_event
from tests.database import Database, event
from tests.stories import assert_rows_equal_their_stories, chunks, crowd, encoded
from tests.worker_process import STREAM, Workers, hanging_supabase, wait_until
from worker import slots, stopping
from worker.app import make_app
from worker.apply.applier import MAX_ATTEMPTS_ALONE
from worker.apply.context import Context
from worker.apply.drain import SUSPECT_DELIVERIES, Drain
from worker.apply.pack import Pack
from worker.apply.tasks import apply_events
from worker.embedded import Stack
from worker.settings import load_settings
from worker.stream import Entry, EventStream

MEBIBYTE = 1 << 20


@pytest.fixture(autouse=True)
def _no_letters_of_others(database: Database) -> None:
    database.connection.execute("truncate public.interview_dead_letters")


@pytest.fixture(autouse=True)
def _running() -> Iterator[None]:
    stopping.resume()
    slots.begin_worker("test")
    yield
    stopping.resume()


@pytest.fixture
def context(workers: Workers) -> Iterator[Context]:
    context = Context(load_settings())
    yield context
    context.close()


@pytest.fixture
def drain(context: Context) -> Drain:
    return context.drain(0)


def die(workers: Workers, count: int, *, deliveries: int = 1) -> list[Entry]:
    """A consumer claims entries and dies, so often; they are idle now."""
    entries = workers.stream.claim("dead", count, block_ms=1).entries
    ids = [entry.id for entry in entries]
    workers.client.xclaim(STREAM, "workers", "dead", 0, ids, idle=3_600_000, retrycount=deliveries, justid=True)
    return entries


def make_idle(workers: Workers, entry: Entry) -> None:
    workers.client.xclaim(STREAM, "workers", "dead", 0, [entry.id], idle=3_600_000, justid=True)


def test_a_drain_applies_what_is_there_and_ends(
    workers: Workers, database: Database, user: uuid.UUID, drain: Drain
) -> None:
    events = crowd(user, random.Random(1), events=2_500)
    workers.stream.add(encoded(events))
    workers.stream.wait_for_undelivered(block_ms=0)
    drain.run()
    state = workers.stream.state()
    assert (state.length, state.pending) == (0, 0)
    assert slots.busy() == 0
    assert slots.packs() == 3
    assert slots.take_full_claim()
    assert_rows_equal_their_stories(database, events)


def test_a_message_with_arguments_touches_nothing(workers: Workers) -> None:
    workers.stream.add([b"{}"])
    workers.stream.wait_for_undelivered(block_ms=0)
    apply_events("consumer", "an old pack")
    assert workers.stream.state().length == 1
    assert workers.stream.state().pending == 0


def test_a_drain_claims_nothing_in_a_hold_or_while_stopping(workers: Workers, drain: Drain) -> None:
    workers.stream.add([b"{}"])
    workers.client.set(f"{STREAM}:hold", '{"reason": "ill", "since": 1}')
    drain.run()
    assert workers.stream.state().length == 1
    workers.client.delete(f"{STREAM}:hold")
    stopping.stop()
    drain.run()
    assert (workers.stream.state().length, workers.stream.state().pending) == (1, 0)


def test_a_suspect_is_applied_alone_and_is_poison_after_five_attempts(
    workers: Workers, database: Database, user: uuid.UUID, drain: Drain
) -> None:
    events = crowd(user, random.Random(2), events=10)
    suspect = event("answered", "suspect", questions_answered=1)
    (raw,) = encoded([suspect])
    workers.stream.add([raw])
    workers.stream.wait_for_undelivered(block_ms=0)
    (entry,) = die(workers, 1, deliveries=SUSPECT_DELIVERIES)
    for _ in range(MAX_ATTEMPTS_ALONE):  # that ended with their process
        workers.stream.attempt(entry.id).count()
    workers.stream.add(encoded(events))
    drain.run()
    assert workers.stream.state().length == 0
    (letter,) = database.dead_letters("suspect")
    assert (letter["reason"], letter["event"]) == ("poison", raw.decode())
    assert_rows_equal_their_stories(database, events)


def test_a_suspect_with_fewer_attempts_is_applied(
    workers: Workers, database: Database, user: uuid.UUID, drain: Drain
) -> None:
    events = crowd(user, random.Random(3), events=10)
    workers.stream.add(encoded(events))
    workers.stream.wait_for_undelivered(block_ms=0)
    for entry in die(workers, 10, deliveries=1000):
        for _ in range(MAX_ATTEMPTS_ALONE - 1):
            workers.stream.attempt(entry.id).count()
    drain.run()
    assert_rows_equal_their_stories(database, events)
    assert workers.client.keys(f"{STREAM}:attempts:*") == []


def test_an_event_that_was_applied_after_all_is_no_poison(workers: Workers, database: Database, drain: Drain) -> None:
    user = database.create_user()
    started = event("started", f"slow-{user}", user_id=str(user), email="e@example.com")
    database.apply(started)
    workers.stream.add(encoded([started]))
    workers.stream.wait_for_undelivered(block_ms=0)
    (entry,) = die(workers, 1, deliveries=SUSPECT_DELIVERIES)
    for _ in range(MAX_ATTEMPTS_ALONE):
        workers.stream.attempt(entry.id).count()
    drain.run()
    assert workers.stream.state().length == 0
    assert database.dead_letters(started["subject"]) == []


def test_an_attempt_ends_when_the_request_leaves(
    workers: Workers, database: Database, drain: Drain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed while it waits for Supabase says nothing about the event."""
    counted: list[int] = []
    raw = encoded([event("answered", "suspect", questions_answered=1)])
    workers.stream.add(raw)
    workers.stream.wait_for_undelivered(block_ms=0)
    (entry,) = die(workers, 1, deliveries=SUSPECT_DELIVERIES)
    key = f"{STREAM}:attempts:{entry.id}"

    def parse(raw: bytes) -> object:
        counted.append(workers.client.scard(key))
        return parse_event(raw)

    def send(*_: object, **__: object) -> None:
        counted.append(workers.client.scard(key))
        raise KeyboardInterrupt  # the process ends here

    monkeypatch.setattr("worker.apply.applier.parse_event", parse)
    monkeypatch.setattr("httpx.Client.send", send)
    with pytest.raises(KeyboardInterrupt):
        drain.run()
    assert counted == [1, 0]
    assert workers.client.scard(key) == 0


def test_a_fault_of_ours_that_an_event_brings_out_counts(
    workers: Workers, drain: Drain, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers.stream.add(encoded([event("answered", "suspect", questions_answered=1)]))
    workers.stream.wait_for_undelivered(block_ms=0)
    (entry,) = die(workers, 1, deliveries=SUSPECT_DELIVERIES)

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    for place in ("worker.apply.applier.parse_event", "httpx.Client.send"):
        with monkeypatch.context() as patched:
            patched.setattr(place, fail)
            with pytest.raises(ZeroDivisionError):
                drain.run()
        make_idle(workers, entry)
    assert workers.client.scard(f"{STREAM}:attempts:{entry.id}") == 2


def test_a_full_redis_drains_but_for_suspects(
    workers: Workers, database: Database, user: uuid.UUID, context: Context, drain: Drain
) -> None:
    events = crowd(user, random.Random(4), events=100)
    workers.stream.add(encoded(events))
    workers.stream.wait_for_undelivered(block_ms=0)
    (suspect,) = die(workers, 1, deliveries=SUSPECT_DELIVERIES)
    die(workers, 10)
    try:
        workers.client.config_set("maxmemory", 1)
        drain.run()
        assert workers.stream.state().length == 1
        assert workers.client.xpending_range(STREAM, "workers", "-", "+", 10)[0]["consumer"] == drain.consumer.encode()
    finally:
        workers.client.config_set("maxmemory", 0)
    make_idle(workers, suspect)
    drain_again = context.drain(1)
    drain_again.run(suspects=False)
    assert workers.stream.state().length == 1
    slots.ask_to_reclaim()
    drain_again.run()
    assert_rows_equal_their_stories(database, events)


def test_the_first_worker_ever_drains_a_full_redis(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    """Nobody relieves it, and its limit stays: neither a group nor a message can be put in at first."""
    events = crowd(user, rng, events=1_000)
    workers.stream.add(encoded(events))
    try:
        workers.client.config_set("maxmemory", 1)
        with workers.running() as worker:
            workers.wait_until_empty()
            assert workers.stop(worker) == 0
    finally:
        workers.client.config_set("maxmemory", 0)
    assert len(workers.logged("dispatcher.redis_full")) == 1
    assert_rows_equal_their_stories(database, events)


def test_claims_are_refreshed_when_a_quarter_of_the_reclaim_time_is_over(workers: Workers) -> None:
    workers.stream.add([b"1", b"2"])
    workers.stream.wait_for_undelivered(block_ms=0)
    entries = workers.stream.claim("a", 2, block_ms=1).entries
    before = refreshes(workers)
    fresh = Pack(workers.stream, "a", entries, reclaim_ms=3_600_000, slot=slots.Slot(0))
    for _ in range(10):
        fresh.refresh()
    assert refreshes(workers) == before
    for _ in range(10):
        fresh.wait()
    assert refreshes(workers) == before + 1  # notes once that the delivery was none
    old = Pack(workers.stream, "a", entries, reclaim_ms=0, slot=slots.Slot(0))
    old.refresh()
    assert refreshes(workers) > before + 1


def refreshes(workers: Workers) -> int:
    return int(workers.client.info("commandstats").get("cmdstat_xclaim", {"calls": 0})["calls"])


def test_a_pack_lets_go_of_what_another_has_reclaimed(
    workers: Workers, database: Database, user: uuid.UUID, drain: Drain, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = crowd(user, random.Random(5), events=10)
    workers.stream.add(encoded(events))
    workers.stream.wait_for_undelivered(block_ms=0)
    stolen: list[bytes] = []

    def parse(raw: bytes) -> object:
        if not stolen:
            ids = [each["message_id"] for each in workers.client.xpending_range(STREAM, "workers", "-", "+", 10)]
            stolen.extend(ids[:4])
            workers.client.xclaim(STREAM, "workers", drain.consumer, 0, ids, idle=3_600_000, justid=True)
            workers.client.xclaim(STREAM, "workers", "thief", 0, stolen)
        return parse_event(raw)

    monkeypatch.setattr("worker.apply.applier.parse_event", parse)
    monkeypatch.setattr("worker.apply.pack.REFRESH_SHARE", 10**12)  # refresh before each RPC
    drain.run()
    assert workers.stream.state().claimed["thief"] == 4
    assert workers.stream.state().length == 4


def swollen_to(workers: Workers) -> int:
    """Bytes of the largest process of a worker that makes dead letters of all that is in the stream."""
    largest = 0
    with workers.running(INTERVIEW_DEAD_SHARE_LIMIT="1", INTERVIEW_CONCURRENCY="2") as worker:

        def empty() -> bool:
            nonlocal largest
            family = [psutil.Process(worker.pid), *psutil.Process(worker.pid).children()]
            largest = max(largest, *(process.memory_info().rss for process in family))
            return workers.stream.state().length == 0

        wait_until(empty, "all are dead letters")
        assert workers.stop(worker) == 0
    return largest


@pytest.mark.parametrize("small_first", [False, True], ids=["at once", "after small ones"])
def test_large_entries_do_not_swell_a_process(workers: Workers, small_first: bool) -> None:
    """500 entries of 1.5 MB; anyone can add them."""
    if small_first:
        workers.stream.add([b"small"] * 1000)
    for _ in range(25):
        workers.stream.add([b"x" * 1_500_000] * 20)
    assert swollen_to(workers) < 256 * MEBIBYTE


def test_large_entries_of_a_dead_worker_do_not_either(workers: Workers) -> None:
    for _ in range(25):
        workers.stream.add([b"x" * 1_500_000] * 20)
    workers.stream.wait_for_undelivered(block_ms=0)
    ids = [entry_id for entry_id, _ in workers.client.xrange(STREAM)]
    workers.client.xgroup_setid(STREAM, "workers", "$")
    for some in chunks(ids, 100):
        workers.client.xclaim(STREAM, "workers", "dead", 0, some, idle=3_600_000, retrycount=1, justid=True, force=True)
    assert swollen_to(workers) < 256 * MEBIBYTE


def test_worker_starts_in_one_outage_make_no_poison(
    workers: Workers, stack: Stack, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    """Eight workers, killed one after the other while Supabase does not answer."""
    events = crowd(user, rng, events=60)
    workers.stream.add(encoded(events))
    with hanging_supabase(stack) as settings:
        for start in range(8):
            with workers.running(**settings, INTERVIEW_RECLAIM_SECONDS="2.1") as worker:
                mine = workers.logged("worker.started")[start]["worker"]
                wait_until(lambda mine=mine: claimed_by(workers.stream, mine) > 0, "it has claimed events")  # type: ignore[misc]
                children = psutil.Process(worker.pid).children()
                worker.kill()
                worker.wait()
                for child in children:
                    child.kill()
            workers.client.delete(f"{STREAM}:hold")  # lapses by itself, later
    with workers.running() as worker:
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    assert_rows_equal_their_stories(database, events)
    assert database.all("select reason from public.interview_dead_letters") == []


def claimed_by(stream: EventStream, worker: str) -> int:
    return sum(entries for name, entries in stream.state().claimed.items() if slots.worker_of(name) == worker)


def test_maintenance_runs_while_the_stream_is_never_empty(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    events = crowd(user, rng, events=100)
    raw = encoded(events)
    with workers.running(INTERVIEW_CONCURRENCY="1", INTERVIEW_KEEP_LEDGER_DAYS="1") as worker:
        workers.stream.add(raw)
        workers.wait_until_empty()  # and its slot waits for more
        make_app(load_settings()).send_task("interview.purge")

        def purged() -> bool:
            workers.stream.add(raw[:10])  # again and again: a trickle without end
            return bool(workers.logged("ledger.purged"))

        wait_until(purged, "the other task had its turn")
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
