"""`interviews session show`: a session's story as a person reads it."""

import json
import random
import uuid

import pytest
from click.testing import CliRunner

from tests.database import Database, event
from tests.stories import Event, interview
from tests.worker_process import Workers
from worker.cli.main import interviews
from worker.sessions import changes


def shown(session_id: str) -> str:
    done = CliRunner().invoke(interviews, ["session", "show", session_id], env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    return done.output


def test_what_the_events_changed_adds_up_to_the_row(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    for _ in range(20):
        story = interview(user, rng)
        database.apply(*shuffled(story, rng))
        session_id = story[0]["subject"]
        row = {"session_id": session_id, "questions_answered": 0, "duration_minutes": 0} | folded(database, session_id)
        stands = database.session(session_id)
        assert stands is not None
        assert dict.fromkeys(stands) | row == stands


def test_each_event_is_told_with_what_it_changed(workers: Workers, database: Database, user: uuid.UUID) -> None:
    session_id = f"shown-{user}"
    story = [
        event("started", session_id, time="2026-11-23T10:00:00Z", user_id=str(user), email="ada@example.com"),
        event("answered", session_id, time="2026-11-23T10:05:00Z", questions_answered=2),
        event("answered", session_id, time="2026-11-23T10:06:00Z", questions_answered=1),
        event("cancelled", session_id, time="2026-11-23T10:07:00Z", reason="called away"),
    ]
    database.apply(*reversed(story))
    lines = [line.split() for line in shown(session_id).splitlines()]
    assert ["nothing", "new"] in [line[-2:] for line in lines if "10:06:00" in line]
    told = " ".join(" ".join(line) for line in lines)
    for each in ("questions_answered 2", "in_progress -> cancelled", "(reason: called away)", "happened (UTC)"):
        assert each in told


def test_an_event_that_waits_is_told_to_wait(workers: Workers, database: Database) -> None:
    session_id = f"early-{uuid.uuid4()}"
    database.apply(event("answered", session_id, questions_answered=1))
    told = " ".join(shown(session_id).split())
    assert f"{session_id} has not started" in told
    assert "answered waiting nothing before its session starts" in told


def test_what_a_candidate_wrote_cannot_steer_the_terminal(
    workers: Workers, database: Database, user: uuid.UUID
) -> None:
    session_id = f"steering-{user}"
    start = event("started", session_id, user_id=str(user), email="e@example.com", resume_filename="\x1b[2Jcv.pdf")
    finish = event("finished", session_id, feedback={"text": "\x1b]0;gone\x07" + "x" * 1000})
    database.apply(start, finish)
    output = shown(session_id)
    assert "\\x1b[2Jcv.pdf" in output
    assert "\x1b" not in output
    assert "x" * 100 not in output  # shortened


def test_a_program_is_told_what_each_event_changed(workers: Workers, database: Database, user: uuid.UUID) -> None:
    session_id = f"program-{user}"
    start = event("started", session_id, time="2026-11-23T10:00:00Z", user_id=str(user), email="e@example.com")
    answers = [event("answered", session_id, time=f"2026-11-23T10:0{n}:00Z", questions_answered=n) for n in (1, 3)]
    database.apply(start, *answers)
    told = json.loads(CliRunner().invoke(interviews, ["session", "show", session_id, "--json"]).output)
    assert [each["changed"].get("questions_answered") for each in told["events"]] == [None, [None, 1], [1, 3]]


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_starts_and_two_finishes_at_one_time_the_story_tells_what_the_row_says(
    workers: Workers, database: Database, user: uuid.UUID, order: int
) -> None:
    session_id, time = f"twice-{user}", "2026-11-23T10:00:00Z"
    story = [
        *(event("started", session_id, time=time, user_id=str(user), email=f"{n}@example.com") for n in range(2)),
        *(event("finished", session_id, time=time, score=n) for n in (10, 20)),
        event("cancelled", session_id, time=time),
    ]
    database.apply(*story[::order])
    row = folded(database, session_id)
    stands = database.session(session_id)
    assert stands is not None
    assert row == {name: stands[name] for name in row}


def shuffled(story: list[Event], rng: random.Random) -> list[Event]:
    return rng.sample(story, len(story))


def folded(database: Database, session_id: str) -> dict[str, object]:
    """The columns that the session's events changed, as the last change left them."""
    timeline = database.one(
        "select jsonb_agg(to_jsonb(t)) as events from public.get_interview_timeline(%s) t", session_id
    )
    return {name: after for changed in changes(timeline["events"]) for name, (_, after) in changed.items()}
