"""Celery's own options and a hostile neighbourhood: events are applied, and the worker ends well."""

import random
import uuid

import pytest

from tests.database import Database
from tests.stories import assert_rows_equal_their_stories, chunks, crowd, encoded
from tests.worker_process import STREAM, Workers, wait_until


@pytest.mark.parametrize(
    "options",
    [["--autoscale=3,1"], ["--max-tasks-per-child=1"], ["--concurrency=1"], ["--pool=threads"], ["--pool=solo"]],
    ids=" ".join,
)
def test_a_worker_applies_events_with_any_option_of_celery(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random, options: list[str]
) -> None:
    events = crowd(user, rng, events=3_000)
    with workers.running(*options, INTERVIEW_PACK_SIZE="100") as worker:
        for chunk in chunks(encoded(events), 1000):
            workers.stream.add(chunk)
            workers.wait_until_empty()
        assert workers.stop(worker) == 0
    assert workers.stream.state().pending == 0
    assert_rows_equal_their_stories(database, events)


def test_a_turn_that_somebody_else_holds_for_ever_is_no_end(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    """A key without an end, where each dispatcher notes its turn for 50 ms."""
    events = crowd(user, rng, events=100)
    workers.client.set(f"{STREAM}:turn", "for ever")
    with workers.running() as worker:
        workers.stream.add(encoded(events))
        wait_until(lambda: workers.stream.state().length == 0, "the events are applied all the same")
        assert workers.stop(worker) == 0
    assert_rows_equal_their_stories(database, events)
