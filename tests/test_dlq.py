"""What operators do with dead letters: the ladder, editing, restoring, the audit, and very many letters."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.database import Database, event
from tests.worker_process import PATIENCE_SECONDS, Workers, wait_until
from worker.database import Database as Supabase
from worker.dlq import BATCH, POLL_SECONDS, Action, DeadLetters, Filter, Replay
from worker.errors import RefusedCall, WorkerError
from worker.settings import load_settings

QUICK: dict[str, Any] = {"rate": 10_000.0, "wait_seconds": PATIENCE_SECONDS}
MANY = 100_000
ACTOR = "tester"

Event = dict[str, Any]


@pytest.fixture
def letters(workers: Workers) -> Iterator[DeadLetters]:
    supabase = Supabase(load_settings())
    yield DeadLetters(supabase)
    supabase.close()


def buried(database: Database, user: uuid.UUID, count: int) -> Filter:
    """Starts of a user who does not exist, as dead letters; the filter that means them and no others."""
    starts = [event("started", f"dlq-{user}-{n}", user_id=str(user), email="dlq@example.com") for n in range(count)]
    assert set(database.apply(*starts)) == {"rejected"}
    return Filter(user_id=str(user))


def poisoned(database: Database, event: Event) -> str:
    """A letter that killed its workers, spaced as nobody else writes it; answer its text."""
    received = json.dumps(event, indent=4)
    names = {"event_id": event["id"], "session_id": event["subject"], "type": event["type"]}
    database.record_dead(event=received, **names, reason="poison", detail="tried 5 times")
    return received


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def statuses(database: Database, user: uuid.UUID) -> dict[str, int]:
    rows = database.all(
        "select status, count(*) as n from public.interview_dead_letters where session_id like %s group by status",
        f"dlq-{user}-%",
    )
    return {row["status"]: row["n"] for row in rows}


def audit_of(database: Database, action: Action) -> dict[str, Any]:
    return database.one("select * from public.interview_dead_letter_actions where id = %s", action.id)


def replayed(letters: DeadLetters, workers: Workers, wanted: Filter, action: Action) -> Replay:
    *_, last = letters.replay(action, letters.choose(wanted).ids, workers.stream, **QUICK)
    return last


# ------------------------------------------------------------------------------------------------------- replaying


def test_the_ladder_stops_by_itself_on_letters_that_fail_again(
    workers: Workers, database: Database, letters: DeadLetters
) -> None:
    nobody = uuid.uuid4()
    wanted = buried(database, nobody, 300)
    action = Action("replay", ACTOR, wanted)
    with workers.running():
        last = replayed(letters, workers, wanted, action)
    assert (last.published, len(last.failed), last.applied, last.left) == (1, 1, 0, 299)
    assert last.stopped == "1 of 1 failed again"
    assert statuses(database, nobody) == {"open": 300}
    told = audit_of(database, action)
    assert (told["actor"], told["letters"], told["outcomes"]) == (ACTOR, 1, {"failed": 1})


def test_the_ladder_climbs_to_the_end_where_the_cause_is_mended(
    workers: Workers, database: Database, letters: DeadLetters
) -> None:
    newcomer = uuid.uuid4()
    wanted = buried(database, newcomer, 300)
    database.create_user(newcomer)
    action = Action("replay", ACTOR, wanted, "the user signed up")
    with workers.running():
        last = replayed(letters, workers, wanted, action)
    assert (last.published, last.applied, last.failed, last.stopped) == (300, 300, [], None)
    assert statuses(database, newcomer) == {"resolved": 300}
    told = audit_of(database, action)
    assert (told["letters"], told["outcomes"], told["note"]) == (300, {"applied": 300}, "the user signed up")
    assert told["filter"] == wanted.to_json()


def test_a_replay_left_in_the_middle_leaves_the_rest_and_the_next_one_ends_it(
    workers: Workers, database: Database, letters: DeadLetters
) -> None:
    newcomer = uuid.uuid4()
    wanted = buried(database, newcomer, 300)
    database.create_user(newcomer)
    with workers.running():
        steps = letters.replay(Action("replay", ACTOR, wanted), letters.choose(wanted).ids, workers.stream, **QUICK)
        stands = next(each for each in steps if each.published >= 11)
        steps.close()
        assert stands.left == 300 - stands.published
        workers.wait_until_empty()
        assert statuses(database, newcomer) == {"open": stands.left, "resolved": stands.published}
        last = replayed(letters, workers, wanted, Action("replay", ACTOR, wanted))
    assert last.applied == stands.left
    assert statuses(database, newcomer) == {"resolved": 300}
    ledger = database.one(
        "select count(*) as n from public.interview_events where session_id like %s", f"dlq-{newcomer}-%"
    )
    assert ledger["n"] == 300


def test_ctrl_c_stops_a_replay_says_how_far_it_came_and_it_can_go_on(workers: Workers, database: Database) -> None:
    newcomer = uuid.uuid4()
    buried(database, newcomer, 200)
    database.create_user(newcomer)
    command = [str(Path(sys.executable).parent / "interviews"), "dlq", "replay", "--user", str(newcomer)]
    environment = {**os.environ, **workers.environment}
    with workers.running():
        slow = subprocess.Popen(
            [*command, "--rate", "20", "--no-ladder"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: statuses(database, newcomer).get("resolved", 0) > 0, "some are applied")
        slow.send_signal(signal.SIGINT)
        out, err = slow.communicate(timeout=PATIENCE_SECONDS)
        assert slow.returncode == 1
        assert "interrupted" in err
        assert "are left as they were: run it again to go on" in err
        assert "replayed:" in out
        assert statuses(database, newcomer)["open"] > 0
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS
        )
    assert done.returncode == 0, done.stderr
    assert statuses(database, newcomer) == {"resolved": 200}


def test_a_letter_that_fails_again_for_another_reason_stays_one_letter_with_its_exact_bytes(
    workers: Workers, database: Database, letters: DeadLetters
) -> None:
    nobody = uuid.uuid4()
    start = event("started", f"dlq-{nobody}-0", user_id=str(nobody), email="dlq@example.com")
    received = poisoned(database, start)
    wanted = Filter(user_id=str(nobody))
    (letter_id,) = letters.choose(wanted).ids

    with workers.running():
        last = replayed(letters, workers, wanted, Action("replay", ACTOR, wanted))

    assert (last.failed, last.under_way) == ([letter_id], set())
    (letter,) = letters.get(letters.choose(Filter(status=None, user_id=str(nobody))).ids)
    assert (letter["id"], letter["status"], letter["reason"]) == (letter_id, "open", "unknown_user")
    assert (letter["event"], letter["attempts"]) == (received, 2)


def test_a_letter_whose_replay_waits_in_vain_stays_one_letter(database: Database, letters: DeadLetters) -> None:
    answer = event("answered", f"dlq-{uuid.uuid4()}", questions_answered=1)
    received = poisoned(database, answer)
    wanted = Filter(session_id=answer["subject"])
    (letter_id,) = letters.choose(wanted).ids
    letters._move(Action("replay", ACTOR, wanted), "replay", [letter_id])

    assert database.apply(answer) == ["waiting"]
    database.connection.execute("select public.expire_waiting_interview_events('0 seconds')")

    (letter,) = letters.get(letters.choose(Filter(status=None, session_id=answer["subject"])).ids)
    assert (letter["id"], letter["status"], letter["reason"]) == (letter_id, "open", "orphaned")
    assert letter["event"] == received


def test_a_replay_keeps_its_rate(
    database: Database, letters: DeadLetters, workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = buried(database, uuid.uuid4(), 1200)
    clock = Clock()
    monkeypatch.setattr("worker.dlq.time", clock)
    published = [
        (each.published, clock.now)
        for each in letters.replay(
            Action("replay", ACTOR, wanted),
            letters.choose(wanted).ids,
            workers.stream,
            rate=500,
            ladder=(),
            wait_seconds=0,
        )
    ]

    assert published[-1][0] == 1200
    for count, seconds in published:
        assert count <= 500 * (seconds + POLL_SECONDS)
    assert clock.now == pytest.approx(1200 / 500)


# ---------------------------------------------------------------------------------- editing, discarding, restoring


def test_an_edited_event_is_applied_and_its_letter_closed_as_replaced(
    database: Database, letters: DeadLetters, user: uuid.UUID
) -> None:
    nobody = uuid.uuid4()
    wanted = buried(database, nobody, 1)
    (letter_id,) = letters.choose(wanted).ids
    (letter,) = letters.get([letter_id])
    mended: Event = json.loads(letter["event"])
    mended["data"]["user_id"] = str(user)
    action = Action("edit", ACTOR, Filter(status=None, ids=(letter_id,)), "another user")

    answer = letters.edit(action, letter_id, json.dumps(mended).encode())

    assert answer["outcome"] == "applied"
    (closed,) = letters.get([letter_id])
    assert (closed["status"], closed["replaced_by"], closed["note"]) == ("resolved", mended["id"], "another user")
    session = database.session(f"dlq-{nobody}-0")
    assert session is not None
    assert session["user_id"] == str(user)
    assert audit_of(database, action)["outcomes"] == {"applied": 1}


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"user_id": "nobody"}, WorkerError),  # breaks the contract
        ({"user_id": str(uuid.uuid4())}, RefusedCall),  # no such user
        ({"surprise": 1}, WorkerError),  # a publisher is strict
    ],
)
def test_an_edit_that_is_refused_changes_nothing(
    database: Database, letters: DeadLetters, change: dict[str, object], error: type[Exception]
) -> None:
    nobody = uuid.uuid4()
    (letter_id,) = letters.choose(buried(database, nobody, 1)).ids
    before = letters.get([letter_id])
    edited: Event = json.loads(before[0]["event"])
    edited["data"] |= change
    action = Action("edit", ACTOR, Filter(status=None, ids=(letter_id,)), "in vain")

    with pytest.raises(error):
        letters.edit(action, letter_id, json.dumps(edited).encode())

    assert letters.get([letter_id]) == before
    assert database.session(f"dlq-{nobody}-0") is None
    assert database.all("select from public.interview_dead_letter_actions where id = %s", action.id) == []


def test_a_letter_that_is_not_open_is_not_edited(database: Database, letters: DeadLetters, user: uuid.UUID) -> None:
    wanted = buried(database, uuid.uuid4(), 1)
    (letter_id,) = letters.choose(wanted).ids
    letters.discard(Action("discard", ACTOR, wanted), [letter_id])
    before = letters.get([letter_id])
    mended: Event = json.loads(before[0]["event"])
    mended["data"]["user_id"] = str(user)

    with pytest.raises(RefusedCall, match="this dead letter is not open"):
        letters.edit(Action("edit", ACTOR, wanted), letter_id, json.dumps(mended).encode())

    assert letters.get([letter_id]) == before
    assert database.session(mended["subject"]) is None


def test_a_discarded_letter_is_kept_and_opened_again_unless_its_event_failed_anew(
    database: Database, letters: DeadLetters
) -> None:
    nobody = uuid.uuid4()
    wanted = buried(database, nobody, 2)
    first, second = letters.choose(wanted).ids
    assert letters.discard(Action("discard", ACTOR, wanted, "a test"), [first, second]) == [first, second]
    assert statuses(database, nobody) == {"discarded": 2}
    assert [each["note"] for each in letters.get([first, second])] == ["a test"] * 2

    database.apply(json.loads(letters.get([first])[0]["event"]))  # it fails anew: a letter of its own

    assert letters.restore(Action("restore", ACTOR, wanted), [first, second]) == [second]
    assert statuses(database, nobody) == {"open": 2, "discarded": 1}


# ---------------------------------------------------------------------------------------------------------- audit


@pytest.mark.parametrize(
    "statement",
    [
        "delete from public.interview_dead_letter_actions where id = %s",
        "update public.interview_dead_letter_actions set actor = 'nobody' where id = %s",
        "update public.interview_dead_letter_actions set note = null where id = %s",
        "update public.interview_dead_letter_actions set filter = '{}' where id = %s",
    ],
)
def test_what_was_done_cannot_be_undone_in_the_audit(database: Database, letters: DeadLetters, statement: str) -> None:
    wanted = buried(database, uuid.uuid4(), 1)
    action = Action("discard", ACTOR, wanted, "a test")
    letters.discard(action, letters.choose(wanted).ids)
    before = audit_of(database, action)
    with database.connection.transaction():
        database.connection.execute("set local role service_role")
        with pytest.raises(psycopg.errors.InsufficientPrivilege), database.connection.transaction():
            database.connection.execute(statement.encode(), [action.id])
    assert audit_of(database, action) == before


def test_an_action_of_several_batches_is_one_row_of_the_audit(database: Database, letters: DeadLetters) -> None:
    wanted = buried(database, uuid.uuid4(), 2 * BATCH + 1)
    action = Action("discard", ACTOR, wanted, "a test")

    letters.discard(action, letters.choose(wanted).ids)

    assert audit_of(database, action)["letters"] == 2 * BATCH + 1


# --------------------------------------------------------------------------------------------- finding among many


def test_no_ids_mean_no_letter(database: Database, letters: DeadLetters) -> None:
    wanted = buried(database, uuid.uuid4(), 2)
    second = letters.choose(wanted).ids[1]

    assert letters.choose(Filter(ids=())).ids == []
    assert letters.choose(Filter(ids=(second,))).ids == [second]


def test_letters_are_counted_by_status_and_reason(database: Database, letters: DeadLetters) -> None:
    before = letters.counts()
    wanted = buried(database, uuid.uuid4(), 5)
    first, second, third, *_ = letters.choose(wanted).ids
    letters.discard(Action("discard", ACTOR, wanted), [first])
    letters._move(Action("replay", ACTOR, wanted), "replay", [second, third])

    after = letters.counts()

    assert after["open"]["unknown_user"] == before["open"].get("unknown_user", 0) + 2
    assert after["replayed"]["unknown_user"] == before["replayed"].get("unknown_user", 0) + 2


def test_a_group_is_one_cause_whatever_ids_and_numbers_its_details_hold(
    database: Database, letters: DeadLetters
) -> None:
    mark = f"mark-{uuid.uuid4()}"
    for detail in ("SQLSTATE 22003, row 1", "SQLSTATE 22003, row 27", f"SQLSTATE 22003, row {uuid.uuid4()}",
                   "SQLSTATE 22001, row 1"):  # fmt: skip
        database.record_dead(event=str(uuid.uuid4()), session_id=mark, reason="rejected", detail=detail)

    groups = letters.groups(Filter(session_id=mark), limit=50)

    assert [group["letters"] for group in groups] == [3, 1]
    assert letters.find(Filter(group=groups[1]["group"]), limit=1)[0]["detail"] == "SQLSTATE 22001, row 1"


def test_each_part_of_a_filter_finds_what_it_should_and_nothing_else(database: Database, letters: DeadLetters) -> None:
    nobody, other = uuid.uuid4(), uuid.uuid4()
    buried(database, nobody, 3)
    buried(database, other, 2)
    ours = letters.choose(Filter(user_id=str(nobody))).ids
    assert len(ours) == 3
    assert letters.choose(Filter(session_id=f"dlq-{nobody}-1")).ids == ours[1:2]
    narrowings: list[tuple[dict[str, Any], bool]] = [
        ({"reason": "unknown_user"}, True),
        ({"reason": "orphaned"}, False),
        ({"type": "interview.started"}, True),
        ({"type": "interview.finished"}, False),
        ({"text": "NO SUCH user"}, True),
        ({"text": "no such thing"}, False),
        ({"since": "2020-01-01T00:00:00Z"}, True),
        ({"since": "2120-01-01T00:00:00Z"}, False),
        ({"until": "2120-01-01T00:00:00Z"}, True),
        ({"until": "2020-01-01T00:00:00Z"}, False),
        ({"status": "discarded"}, False),
        ({"status": None}, True),
    ]
    for narrowing, found in narrowings:
        assert letters.choose(Filter(**{"user_id": str(nobody)} | narrowing)).ids == (ours if found else []), narrowing
    first = letters.find(Filter(user_id=str(nobody)), limit=2)
    rest = letters.find(Filter(user_id=str(nobody)), limit=2, before=first[-1]["id"])
    assert [each["id"] for each in [*first, *rest]] == ours[::-1]


def test_a_hundred_thousand_letters_are_grouped_and_found(
    database: Database, letters: DeadLetters, rng: random.Random
) -> None:
    mark = f"mark{rng.getrandbits(64):x}".translate(str.maketrans("0123456789", "ghijklmnop"))
    try:
        database.connection.execute(
            """
            insert into public.interview_dead_letters (event, event_id, session_id, type, reason, detail)
            select '{"n": ' || n || '}', gen_random_uuid()::text, %(mark)s || '-' || n, 'interview.answered',
                   case n %% 2 when 0 then 'rejected' else 'invalid_event' end,
                   %(mark)s || ' row ' || n || ' of ' || gen_random_uuid()
              from generate_series(1, %(many)s) n
            """,
            {"mark": mark, "many": MANY},
        )
        began = time.perf_counter()
        groups = letters.groups(Filter(text=mark), limit=50)
        grouped = time.perf_counter()
        page = letters.find(Filter(text=mark, reason="rejected"), limit=50)
        found = time.perf_counter()
        (one,) = letters.find(Filter(session_id=f"{mark}-77777"), limit=50)
        print(f"groups {grouped - began:.2f} s, a filtered page {found - grouped:.2f} s")
        assert sorted((each["reason"], each["letters"]) for each in groups) == [
            ("invalid_event", MANY // 2),
            ("rejected", MANY // 2),
        ]
        assert len(page) == 50
        assert {each["reason"] for each in page} == {"rejected"}
        assert one["reason"] == "invalid_event"
        assert letters.find(Filter(group=groups[0]["group"]), limit=1)[0]["reason"] == groups[0]["reason"]
    finally:
        database.connection.execute("delete from public.interview_dead_letters where session_id like %s", [f"{mark}-%"])
