"""Several workers on the same sessions at the same moment: nothing stranded, nothing twice, no deadlock.

HYPOTHESIS_PROFILE=long races ten times as often, and applies fifty times as many packs.
"""

import json
import random
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from threading import Barrier
from typing import Any

import psycopg
import pytest
from psycopg.errors import DeadlockDetected
from psycopg.rows import dict_row

from tests.database import Database, event
from tests.hypothesis_profiles import PACKS, ROUNDS
from tests.oracle import comparable, expected_row
from worker.embedded import Stack

WORKERS = 8
DEADLINE = 60  # seconds; Postgres itself ends a deadlock after one
EVERYTHING = "-1 hour"  # older than that is also what arrives while the call runs

Event = dict[str, Any]
Connect = Callable[[], Database]
Act = Callable[[Database], Any]
AtOnce = Callable[..., list[Any]]


@pytest.fixture
def connect(stack: Stack) -> Iterator[Connect]:
    """Opens further connections, one per thread that the test uses."""
    with ExitStack() as opened:
        yield lambda: Database(
            opened.enter_context(psycopg.connect(stack.database_url, autocommit=True, row_factory=dict_row))
        )


@pytest.fixture
def at_once(connect: Connect) -> Iterator[AtOnce]:
    """Runs each act on a connection of its own, all from the same moment; answers their results in order."""
    workers = [connect() for _ in range(WORKERS)]
    with ThreadPoolExecutor(WORKERS) as pool:

        def run(*acts: Act) -> list[Any]:
            barrier = Barrier(len(acts), timeout=DEADLINE)

            def take_part(act: Act, worker: Database) -> Any:
                barrier.wait()
                return act(worker)

            return list(pool.map(take_part, acts, workers, timeout=DEADLINE))

        yield run


def start_of(session_id: str, user: uuid.UUID) -> Event:
    return event("started", session_id, user_id=str(user), email="a@example.com")


def start_and_answer(user: uuid.UUID) -> tuple[Event, Event]:
    session_id = f"session-{uuid.uuid4()}"
    return start_of(session_id, user), event("answered", session_id, questions_answered=5)


def row_equals(database: Database, *events: Event) -> bool:
    return comparable(database.session(events[0]["subject"])) == expected_row(events)


def ledger(database: Database, session_id: str) -> dict[str, bool]:
    """The ids that the ledger holds of a session, each with whether it is applied."""
    return {str(kept["event_id"]): kept["applied_at"] is not None for kept in database.ledger(session_id)}


def applying(*packs: list[Event]) -> Act:
    """Applies the packs, one after the other; answers each event's id with its outcome."""

    def apply(worker: Database) -> list[tuple[str, str]]:
        return [told for pack in packs for told in zip((e["id"] for e in pack), worker.apply(*pack), strict=True)]

    return apply


def expire(database: Database) -> int:
    return int(database.one("select public.expire_waiting_interview_events(%s) as n", EVERYTHING)["n"])


def purge(database: Database) -> int:
    return int(database.one("select public.purge_interview_events('30 days') as n")["n"])


def deleting(user: uuid.UUID) -> Act:
    return lambda worker: worker.all("delete from auth.users where id = %s returning id", user)


# --------------------------------------------------------------------------------------------- applying at once


def test_a_start_and_an_answer_that_race_are_both_applied(database: Database, at_once: AtOnce, user: uuid.UUID) -> None:
    for _ in range(ROUNDS):
        start, answer = start_and_answer(user)
        at_once(applying([start]), applying([answer]))
        assert row_equals(database, start, answer)
        assert ledger(database, start["subject"]) == {start["id"]: True, answer["id"]: True}


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

    assert row_equals(database, *events)
    assert ledger(database, early["subject"]) == {each["id"]: True for each in events}


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


def crowded_sessions(user: uuid.UUID, rng: random.Random) -> tuple[dict[str, list[Event]], list[Event]]:
    """Six sessions' events, the first never starting, and events that nobody can apply."""
    names = [f"{number}-{uuid.uuid4()}" for number in range(6)]
    good = {name: story(name, user, rng) for name in names}
    good[names[0]] = good[names[0]][2:]
    return good, [start_of(names[0], uuid.uuid4()), *(event("finished", name, score=101) for name in names[:3])]


def packs_of(events: list[Event], rng: random.Random) -> list[list[Event]]:
    """The events in a random order, in packs of a random size."""
    mixed, size = rng.sample(events, len(events)), rng.randint(6, 18)
    return [mixed[at : at + size] for at in range(0, len(mixed), size)]


def test_workers_that_apply_the_same_events_in_different_packs_and_orders_never_deadlock(
    database: Database, at_once: AtOnce, user: uuid.UUID
) -> None:
    rng = random.Random(0)
    applied = 0

    while applied < PACKS:
        good, bad = crowded_sessions(user, rng)
        events = [*(each for events in good.values() for each in events), *bad]
        packs = [packs_of(events, rng) for _ in range(WORKERS)]
        at_once(*(applying(*each) for each in packs))
        applied += sum(map(len, packs))

        for session_id, told in good.items():
            assert row_equals(database, *told)
            started = expected_row(told) is not None
            assert ledger(database, session_id) == dict.fromkeys((each["id"] for each in told), started)
        letters = [letter for session_id in good for letter in database.dead_letters(session_id)]
        attempts = [(letter["event_id"], letter["status"], letter["attempts"]) for letter in letters]
        assert sorted(attempts) == sorted((each["id"], "open", WORKERS) for each in bad)


# -------------------------------------------------------------------------------------------- replay and expire


@pytest.fixture
def orphan(database: Database) -> Callable[[], Event]:
    """Makes events that waited in vain, each now a dead letter."""

    def wait_in_vain() -> Event:
        early = event("answered", f"session-{uuid.uuid4()}", questions_answered=5)
        assert database.apply(early) == ["waiting"]
        assert expire(database) >= 1
        return early

    while expire(database):
        pass  # what other tests left waiting
    return wait_in_vain


def replaying(early: Event) -> Act:
    """What `interviews dlq replay` and a worker do: mark the letter, then apply its event."""

    def replay(worker: Database) -> None:
        letter = worker.one(
            "update public.interview_dead_letters set status = 'replayed'"
            " where event_id = %s and status in ('open', 'replayed') returning event",
            early["id"],
        )
        worker.apply(json.loads(letter["event"]))

    return replay


def whereabouts(database: Database, early: Event) -> tuple[bool | None, str]:
    """Whether the event is applied, None where the ledger does not hold it, and the status of its letter."""
    (letter,) = database.dead_letters(early["subject"])
    return ledger(database, early["subject"]).get(early["id"]), letter["status"]


def test_an_orphan_replayed_while_events_expire_waits_or_is_an_open_letter_never_both_and_never_neither(
    database: Database, at_once: AtOnce, orphan: Callable[[], Event]
) -> None:
    for _ in range(ROUNDS):
        early = orphan()
        at_once(expire, replaying(early))
        assert whereabouts(database, early) in {(False, "replayed"), (None, "open")}


def test_an_orphan_replayed_while_its_session_starts_and_events_expire_is_applied_or_an_open_letter(
    database: Database, at_once: AtOnce, orphan: Callable[[], Event], user: uuid.UUID
) -> None:
    for _ in range(ROUNDS):
        early = orphan()
        start = start_of(early["subject"], user)
        at_once(expire, replaying(early), applying([start]))
        found = whereabouts(database, early)
        assert found in {(True, "resolved"), (None, "open")}
        if found == (None, "open"):
            replaying(early)(database)
        assert whereabouts(database, early) == (True, "resolved")
        assert row_equals(database, start, early)


def recording(events: list[Event], reason: str) -> Act:
    """Keeps events as dead letters, as a worker does with those that it cannot apply."""
    letters = [
        {"event": json.dumps(each), "event_id": each["id"], "session_id": each["subject"], "type": each["type"]}
        | {"reason": reason, "detail": "given up"}
        for each in events
    ]
    return lambda worker: worker.all("select public.record_dead_interview_events(%s)", json.dumps(letters))


def test_an_event_called_poison_while_it_is_applied_leaves_no_open_letter(
    database: Database, at_once: AtOnce, user: uuid.UUID
) -> None:
    for _ in range(ROUNDS):
        start, _ = start_and_answer(user)
        at_once(applying([start]), recording([start], "poison"))
        assert row_equals(database, start)
        assert [letter["status"] for letter in database.dead_letters(start["subject"])] in ([], ["resolved"])


def test_workers_that_bury_the_same_events_in_different_orders_never_deadlock(
    database: Database, at_once: AtOnce, user: uuid.UUID
) -> None:
    for _ in range(ROUNDS // 10):
        session_id = f"session-{uuid.uuid4()}"
        events = [event("answered", session_id, questions_answered=-1) for _ in range(20)]
        orders = [random.sample(events, len(events)) for _ in range(WORKERS)]
        at_once(*(recording(order, "invalid_event") for order in orders))
        assert [letter["attempts"] for letter in database.dead_letters(session_id)] == [WORKERS] * len(events)


def test_a_duplicate_resolves_the_letter_of_its_event(database: Database, user: uuid.UUID) -> None:
    start, _ = start_and_answer(user)
    database.apply(start)
    recording([start], "unsupported_type")(database)  # by a worker of an older deploy

    assert database.apply(start) == ["duplicate"]

    assert [letter["status"] for letter in database.dead_letters(start["subject"])] == ["resolved"]


# ------------------------------------------------------------------------------------------- purge and rebuild


@pytest.fixture
def ended(database: Database, user: uuid.UUID) -> Iterator[Callable[[], list[Event]]]:
    """Makes sessions that ended long ago; answers their events."""

    def end() -> list[Event]:
        session_id = f"session-{uuid.uuid4()}"
        events = [start_of(session_id, user), event("finished", session_id, score=50, questions_answered=5)]
        database.apply(*events)
        database.connection.execute(
            "update public.interview_events set received_at = now() - interval '31 days' where session_id = %s",
            (session_id,),
        )
        return events

    yield end
    deleting(user)(database)  # a row without its ledger is a finding of every audit


@pytest.mark.parametrize(
    "late",
    [
        {"type": "interview.finished", "time": "2026-11-23T11:00:00Z", "data": {"score": 70}},
        {"type": "interview.finished", "time": "2026-11-23T09:00:00Z", "data": {"score": 30}},
        {"type": "interview.answered", "data": {"questions_answered": 9}},
        {"type": "interview.cancelled"},
    ],
    ids=["a later finish", "an earlier finish", "progress", "a cancel"],
)
def test_a_late_event_of_a_session_that_is_being_purged_is_applied_and_kept(
    database: Database, at_once: AtOnce, ended: Callable[[], list[Event]], late: dict[str, Any]
) -> None:
    for _ in range(ROUNDS // 4):
        old = ended()
        new = event("cancelled", old[0]["subject"]) | late
        at_once(purge, applying([new]))
        assert row_equals(database, *old, new)
        kept = ledger(database, old[0]["subject"])
        assert kept in ({new["id"]: True}, {each["id"]: True for each in (*old, new)})


def test_an_event_that_comes_again_while_its_session_is_purged_changes_nothing(
    database: Database, at_once: AtOnce, ended: Callable[[], list[Event]]
) -> None:
    for number in range(ROUNDS):
        old = ended()
        again = old[number % 2]
        at_once(purge, applying([again]))
        assert row_equals(database, *old)
        assert ledger(database, old[0]["subject"]) in ({}, {again["id"]: True})


def test_an_event_applied_while_its_row_is_rebuilt_is_in_the_row(
    database: Database, at_once: AtOnce, user: uuid.UUID
) -> None:
    def rebuilding(session_id: str) -> Act:
        return lambda worker: worker.all("select public.rebuild_interview_session(%s, p_force => true)", session_id)

    for _ in range(ROUNDS):
        start, answer = start_and_answer(user)
        database.apply(start)
        at_once(applying([answer]), rebuilding(start["subject"]))
        assert row_equals(database, start, answer)
        assert ledger(database, start["subject"]) == {start["id"]: True, answer["id"]: True}


# -------------------------------------------------------------------------------------------- a user's deletion


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


def despite_deadlocks(act: Act) -> Act:
    """The act, tried again when Postgres chose it as a deadlock's victim: allowed beside a user's deletion only."""

    def persist(worker: Database) -> Any:
        worker.connection.execute("set deadlock_timeout = '20ms'")
        while True:
            try:
                return act(worker)
            except DeadlockDetected:
                continue

    return persist


def test_a_user_deleted_while_events_of_many_sessions_are_applied_leaves_nothing_behind(
    database: Database, at_once: AtOnce
) -> None:
    rng = random.Random(0)
    for _ in range(ROUNDS):
        user = database.create_user()
        sessions = [f"session-{uuid.uuid4()}" for _ in range(6)]
        database.apply(*(start_of(session_id, user) for session_id in sessions[:3]))
        events = [event("answered", session_id, questions_answered=5) for session_id in sessions]
        events += [start_of(session_id, user) for session_id in sessions]
        packs = [rng.sample(events, len(events)) for _ in range(2)]

        answers = at_once(*map(despite_deadlocks, [deleting(user), *map(applying, packs)]))[1:]

        kept = {key: applied for session_id in sessions for key, applied in ledger(database, session_id).items()}
        letters = [letter for session_id in sessions for letter in database.dead_letters(session_id)]
        assert [session_id for session_id in sessions if database.session(session_id)] == []
        assert not any(kept.values())
        assert {(letter["type"], letter["reason"]) for letter in letters} <= {("interview.started", "unknown_user")}
        erased = {key for answer in answers for key, outcome in answer if outcome in ("applied", "duplicate")}
        assert {each["id"] for each in events} <= erased | set(kept) | {letter["event_id"] for letter in letters}


def test_a_user_deleted_while_events_of_a_session_that_a_person_started_expire_leaves_nothing_behind(
    database: Database, at_once: AtOnce
) -> None:
    for _ in range(ROUNDS):
        user = database.create_user()
        session_id = f"session-{uuid.uuid4()}"
        database.apply(event("answered", session_id, questions_answered=5))
        database.one("select public.create_interview_session(%s, 'a@example.com', %s, null, null)", user, session_id)
        at_once(despite_deadlocks(expire), despite_deadlocks(deleting(user)))
        assert database.session(session_id) is None
        assert database.ledger(session_id) == []
        assert database.dead_letters(session_id) == []
