"""An engine that is newer than its workers: what it says more than they know is left out, and the rest is applied."""

import json
import random
import uuid
from typing import Final

from tests.database import Database, event
from tests.stories import Event, assert_rows_equal_their_stories, chunks, crowd, encoded, shuffled_with_repeats
from tests.worker_process import STREAM, Workers, wait_until
from worker.dead_letters import original_bytes

BAD: Final = {
    b'{"specversion": "1.0", "id"': "invalid_json",
    b"\xff\xfe not text": "invalid_json",
    json.dumps(event("answered", "a", questions_answered=-1)).encode(): "invalid_event",
    json.dumps(event("paused", "a")).encode(): "unsupported_type",
}


def of_a_later_contract(each: Event) -> Event:
    """With an attribute and data that no worker knows yet."""
    return each | {"dataschema": "https://engine.example/2", "data": each["data"] | {"mood": {"calm": 0.9}}}


def letters(database: Database) -> list[tuple[str, bytes]]:
    found = database.all("select reason, event from public.interview_dead_letters")
    return sorted((row["reason"], original_bytes(row["event"])) for row in found)


def test_workers_that_come_and_go_apply_a_newer_engines_events(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    """With bad events and repeats among them, and one of two workers stopped under load, as in a deployment."""
    database.connection.execute("truncate public.interview_dead_letters")
    events = crowd(user, rng, events=5_000)
    sent = [of_a_later_contract(each) if rng.random() < 0.1 else each for each in events]
    raw = shuffled_with_repeats([*encoded(sent), *BAD], rng)
    settings = {"INTERVIEW_LOG_LEVEL": "DEBUG", "INTERVIEW_PACK_SIZE": "20"}

    with (
        workers.running("--hostname=one@%h", **settings) as one,
        workers.running("--hostname=two@%h", **settings) as two,
    ):
        for chunk in chunks(raw[: len(raw) // 2], 100):
            workers.stream.add(chunk)
        wait_until(lambda: packs_applied(workers, 0) > 0 and packs_applied(workers, 1) > 0, "both apply packs")
        workers.stream.add(raw[len(raw) // 2 :])
        assert workers.stop(one) == 0
        workers.wait_until_empty()
        assert workers.stop(two) == 0

    assert_rows_equal_their_stories(database, events)
    assert letters(database) == sorted((reason, bad) for bad, reason in BAD.items())
    known = database.all("select payload ? 'mood' as known from public.interview_events where payload ? 'mood'")
    assert known == []  # what no worker knows of was left out, and the rest applied
    assert workers.client.xpending(STREAM, "workers")["pending"] == 0
    assert workers.hold() is None


def packs_applied(workers: Workers, number: int) -> int:
    """By the worker that was started as this one."""
    return (workers.folder / f"worker-{number}.log").read_bytes().count(b'"pack.applied"')
