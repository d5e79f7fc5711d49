"""The short answer that workers get says what the documented one says, and no foreign answer is taken for it."""

import json
import random
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg.rows import dict_row

from events import parse_event
from tests.database import Database, event
from tests.stories import crowd, encoded
from worker.database import Database as Supabase
from worker.database import PackResult
from worker.embedded import Stack
from worker.errors import Unavailable
from worker.settings import load_settings

Events = list[dict[str, Any]]

FOREIGN = [
    None,
    [],
    {},
    "applied",
    2,
    [{"outcome": "applied"}, {"outcome": "applied"}],
    {"received": 2},
    {"received": 2, "applied": 2},
    {"received": 2, "applied": 2, "others": None},
    {"received": 2, "applied": 2, "others": {}},
    {"received": 1, "applied": 1, "others": []},
    {"received": 3, "applied": 2, "others": []},
    {"received": 2, "applied": 1, "others": []},
    {"received": 2, "applied": 3, "others": []},
    {"received": 2, "applied": -1, "others": [{"outcome": "waiting"}] * 3},
    {"received": 2, "applied": "2", "others": []},
    {"received": 2.0, "applied": 2.0, "others": []},
    {"received": 2, "applied": 1, "others": [{}]},
    {"received": 2, "applied": 1, "others": [None]},
    {"received": 2, "applied": 1, "others": [{"outcome": "applied"}]},
    {"received": 2, "applied": 1, "others": [{"outcome": "busy by another name"}]},
    {"received": 2, "applied": 0, "others": [{"outcome": "duplicate"}]},
]


@pytest.fixture
def supabase(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supabase]:
    for name, value in stack.environment.items():
        monkeypatch.setenv(name, value)
    made = Supabase(load_settings())
    yield made
    made.close()


def some_pack(user: uuid.UUID, seed: int) -> Events:
    """Starts, repeats, events that wait, unknown users, foreign ids and bad payloads, in any order."""
    rng = random.Random(seed)
    story = crowd(user, rng, events=20)
    taken = str(uuid.UUID(int=rng.getrandbits(128)))
    pack = [
        *rng.sample(story, 12),
        *rng.choices(story, k=3),
        event("answered", f"nobody-{rng.random()}", questions_answered=1),
        event("started", f"stranger-{rng.random()}", user_id=str(uuid.UUID(int=7)), email="e@example.com"),
        event("answered", f"one-{rng.random()}", questions_answered=1) | {"id": taken},
        event("answered", f"two-{rng.random()}", questions_answered=1) | {"id": taken},
        event("answered", f"bad-{rng.random()}", questions_answered=-1),
    ]
    rng.shuffle(pack)
    return pack[: rng.randrange(len(pack) + 1)]


def call(database: Database, function: str, pack: Events) -> Any:
    """The answer, and everything undone."""
    query: Any = f"select public.{function}(%s) as answer"
    with database.connection.transaction(force_rollback=True):
        return database.one(query, json.dumps(pack))["answer"]


@given(seed=st.integers(min_value=0))
def test_the_summary_accounts_for_each_event_as_the_documented_answer_does(stack: Stack, seed: int) -> None:
    with psycopg.connect(stack.database_url, autocommit=True, row_factory=dict_row) as connection:
        database = Database(connection)
        pack = some_pack(database.create_user(), seed)
        answers = call(database, "apply_interview_events", pack)
        summary = call(database, "apply_interview_events_summary", pack)
    assert [each["id"] for each in answers] == [each["id"] for each in pack]
    assert summary == {
        "received": len(pack),
        "applied": sum(each["outcome"] == "applied" for each in answers),
        "others": [each for each in answers if each["outcome"] != "applied"],
    }


def test_a_pack_is_applied_and_accounted_for(supabase: Supabase, user: uuid.UUID) -> None:
    events = [parse_event(raw) for raw in encoded(crowd(user, random.Random(), events=20))]
    left: list[str] = []
    assert supabase.apply_pack(events, before_request=lambda: left.append("leaves")) == PackResult(20, [])
    assert left == ["leaves"]
    again = supabase.apply_pack(events)
    assert (again.applied, {each["outcome"] for each in again.others}, len(again.others)) == (0, {"duplicate"}, 20)
    assert supabase.apply_pack([]) == PackResult(0, [])


@pytest.mark.parametrize("answer", FOREIGN, ids=json.dumps)
def test_a_foreign_answer_is_never_taken_for_applied(
    supabase: Supabase, user: uuid.UUID, monkeypatch: pytest.MonkeyPatch, answer: object
) -> None:
    events = [parse_event(raw) for raw in encoded(crowd(user, random.Random(), events=10))[:2]]
    response = httpx.Response(200, json=answer, request=httpx.Request("POST", "http://127.0.0.1"))
    monkeypatch.setattr("worker.database._request", lambda *_: response)
    with pytest.raises(Unavailable):
        supabase.apply_pack(events)
