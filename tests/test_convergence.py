"""The universal promise: the same events in any order, any number of times, in any packs, leave the same row.

HYPOTHESIS_PROFILE=long looks ten times as far.
"""

import json
import uuid
from dataclasses import dataclass
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.database import Database, event
from tests.hypothesis_profiles import PROFILE
from tests.oracle import comparable, expected_row

SESSIONS = 3
TIMES = [f"2026-11-23T10:{minute:02}:00Z" for minute in range(4)]  # few, so that ties are common

numbers = st.integers(0, 9)
names = st.sampled_from(["a", "b", "c"])
maybe_number = st.none() | numbers
maybe_name = st.none() | names
progress = {"questions_answered": maybe_number, "duration_minutes": maybe_number}

DATA = {
    "started": st.fixed_dictionaries(
        {"email": names},
        optional={
            "resume_filename": maybe_name,
            "job_description_filename": maybe_name,
            "total_questions": maybe_number,
        },
    ),
    "answered": st.fixed_dictionaries(
        {"questions_answered": numbers},
        optional={"duration_minutes": maybe_number, "total_questions": maybe_number},
    ),
    "finished": st.fixed_dictionaries(
        {},
        optional=progress
        | {
            "total_questions": maybe_number,
            "score": st.none() | st.sampled_from([0, 12.25, 85.5, 100]),
            "feedback": st.none() | st.dictionaries(names, names | st.none(), max_size=2),
        },
    ),
    "cancelled": st.fixed_dictionaries({}, optional=progress | {"reason": maybe_name}),
}


@dataclass(frozen=True)
class Draft:
    """An event without what must be fresh in each run: its session's name, its user and half of its id."""

    session: int
    rank: int  # the upper half of the id: decides ties
    kind: str
    time: str
    data: dict[str, Any]


def draft_of(kind: str, sessions: int) -> st.SearchStrategy[Draft]:
    return st.builds(
        Draft,
        session=st.integers(0, sessions - 1),
        rank=st.integers(0, 2**64 - 1),
        kind=st.just(kind),
        time=st.sampled_from(TIMES),
        data=DATA[kind],
    )


def drafts(sessions: int) -> st.SearchStrategy[list[Draft]]:
    kinds = st.sampled_from([*DATA, "started", "finished"])  # the two with most rules come more often
    draft = kinds.flatmap(lambda kind: draft_of(kind, sessions))
    return st.lists(draft, min_size=1, max_size=16, unique_by=lambda each: each.rank)


@st.composite
def deliveries(draw: st.DrawFn) -> tuple[list[Draft], list[list[int]]]:
    """Events, and packs of their numbers: each at least once, some repeatedly, in any order."""
    events = draw(st.integers(1, SESSIONS).flatmap(drafts))
    every = range(len(events))
    order = draw(st.permutations([*every, *draw(st.lists(st.sampled_from(every), max_size=6))]))
    packs: list[list[int]] = [[]]
    for number in order:
        if draw(st.booleans()):
            packs.append([])
        packs[-1].append(number)
    return events, [pack for pack in packs if pack]


def fresh(events: list[Draft], users: list[uuid.UUID]) -> list[dict[str, Any]]:
    """The events under names and ids that no other run has seen; a session is always the same user's."""
    run = uuid.uuid4()
    return [
        event(
            draft.kind,
            f"{draft.session}-{run}",
            time=draft.time,
            event_id=uuid.UUID(int=draft.rank << 64 | run.int >> 64),
            **draft.data | ({"user_id": str(users[draft.session])} if draft.kind == "started" else {}),
        )
        for draft in events
    ]


@PROFILE
@given(delivery=deliveries())
def test_any_order_any_repetition_and_any_split_into_packs_leave_the_same_row(
    database: Database, delivery: tuple[list[Draft], list[list[int]]]
) -> None:
    drafted, packs = delivery
    events = fresh(drafted, [database.create_user() for _ in range(SESSIONS)])

    outcomes = [outcome for pack in packs for outcome in database.apply(*(events[number] for number in pack))]

    assert set(outcomes) <= {"applied", "waiting", "duplicate"}
    assert len(outcomes) - outcomes.count("duplicate") == len(events)
    for session_id in {each["subject"] for each in events}:
        story = [each for each in events if each["subject"] == session_id]
        row = expected_row(story)
        assert comparable(database.session(session_id)) == row
        ledger = [(str(kept["event_id"]), kept["applied_at"] is not None) for kept in database.ledger(session_id)]
        assert sorted(ledger) == sorted((each["id"], row is not None) for each in story)
        assert database.dead_letters(session_id) == []


def call_rpcs(database: Database, told: dict[str, Any]) -> None:
    """What a person's front end would call, at the event's time."""
    session_id, data, time = told["subject"], told["data"], told["time"]
    progress = [data.get(name) for name in ("questions_answered", "duration_minutes", "total_questions")]
    match told["type"].removeprefix("interview."):
        case "started":
            names = [data.get(name) for name in ("resume_filename", "job_description_filename", "total_questions")]
            database.one(
                "select public.create_interview_session(%s, %s, %s, %s, %s, %s, %s)",
                *(data["user_id"], data["email"], session_id, *names, time),
            )
        case "finished":
            feedback = json.dumps(data["feedback"]) if data.get("feedback") is not None else None
            database.one(
                "select public.complete_interview(%s, %s::numeric, %s, %s)",
                session_id,
                data.get("score"),
                feedback,
                time,
            )
        case "cancelled":
            database.one("select public.cancel_interview(%s, %s)", session_id, data.get("reason"))
    if any(number is not None for number in progress):
        database.one("select public.update_interview_progress(%s, %s, %s, %s)", session_id, *progress)


@PROFILE
@given(delivery=deliveries())
def test_the_rpcs_called_one_by_one_leave_the_row_that_the_events_leave(
    database: Database, delivery: tuple[list[Draft], list[list[int]]]
) -> None:
    events = fresh(delivery[0], [database.create_user() for _ in range(SESSIONS)])
    for session_id in {each["subject"] for each in events}:
        untied = {each["time"]: each for each in events if each["subject"] == session_id}  # people have no event ids
        story = sorted(untied.values(), key=lambda each: each["type"] != "interview.started")  # else as it was drawn
        if story[0]["type"] == "interview.started":
            for each in story:
                call_rpcs(database, each)
            assert comparable(database.session(session_id)) == expected_row(story)
