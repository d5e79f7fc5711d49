"""Looking back and clearing up: timeline, audit, repair, expiry, purge, and who schedules them."""

import json
import re
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.database import Database, event
from tests.worker_process import Workers, wait_until
from worker.app import make_app
from worker.settings import load_settings

CLI = Path(sys.executable).parent / "interviews"


@pytest.fixture
def story(database: Database, user: uuid.UUID) -> list[dict[str, Any]]:
    """A completed session's events, applied."""
    session_id = f"session-{uuid.uuid4()}"
    events = [
        event("started", session_id, time="2026-11-23T10:00:00Z", user_id=str(user), email="a@example.com"),
        event("answered", session_id, time="2026-11-23T10:05:00Z", questions_answered=5, duration_minutes=5),
        event("finished", session_id, time="2026-11-23T10:30:00Z", score=85.5, feedback={"a": "b"}, total_questions=5),
    ]
    database.apply(*reversed(events))
    return events


def verified(database: Database, session_id: str) -> dict[str, list[str]]:
    """What an audit of all sessions, three to a page, finds of one: kind to columns."""
    after: str | None = ""
    found: dict[str, list[str]] = {}
    while after is not None:
        page = database.one("select public.verify_interview_sessions(%s, 3) as v", after)["v"]
        found |= {each["kind"]: each["columns"] for each in page["found"] if each["session_id"] == session_id}
        after = page["last"]
    return found


def age(database: Database, session_id: str, days: int) -> None:
    database.connection.execute(
        "update public.interview_events set received_at = received_at - make_interval(days => %s),"
        " applied_at = applied_at - make_interval(days => %s) where session_id = %s",
        (days, days, session_id),
    )


def purge(database: Database) -> int:
    return int(database.one("select public.purge_interview_events('30 days') as n")["n"])


def interviews(workers: Workers, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(CLI), *arguments], env=workers.environment, capture_output=True, text=True, check=False)


def test_the_timeline_tells_the_events_in_the_order_in_which_they_happened(
    database: Database, story: list[dict[str, Any]]
) -> None:
    told = database.all("select event_id::text from public.get_interview_timeline(%s)", story[0]["subject"])
    assert [row["event_id"] for row in told] == [each["id"] for each in story]


def test_an_audit_finds_nothing_in_rows_that_only_events_made(database: Database, story: list[dict[str, Any]]) -> None:
    assert verified(database, story[0]["subject"]) == {}


@pytest.mark.parametrize(
    ("column", "value", "kind"),
    [
        ("questions_answered", 4, "behind"),
        ("questions_answered", 6, "ahead"),
        ("duration_minutes", 4, "behind"),
        ("duration_minutes", 6, "ahead"),
        ("total_questions", None, "behind"),
        ("total_questions", 6, "ahead"),
        ("email", "b@example.com", "behind"),
        ("resume_filename", "cv.pdf", "behind"),
        ("job_description_filename", "job.txt", "behind"),
        ("score", 1, "behind"),
        ("score", None, "behind"),
        ("feedback", json.dumps({"a": "c"}), "behind"),
        ("created_at", "2026-11-23T10:00:01Z", "behind"),
        ("created_at", "2026-11-23T09:59:59Z", "ahead"),
        ("completed_at", "2026-11-23T10:29:59Z", "behind"),
        ("completed_at", "2026-11-23T10:30:01Z", "ahead"),
    ],
)
def test_an_audit_finds_an_edited_row_and_a_rebuild_restores_it(
    database: Database, story: list[dict[str, Any]], column: str, value: object, kind: str
) -> None:
    session_id = story[0]["subject"]
    before = database.session(session_id)
    database.connection.execute(
        f"update public.interview_sessions set {column} = %s where session_id = %s",
        (value, session_id),
    )
    assert verified(database, session_id) == {kind: [column]}
    if kind == "ahead":
        with pytest.raises(psycopg.Error, match="says more than its ledger"):
            database.one("select public.rebuild_interview_session(%s) as s", session_id)
    database.one("select public.rebuild_interview_session(%s, p_force => %s) as s", session_id, kind == "ahead")
    assert database.session(session_id) == before
    assert verified(database, session_id) == {}


def test_a_row_set_back_in_its_status_is_found_and_restored(database: Database, story: list[dict[str, Any]]) -> None:
    session_id = story[0]["subject"]
    before = database.session(session_id)
    database.connection.execute(
        "update public.interview_sessions set interview_status = 'cancelled' where session_id = %s", (session_id,)
    )
    assert verified(database, session_id) == {"behind": ["completed_at", "interview_status"]}
    database.one("select public.rebuild_interview_session(%s) as s", session_id)
    assert database.session(session_id) == before


def test_a_lost_row_is_rebuilt_whole(database: Database, story: list[dict[str, Any]]) -> None:
    session_id = story[0]["subject"]
    before = database.session(session_id)
    with database.connection.transaction():  # lost as no delete would: past the trigger
        database.connection.execute("set local session_replication_role = replica")
        database.connection.execute("delete from public.interview_sessions where session_id = %s", (session_id,))
    assert database.session(session_id) is None
    database.one("select public.rebuild_interview_session(%s) as s", session_id)
    assert database.session(session_id) == before


def test_a_session_made_by_a_person_is_unfounded_and_not_rebuilt(database: Database, user: uuid.UUID) -> None:
    session_id = f"session-{uuid.uuid4()}"
    database.one("select public.create_interview_session(%s, 'a@example.com', %s, null, null) as s", user, session_id)
    before = database.session(session_id)
    assert verified(database, session_id) == {"unfounded": []}
    with pytest.raises(Exception, match="does not hold the start"):
        database.one("select public.rebuild_interview_session(%s) as s", session_id)
    assert database.session(session_id) == before


def test_events_that_wait_beside_a_row_are_found_and_a_rebuild_applies_them(
    database: Database, user: uuid.UUID
) -> None:
    session_id = f"session-{uuid.uuid4()}"
    database.apply(event("started", session_id, user_id=str(user), email="a@example.com"))
    database.apply(event("answered", session_id, questions_answered=3))
    database.connection.execute(
        "update public.interview_events set applied_at = null where session_id = %s and type = 'interview.answered'",
        (session_id,),
    )
    assert verified(database, session_id) == {"waiting": []}
    database.one("select public.rebuild_interview_session(%s) as s", session_id)
    assert verified(database, session_id) == {}


def test_a_purge_takes_the_ledger_of_sessions_that_ended_long_ago_and_leaves_their_rows(
    database: Database, story: list[dict[str, Any]]
) -> None:
    session_id = story[0]["subject"]
    before = database.session(session_id)
    assert purge(database) == 0
    age(database, session_id, 31)
    assert purge(database) == len(story)
    assert purge(database) == 0
    assert database.ledger(session_id) == []
    assert database.session(session_id) == before


def test_events_that_come_again_after_a_purge_change_nothing(database: Database, story: list[dict[str, Any]]) -> None:
    session_id = story[0]["subject"]
    before = database.session(session_id)
    age(database, session_id, 31)
    purge(database)
    database.apply(*story)
    assert database.session(session_id) == before


def test_what_comes_again_after_a_purge_does_not_let_a_rebuild_destroy_the_row(
    database: Database, story: list[dict[str, Any]]
) -> None:
    session_id = story[0]["subject"]
    before = database.session(session_id)
    age(database, session_id, 31)
    purge(database)
    database.apply(story[0])
    with pytest.raises(psycopg.Error, match="says more than its ledger"):
        database.one("select public.rebuild_interview_session(%s) as s", session_id)
    assert database.session(session_id) == before


def test_a_purge_leaves_what_is_in_progress_what_waits_and_what_is_recent(database: Database, user: uuid.UUID) -> None:
    going, early, recent = (f"{name}-{uuid.uuid4()}" for name in ("going", "early", "recent"))
    for session_id in (going, recent):
        database.apply(event("started", session_id, user_id=str(user), email="a@example.com"))
    database.apply(event("answered", early, questions_answered=1))
    database.apply(event("finished", recent, score=1))
    for session_id in (going, early, recent):
        age(database, session_id, 31)
    database.apply(event("finished", recent, score=2))  # a score revised today
    assert purge(database) == 0


def test_the_schedule_expires_and_purges_through_a_worker(
    workers: Workers, database: Database, story: list[dict[str, Any]]
) -> None:
    orphan = f"orphan-{uuid.uuid4()}"
    database.apply(event("answered", orphan, questions_answered=1))
    age(database, orphan, 2)
    age(database, story[0]["subject"], 31)
    schedule = make_app(load_settings()).conf.beat_schedule
    assert {entry["task"] for entry in schedule.values()} == {"interview.expire_waiting", "interview.purge"}

    with workers.running(INTERVIEW_KEEP_LEDGER_DAYS="30") as worker:
        app = make_app(load_settings())
        for entry in schedule.values():
            app.send_task(entry["task"])
        wait_until(lambda: len(database.dead_letters(orphan)) == 1, "the orphan is a dead letter")
        wait_until(lambda: database.ledger(story[0]["subject"]) == [], "the ledger is purged")
        assert workers.stop(worker) == 0
    app.close()
    assert database.dead_letters(orphan)[0]["reason"] == "orphaned"


def test_verify_says_which_rows_to_rebuild_and_rebuild_says_what_changed(
    workers: Workers, database: Database, story: list[dict[str, Any]]
) -> None:
    session_id = story[0]["subject"]
    database.connection.execute("update public.interview_sessions set score = 1 where session_id = %s", (session_id,))
    found = interviews(workers, "verify")
    assert found.returncode == 3
    assert f"{session_id}: behind score" in found.stdout
    assert "interviews session rebuild" in found.stdout
    listed = json.loads(interviews(workers, "verify", "--json").stdout)["found"]
    assert {"session_id": session_id, "kind": "behind", "columns": ["score"]} in listed

    restored = interviews(workers, "session", "rebuild", session_id)
    assert restored.returncode == 0
    assert "score: 1 -> 85.5" in restored.stdout
    assert not [each for each in _behind(workers) if each["session_id"] == session_id]
    assert "it was as its ledger says" in interviews(workers, "session", "rebuild", session_id).stdout


def test_session_show_tells_the_row_and_its_story(workers: Workers, story: list[dict[str, Any]]) -> None:
    shown = interviews(workers, "session", "show", story[0]["subject"])
    assert shown.returncode == 0
    assert "interview_status           completed" in shown.stdout
    assert re.findall(r"^2026-\S+ \S+ .* (started|answered|finished) ", shown.stdout, re.MULTILINE) == [
        "started",
        "answered",
        "finished",
    ]


@pytest.mark.parametrize("command", ["show", "rebuild"])
def test_a_session_nobody_knows_is_one_line_and_status_1(workers: Workers, command: str) -> None:
    answer = interviews(workers, "session", command, "nobody")
    assert answer.returncode == 1
    assert len(answer.stderr.splitlines()) == 1
    assert "nobody" in answer.stderr


def _behind(workers: Workers) -> list[dict[str, Any]]:
    found = json.loads(interviews(workers, "verify", "--json").stdout)["found"]
    return [each for each in found if each["kind"] == "behind"]
