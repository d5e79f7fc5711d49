"""The rules of one session's row and of its ledger, one by one, as the batch RPC applies them."""

import json
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.database import Database, Row, event
from tests.oracle import comparable

EARLY, LATE = "2026-11-23T10:15:00Z", "2026-11-23T10:45:00Z"
LONG_AGO, FAR_AHEAD = "1999-01-01T00:00:00Z", "2999-01-01T00:00:00Z"  # around the now of a call by hand
SMALL_ID, GREAT_ID = "0fffffff-0000-4000-8000-", "f0000000-0000-4000-8000-"

Event = dict[str, Any]
Deliver = Callable[..., Row]


@pytest.fixture
def session_id() -> str:
    return f"session-{uuid.uuid4()}"


@pytest.fixture(params=["one by one", "one by one, backwards", "in one pack", "in one pack, backwards"])
def deliver(request: pytest.FixtureRequest, database: Database) -> Deliver:
    """Applies one session's events in each of four ways; answers its row, times as datetimes."""

    def apply(*events: Event) -> Row:
        ordered = events[::-1] if "backwards" in request.param else events
        for pack in [ordered] if "pack" in request.param else [(each,) for each in ordered]:
            assert set(database.apply(*pack)) <= {"applied", "waiting"}
        return row_of(database, events[0]["subject"])

    return apply


def row_of(database: Database, session_id: str) -> Row:
    row = comparable(database.session(session_id))
    assert row is not None
    return row


def started(session_id: str, user: uuid.UUID, *, time: str = EARLY, **more: Any) -> Event:
    return event("started", session_id, time=time, user_id=str(user), **{"email": "a@example.com"} | more)


def with_id(prefix: str) -> uuid.UUID:
    """A fresh id whose place in the order of ids is known."""
    return uuid.UUID(prefix + uuid.uuid4().hex[:12])


def moment(time: str) -> datetime:
    return datetime.fromisoformat(time)


def create_by_hand(database: Database, user: uuid.UUID, session_id: str) -> None:
    """What a front end does: the session starts now."""
    database.one("select public.create_interview_session(%s, 'person@example.com', %s, null, null)", user, session_id)


def expire(database: Database, older_than: timedelta = timedelta()) -> int:
    answer = database.one("select public.expire_waiting_interview_events(%s) as expired", older_than)["expired"]
    assert isinstance(answer, int)
    return answer


# --------------------------------------------------------------------------------------------- the row, by column


def test_a_start_alone_makes_a_row_in_progress(database: Database, user: uuid.UUID, session_id: str) -> None:
    files = {"resume_filename": "cv.pdf", "job_description_filename": "job.txt"}

    assert database.apply(started(session_id, user, total_questions=7, **files)) == ["applied"]

    assert row_of(database, session_id) == files | {
        "session_id": session_id,
        "user_id": str(user),
        "email": "a@example.com",
        "interview_status": "in_progress",
        "total_questions": 7,
        "questions_answered": 0,
        "duration_minutes": 0,
        "score": None,
        "feedback": None,
        "created_at": moment(EARLY),
        "completed_at": None,
    }


@pytest.mark.parametrize("kind", ["answered", "finished", "cancelled"])
@pytest.mark.parametrize("column", ["questions_answered", "duration_minutes"])
def test_the_greatest_progress_ever_reported_stands_whoever_reports_it(
    deliver: Deliver, user: uuid.UUID, session_id: str, column: str, kind: str
) -> None:
    greatest: Row = {column: 9}
    later: Row = {"questions_answered": 0, column: 4}

    row = deliver(
        started(session_id, user),
        event(kind, session_id, **greatest),
        event("answered", session_id, time=LATE, **later),
    )

    assert row[column] == 9


@pytest.mark.parametrize("kind", ["started", "answered", "finished"])
def test_the_greatest_total_of_questions_stands_whoever_reports_it(
    deliver: Deliver, user: uuid.UUID, session_id: str, kind: str
) -> None:
    reporter = (
        started(session_id, user, time=LATE, total_questions=12)
        if kind == "started"
        else event(kind, session_id, questions_answered=1, total_questions=12)
    )

    row = deliver(started(session_id, user, total_questions=10), reporter)

    assert row["total_questions"] == 12


def test_starting_again_by_hand_never_lowers_the_total(database: Database, user: uuid.UUID, session_id: str) -> None:
    for total in (10, 12, 11, None):
        database.one(
            "select public.create_interview_session(%s, 'a@example.com', %s, null, null, %s)", user, session_id, total
        )

    assert row_of(database, session_id)["total_questions"] == 12


def test_a_number_reported_as_null_says_nothing(deliver: Deliver, user: uuid.UUID, session_id: str) -> None:
    row = deliver(
        started(session_id, user, total_questions=8),
        event("answered", session_id, questions_answered=3, duration_minutes=6),
        event("finished", session_id, questions_answered=None, duration_minutes=None, total_questions=None),
    )

    assert (row["questions_answered"], row["duration_minutes"], row["total_questions"]) == (3, 6, 8)


@pytest.mark.parametrize(
    ("story", "status"),
    [
        ([], "in_progress"),
        ([("answered", LATE)], "in_progress"),
        ([("cancelled", LATE)], "cancelled"),
        ([("finished", LATE)], "completed"),
        ([("cancelled", EARLY), ("finished", LATE)], "completed"),
        ([("finished", EARLY), ("cancelled", LATE)], "completed"),
    ],
)
def test_finished_wins_over_cancelled_and_cancelled_over_in_progress(
    deliver: Deliver, user: uuid.UUID, session_id: str, story: list[tuple[str, str]], status: str
) -> None:
    row = deliver(started(session_id, user), *(event(kind, session_id, time=time) for kind, time in story))

    assert row["interview_status"] == status
    assert (row["completed_at"] is not None) == (status == "completed")


@pytest.mark.parametrize(
    "last", [{"score": 90, "feedback": {"words": "better"}}, {"score": None, "feedback": None}, {}]
)
def test_the_latest_finish_gives_score_feedback_and_completed_at_even_where_it_gives_none(
    deliver: Deliver, user: uuid.UUID, session_id: str, last: Row
) -> None:
    row = deliver(
        started(session_id, user),
        event("finished", session_id, time=EARLY, score=99.5, feedback={"words": "good"}),
        event("finished", session_id, time=LATE, **last),
    )

    assert (row["score"], row["feedback"]) == (last.get("score"), last.get("feedback"))
    assert row["completed_at"] == moment(LATE)


def test_of_two_finishes_at_the_same_time_the_greater_id_stands(
    deliver: Deliver, user: uuid.UUID, session_id: str
) -> None:
    row = deliver(
        started(session_id, user),
        event("finished", session_id, event_id=with_id(SMALL_ID), score=80, feedback={"words": "small"}),
        event("finished", session_id, event_id=with_id(GREAT_ID), score=20),
    )

    assert (row["score"], row["feedback"]) == (20, None)


def test_the_earliest_start_gives_the_names_and_created_at_even_where_it_gives_none(
    deliver: Deliver, user: uuid.UUID, session_id: str
) -> None:
    row = deliver(
        started(session_id, user, time=EARLY, email="first@example.com", resume_filename="first.pdf"),
        started(
            session_id, user, time=LATE, email="later@example.com", resume_filename="l", job_description_filename="l"
        ),
    )

    assert row["created_at"] == moment(EARLY)
    assert row["email"] == "first@example.com"
    assert (row["resume_filename"], row["job_description_filename"]) == ("first.pdf", None)


def test_of_two_starts_at_the_same_time_the_smaller_id_gives_the_names(
    deliver: Deliver, user: uuid.UUID, session_id: str
) -> None:
    row = deliver(
        started(session_id, user, email="small@example.com", event_id=with_id(SMALL_ID)),
        started(session_id, user, email="great@example.com", event_id=with_id(GREAT_ID)),
    )

    assert row["email"] == "small@example.com"


@pytest.mark.parametrize(("time", "email"), [(LONG_AGO, "a@example.com"), (FAR_AHEAD, "person@example.com")])
def test_of_a_start_by_hand_and_one_by_event_the_earlier_gives_the_names(
    database: Database, user: uuid.UUID, session_id: str, time: str, email: str
) -> None:
    create_by_hand(database, user, session_id)

    database.apply(started(session_id, user, time=time))

    row = row_of(database, session_id)
    assert row["email"] == email
    assert (row["created_at"] == moment(time)) == (time == LONG_AGO)


@pytest.mark.parametrize(("time", "score"), [(LONG_AGO, 50), (FAR_AHEAD, 90)])
def test_of_a_completion_by_hand_and_one_by_event_the_later_gives_the_score(
    database: Database, user: uuid.UUID, session_id: str, time: str, score: int
) -> None:
    database.apply(started(session_id, user))
    database.one("select public.complete_interview(%s, 50)", session_id)

    database.apply(event("finished", session_id, time=time, score=90))

    row = row_of(database, session_id)
    assert row["score"] == score
    assert (row["completed_at"] == moment(time)) == (time == FAR_AHEAD)


def test_completed_at_is_now_only_where_nobody_gave_a_time(
    database: Database, user: uuid.UUID, session_id: str
) -> None:
    database.apply(started(session_id, user))

    database.all(
        "update public.interview_sessions set interview_status = 'completed' where session_id = %s returning id",
        session_id,
    )

    completed_at = row_of(database, session_id)["completed_at"]
    assert timedelta(0) <= datetime.now(UTC) - completed_at < timedelta(minutes=1)


@pytest.mark.parametrize("status", ["in_progress", "cancelled"])
def test_completed_at_is_cleared_when_the_status_leaves_completed(
    database: Database, user: uuid.UUID, session_id: str, status: str
) -> None:
    database.apply(started(session_id, user), event("finished", session_id))

    database.all(
        "update public.interview_sessions set interview_status = %s where session_id = %s returning id",
        status,
        session_id,
    )

    assert row_of(database, session_id)["completed_at"] is None


# ----------------------------------------------------------------------------------------------------- the ledger


def test_the_ledger_keeps_an_event_as_it_was(database: Database, user: uuid.UUID, session_id: str) -> None:
    start = started(session_id, user, time="2026-11-23T11:15:00.25+01:00", unheard_of="kept")
    database.apply(start)

    (kept,) = database.ledger(session_id)

    assert (str(kept["event_id"]), kept["session_id"]) == (start["id"], session_id)
    assert (kept["type"], kept["payload"]) == (start["type"], start["data"])
    assert kept["occurred_at"] == moment("2026-11-23T10:15:00.25Z")
    assert kept["applied_at"] is not None


def test_an_event_delivered_twice_is_applied_once(database: Database, user: uuid.UUID, session_id: str) -> None:
    events = started(session_id, user), event("finished", session_id, score=70)
    database.apply(*events)
    before = database.session(session_id), database.ledger(session_id)

    assert database.apply(*events) == ["duplicate", "duplicate"]

    assert (database.session(session_id), database.ledger(session_id)) == before


def test_a_repeat_within_one_pack_is_a_duplicate(database: Database, user: uuid.UUID, session_id: str) -> None:
    start, answer = started(session_id, user), event("answered", session_id, questions_answered=2)

    outcomes = database.apply(answer, start, answer, start)

    assert outcomes == ["applied", "applied", "duplicate", "duplicate"]
    assert len(database.ledger(session_id)) == 2


@pytest.mark.parametrize(
    "other", [{"subject": "another session"}, {"type": "interview.cancelled"}, {"time": LATE}], ids=lambda o: str(*o)
)
@pytest.mark.parametrize("together", [True, False], ids=["in one pack", "in two packs"])
def test_an_id_used_for_another_event_is_rejected(
    database: Database, user: uuid.UUID, session_id: str, other: dict[str, str], together: bool
) -> None:
    answer = event("answered", session_id, questions_answered=2)
    impostor = answer | other
    events = started(session_id, user), answer, impostor

    outcomes = database.apply(*events) if together else [database.apply(each)[0] for each in events]

    assert outcomes == ["applied", "applied", "rejected"]
    (letter,) = database.all("select * from public.interview_dead_letters where event_id = %s", answer["id"])
    assert (letter["reason"], letter["status"], json.loads(letter["event"])) == ("rejected", "open", impostor)
    assert len(database.ledger(session_id)) == 2
    assert row_of(database, session_id)["interview_status"] == "in_progress"


# --------------------------------------------------------------------------------------------------- early events


def test_early_events_wait_and_the_start_brings_them_in(database: Database, user: uuid.UUID, session_id: str) -> None:
    early = event("answered", session_id, questions_answered=5), event("finished", session_id, time=LATE, score=60)

    assert database.apply(*early) == ["waiting", "waiting"]
    assert database.apply(early[0]) == ["duplicate"]
    assert database.session(session_id) is None
    assert [kept["applied_at"] for kept in database.ledger(session_id)] == [None, None]

    assert database.apply(started(session_id, user)) == ["applied"]
    row = row_of(database, session_id)
    assert (row["questions_answered"], row["score"], row["interview_status"]) == (5, 60, "completed")
    assert all(kept["applied_at"] for kept in database.ledger(session_id))


def test_the_start_of_one_session_leaves_the_events_of_another_waiting(
    database: Database, user: uuid.UUID, session_id: str
) -> None:
    stranger = f"{session_id}-other"

    outcomes = database.apply(event("answered", stranger, questions_answered=1), started(session_id, user))

    assert outcomes == ["waiting", "applied"]
    assert [kept["applied_at"] for kept in database.ledger(stranger)] == [None]


def test_an_event_that_waited_too_long_becomes_an_orphan_that_can_be_replayed(
    database: Database, user: uuid.UUID, session_id: str
) -> None:
    early = event("answered", session_id, time="2026-11-23T11:15:00.25+01:00", questions_answered=5)
    expire(database)  # what other tests left waiting
    database.apply(early)

    assert expire(database) == 1
    assert database.ledger(session_id) == []
    (letter,) = database.dead_letters(session_id)
    assert (letter["reason"], letter["event_id"], letter["type"]) == ("orphaned", early["id"], early["type"])

    replay = json.loads(letter["event"])
    assert replay["data"] == early["data"]
    assert database.apply(replay) == ["waiting"]
    assert database.apply(early, started(session_id, user)) == ["duplicate", "applied"]
    assert row_of(database, session_id)["questions_answered"] == 5
    assert [letter["status"] for letter in database.dead_letters(session_id)] == ["resolved"]


def test_an_event_within_the_limit_goes_on_waiting_even_beside_one_that_is_not(
    database: Database, session_id: str
) -> None:
    old, recent = event("answered", session_id, questions_answered=1), event("cancelled", session_id)
    database.apply(old, recent)
    database.all(
        "update public.interview_events set received_at = now() - interval '25 hours' where event_id = %s returning 1",
        old["id"],
    )

    expire(database, timedelta(hours=24))

    assert [str(kept["event_id"]) for kept in database.ledger(session_id)] == [recent["id"]]
    assert [letter["event_id"] for letter in database.dead_letters(session_id)] == [old["id"]]


def test_an_event_whose_session_a_person_created_is_applied_instead_of_expired(
    database: Database, user: uuid.UUID, session_id: str
) -> None:
    database.apply(event("answered", session_id, questions_answered=5))
    create_by_hand(database, user, session_id)

    expire(database)

    assert row_of(database, session_id)["questions_answered"] == 5
    assert all(kept["applied_at"] for kept in database.ledger(session_id))
    assert database.dead_letters(session_id) == []


# ------------------------------------------------------------------------------------------------- rejected events


@pytest.mark.parametrize("together", [True, False], ids=["in one pack", "in two packs"])
def test_a_start_by_an_unknown_user_is_dead_and_its_replay_brings_in_its_followers(
    database: Database, session_id: str, together: bool
) -> None:
    nobody = uuid.uuid4()
    start, answer = started(session_id, nobody), event("answered", session_id, questions_answered=5)

    outcomes = database.apply(start, answer) if together else [*database.apply(start), *database.apply(answer)]

    assert outcomes == ["rejected", "waiting"]
    assert database.session(session_id) is None
    (letter,) = database.dead_letters(session_id)
    assert (letter["reason"], letter["status"], letter["event_id"]) == ("unknown_user", "open", start["id"])
    assert "example.com" not in letter["detail"]
    assert str(nobody) not in letter["detail"]

    database.create_user(nobody)
    assert database.apply(json.loads(letter["event"])) == ["applied"]
    assert row_of(database, session_id)["questions_answered"] == 5
    (letter,) = database.dead_letters(session_id)
    (applied_at,) = {kept["applied_at"] for kept in database.ledger(session_id)}
    assert (letter["status"], letter["resolved_at"]) == ("resolved", applied_at)  # now() is the transaction's


def test_failing_again_raises_the_attempts_of_the_one_open_letter(database: Database, session_id: str) -> None:
    start = started(session_id, uuid.uuid4())
    database.apply(start)
    (first,) = database.dead_letters(session_id)
    database.all("update public.interview_dead_letters set status = 'replayed' where id = %s returning id", first["id"])

    database.apply(start)

    (letter,) = database.dead_letters(session_id)
    assert (letter["id"], letter["attempts"], letter["status"]) == (first["id"], 2, "open")
    assert letter["first_failed_at"] == first["first_failed_at"] < letter["last_failed_at"]


@pytest.mark.parametrize("time", [EARLY, LATE], ids=["earlier", "later"])
@pytest.mark.parametrize("together", [True, False], ids=["in one pack", "in two packs"])
def test_a_start_by_another_user_is_a_session_conflict_and_the_first_applied_stands(
    database: Database, user: uuid.UUID, session_id: str, time: str, together: bool
) -> None:
    mine = started(session_id, user, time="2026-11-23T10:30:00Z")
    theirs = started(session_id, database.create_user(), time=time, email="b@example.com")

    outcomes = database.apply(mine, theirs) if together else [*database.apply(mine), *database.apply(theirs)]

    assert outcomes == ["applied", "rejected"]
    row = row_of(database, session_id)
    assert (row["user_id"], row["email"]) == (str(user), "a@example.com")
    assert row["created_at"] == moment(mine["time"])
    assert [letter["reason"] for letter in database.dead_letters(session_id)] == ["session_conflict"]
    assert len(database.ledger(session_id)) == 1


def test_a_start_of_a_session_that_another_person_created_is_a_session_conflict(
    database: Database, user: uuid.UUID, session_id: str
) -> None:
    create_by_hand(database, user, session_id)

    assert database.apply(started(session_id, database.create_user())) == ["rejected"]

    assert row_of(database, session_id)["user_id"] == str(user)
    assert [letter["reason"] for letter in database.dead_letters(session_id)] == ["session_conflict"]


@pytest.mark.parametrize("place", [0, 10, 20])
@pytest.mark.parametrize(
    "guilty",
    [
        {"score": 101},
        {"score": -1},
        {"questions_answered": -1},
        {"duration_minutes": 2**31},
        {"total_questions": "many"},
        {"feedback": "words"},
    ],
    ids=str,
)
def test_one_bad_event_in_a_pack_of_many_is_rejected_alone(
    database: Database, user: uuid.UUID, session_id: str, guilty: Row, place: int
) -> None:
    good = [started(session_id, user)] + [
        event("answered", session_id, questions_answered=number) for number in range(1, 20)
    ]
    bad = event("finished", session_id, **guilty)
    pack = [*good[:place], bad, *good[place:]]

    outcomes = database.apply(*pack)

    assert outcomes == ["rejected" if each is bad else "applied" for each in pack]
    row = row_of(database, session_id)
    assert (row["questions_answered"], row["interview_status"]) == (19, "in_progress")
    assert len(database.ledger(session_id)) == len(good)
    (letter,) = database.dead_letters(session_id)
    assert (letter["reason"], letter["event_id"], json.loads(letter["event"])) == ("rejected", bad["id"], bad)
    assert str(next(iter(guilty.values()))) not in letter["detail"]


def test_a_bad_event_is_rejected_even_where_it_would_have_to_wait(database: Database, session_id: str) -> None:
    assert database.apply(event("finished", session_id, score=101)) == ["rejected"]

    assert database.ledger(session_id) == []


# ------------------------------------------------------------------------------------------------- deleted users


def test_deleting_a_user_removes_the_sessions_and_their_ledgers_and_no_others(
    database: Database, user: uuid.UUID, session_id: str
) -> None:
    others = f"{session_id}-other"
    database.apply(
        started(session_id, user),
        event("answered", session_id, questions_answered=1),
        started(others, database.create_user()),
    )

    database.all("delete from auth.users where id = %s returning id", user)

    assert database.session(session_id) is None
    assert database.ledger(session_id) == []
    assert database.session(others) is not None
    assert len(database.ledger(others)) == 1


def test_an_auth_service_without_rights_on_our_tables_may_delete_a_user(
    database: Database, user: uuid.UUID, session_id: str
) -> None:
    """Supabase's supabase_auth_admin is such a role; before Postgres 18 AFTER triggers of a cascade run as it."""
    database.apply(started(session_id, user))

    with database.connection.transaction(force_rollback=True):
        database.connection.execute("create role auth_service nologin")
        database.connection.execute("grant usage on schema auth to auth_service")
        database.connection.execute("grant select, delete on auth.users to auth_service")
        database.connection.execute("set local role auth_service")
        database.connection.execute("delete from auth.users where id = %s", (user,))
        database.connection.execute("reset role")
        assert database.session(session_id) is None
        assert database.ledger(session_id) == []
