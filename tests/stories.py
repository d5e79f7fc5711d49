"""Interviews to publish by the thousand, and what must have become of them."""

import json
import random
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from tests.database import Database, event
from tests.oracle import comparable, expected_row

Event = dict[str, Any]

EMAIL: Final = "ada@example.com"
RESUME: Final = "cv-of-ada-lovelace.pdf"
JOB_DESCRIPTION: Final = "keeper-of-the-analytical-engine.pdf"
FEEDBACK: Final = "Speaks clearly, hesitates on recursion"
REASON: Final = "Called away to a sick child"
# What the stories tell about a person, by its kind; no log may tell it (see Leaks in conftest).
PERSONAL: Final = {
    "an e-mail address": "@example.com",  # of any test
    "a file name": RESUME,
    "the file name of a job description": JOB_DESCRIPTION,
    "feedback": FEEDBACK,
    "a reason": REASON,
}


def interview(user: uuid.UUID, rng: random.Random, *, events: int = 10) -> list[Event]:
    """One interview in the order in which it happened: a start, answers, and a finish, a cancel or neither."""
    session_id = f"session-{uuid.UUID(int=rng.getrandbits(128))}"

    def at(minute: int) -> dict[str, Any]:
        return {
            "time": f"2026-11-23T{10 + minute // 60:02}:{minute % 60:02}:00Z",
            "event_id": uuid.UUID(int=rng.getrandbits(128), version=4),
        }

    answers = events - 2
    names: dict[str, Any] = {"email": EMAIL, "resume_filename": RESUME, "job_description_filename": JOB_DESCRIPTION}
    story = [event("started", session_id, **at(0), user_id=str(user), **names, total_questions=answers)]
    story += [
        event("answered", session_id, **at(3 * n), questions_answered=n, duration_minutes=3 * n)
        for n in range(1, answers + 1)
    ]
    ending = rng.choice(["finished", "finished", "cancelled", "answered"])
    if ending == "finished":
        score = rng.randrange(101)
        feedback = {"overall_score": score, "notes": FEEDBACK}
        story.append(event("finished", session_id, **at(40), score=score, feedback=feedback))
    elif ending == "cancelled":
        story.append(event("cancelled", session_id, **at(40), reason=REASON))
    else:
        story.append(event("answered", session_id, **at(40), questions_answered=answers, duration_minutes=40))
    return story


def crowd(user: uuid.UUID, rng: random.Random, *, events: int) -> list[Event]:
    """Interviews of ten events each, one after the other."""
    return [each for _ in range(events // 10) for each in interview(user, rng)]


def encoded(events: Iterable[Mapping[str, Any]]) -> list[bytes]:
    return [json.dumps(each).encode() for each in events]


def shuffled_with_repeats(raw: list[bytes], rng: random.Random, *, share: float = 0.1) -> list[bytes]:
    repeated = raw + rng.sample(raw, int(len(raw) * share))
    rng.shuffle(repeated)
    return repeated


def chunks(raw: list[bytes], size: int) -> Iterator[list[bytes]]:
    for start in range(0, len(raw), size):
        yield raw[start : start + size]


def wrong_rows(database: Database, events: Iterable[Event]) -> list[str]:
    """The sessions whose row is not what their events tell."""
    stories: dict[str, list[Event]] = {}
    for each in events:
        stories.setdefault(each["subject"], []).append(each)
    rows = {
        row["s"]["session_id"]: row["s"]
        for row in database.all(
            "select to_jsonb(s) - 'id' as s from public.interview_sessions s where session_id = any (%s)", list(stories)
        )
    }
    return [each for each in stories if comparable(rows.get(each)) != expected_row(stories[each])]


def assert_rows_equal_their_stories(database: Database, events: Iterable[Event]) -> None:
    """Every session's row is what its events tell, and the ledger has each event once, applied."""
    events = list(events)
    assert wrong_rows(database, events) == []
    ledger = database.all(
        "select event_id::text as id, applied_at from public.interview_events where session_id = any (%s)",
        list({each["subject"] for each in events}),
    )
    assert sorted(row["id"] for row in ledger) == sorted({each["id"] for each in events})
    assert [row for row in ledger if row["applied_at"] is None] == []
