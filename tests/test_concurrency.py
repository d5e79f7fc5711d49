"""Several workers on the same sessions at the same moment: nothing stranded, nothing twice, no deadlock."""

import random
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from threading import Barrier
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

from tests.database import Database, event
from tests.oracle import comparable, expected_row
from worker.embedded import Stack

ROUNDS = 100
WORKERS = 4
DEADLINE = 60  # seconds; Postgres itself ends a deadlock after one

Event = dict[str, Any]
Connect = Callable[[], Database]


@pytest.fixture
def connect(stack: Stack) -> Iterator[Connect]:
    """Opens further connections, one per thread that the test uses."""
    with ExitStack() as opened:
        yield lambda: Database(
            opened.enter_context(psycopg.connect(stack.database_url, autocommit=True, row_factory=dict_row))
        )


def start_and_answer(user: uuid.UUID) -> tuple[Event, Event]:
    session_id = f"session-{uuid.uuid4()}"
    return (
        event("started", session_id, user_id=str(user), email="a@example.com"),
        event("answered", session_id, questions_answered=5),
    )


def assert_both_are_applied(database: Database, start: Event, answer: Event) -> None:
    session_id = start["subject"]
    assert comparable(database.session(session_id)) == expected_row([start, answer])
    ledger = database.ledger(session_id)
    assert len(ledger) == 2
    assert all(kept["applied_at"] for kept in ledger)


def test_a_start_and_an_answer_that_race_are_both_applied(
    database: Database, connect: Connect, user: uuid.UUID
) -> None:
    barrier = Barrier(2, timeout=DEADLINE)

    def race(worker: Database, mine: Event) -> list[str]:
        barrier.wait()
        return worker.apply(mine)

    workers = connect(), connect()
    with ThreadPoolExecutor(2) as pool:
        for _ in range(ROUNDS):
            events = start_and_answer(user)
            list(pool.map(race, workers, events, timeout=DEADLINE))
            assert_both_are_applied(database, *events)


@pytest.mark.parametrize("first", ["started", "answered"])
def test_an_event_waits_for_the_uncommitted_other_of_its_session(
    database: Database, connect: Connect, user: uuid.UUID, first: str
) -> None:
    events = start_and_answer(user)
    early, late = events if first == "started" else events[::-1]
    slow, quick = connect(), connect()

    with ThreadPoolExecutor(1) as pool:
        with slow.connection.transaction():
            slow.apply(early)
            answer = pool.submit(quick.apply, late)
            wait_until_blocked_or_done(database, quick, answer)
        answer.result(timeout=DEADLINE)

    assert_both_are_applied(database, *events)


def wait_until_blocked_or_done(database: Database, worker: Database, answer: Future[Any]) -> None:
    backend = worker.connection.info.backend_pid
    while not answer.done():
        blockers = database.one("select cardinality(pg_blocking_pids(%s)) as count", backend)["count"]
        if blockers:
            return


def story(session_id: str, user: uuid.UUID, rng: random.Random) -> list[Event]:
    """A session's events, every rule among them: two starts, progress, two finishes, a cancel."""

    def when() -> str:
        return f"2026-11-23T10:{rng.randrange(60):02}:00Z"

    starts = [
        event("started", session_id, time=when(), user_id=str(user), email=f"{number}@example.com")
        for number in range(2)
    ]
    answers = [event("answered", session_id, time=when(), questions_answered=rng.randrange(20)) for _ in range(4)]
    finishes = [event("finished", session_id, time=when(), score=rng.randrange(101)) for _ in range(2)]
    return [*starts, *answers, *finishes, event("cancelled", session_id, time=when())]


@pytest.mark.parametrize("seed", range(5))
def test_workers_that_apply_the_same_events_in_different_packs_and_orders_never_deadlock(
    database: Database, connect: Connect, user: uuid.UUID, seed: int
) -> None:
    rng = random.Random(seed)
    sessions = [f"{number}-{uuid.uuid4()}" for number in range(6)]
    good = {session_id: story(session_id, user, rng) for session_id in sessions}
    good[sessions[0]] = good[sessions[0]][2:]  # this one never starts
    bad = {session_id: event("finished", session_id, score=101) for session_id in sessions[:3]}
    barrier = Barrier(WORKERS, timeout=DEADLINE)

    def work(worker: Database, packs: list[list[Event]]) -> None:
        barrier.wait()
        for pack in packs:
            worker.apply(*pack)

    def shuffled() -> list[list[Event]]:
        events = [*(each for events in good.values() for each in events), *bad.values()]
        rng.shuffle(events)
        return [events[at : at + 12] for at in range(0, len(events), 12)]

    workers = [connect() for _ in range(WORKERS)]
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(work, workers, [shuffled() for _ in workers], timeout=DEADLINE))

    for session_id, events in good.items():
        row = expected_row(events)
        assert comparable(database.session(session_id)) == row
        ledger = [(str(kept["event_id"]), kept["applied_at"] is not None) for kept in database.ledger(session_id)]
        assert sorted(ledger) == sorted((each["id"], row is not None) for each in events)
    for session_id, guilty in bad.items():
        (letter,) = database.dead_letters(session_id)
        assert (letter["event_id"], letter["attempts"]) == (guilty["id"], WORKERS)


def test_a_user_deleted_while_an_event_is_applied_leaves_no_ledger_behind(
    database: Database, connect: Connect, user: uuid.UUID
) -> None:
    session_id = f"session-{uuid.uuid4()}"
    database.apply(event("started", session_id, user_id=str(user), email="a@example.com"))
    database.apply(event("finished", session_id, score=1))
    slow, admin = connect(), connect()

    with ThreadPoolExecutor(1) as pool:
        with slow.connection.transaction():
            slow.apply(event("cancelled", session_id))  # changes no row
            deletion = pool.submit(admin.all, "delete from auth.users where id = %s returning id", user)
            wait_until_blocked_or_done(database, admin, deletion)
        deletion.result(timeout=DEADLINE)

    assert database.session(session_id) is None
    assert database.ledger(session_id) == []
