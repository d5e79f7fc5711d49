"""A bad deploy holds the workers rather than turn the whole stream into dead letters."""

import json
import random
import uuid

import pytest
from click.testing import CliRunner, Result

from tests.database import Database, event
from tests.stories import assert_rows_equal_their_stories, crowd, encoded
from tests.worker_process import STREAM, Workers, wait_until
from worker.cli.main import interviews
from worker.dead_share import DeadShare
from worker.errors import Misconfigured


@pytest.fixture
def share(workers: Workers) -> DeadShare:
    return DeadShare(workers.client, STREAM, limit=0.5, at_least=10)


def count(share: DeadShare, workers: Workers, pack: dict[str, int]) -> None:
    """As a worker does after it has acknowledged a pack."""
    with workers.client.pipeline(transaction=False) as pipeline:
        share.count(pipeline, pack)
        pipeline.execute()
    share.close_where_too_many(pack)


def holds(share: DeadShare) -> bool:
    try:
        share.check()
    except Misconfigured:
        return True
    return False


@pytest.mark.parametrize(
    ("packs", "held"),
    [
        ([{"invalid_event": 9}], False),  # too few to tell
        ([{"invalid_event": 10}], True),
        ([{"invalid_event": 5}, {"unknown_user": 5}], True),
        ([{"applied": 6, "duplicate": 2, "waiting": 3}, {"invalid_event": 10}], False),
        ([{"applied": 5, "duplicate": 2, "waiting": 3}, {"invalid_event": 10}], True),
        ([{"again": 1000}], False),  # replayed and dead as before: no news
        ([{"again": 1000}, {"invalid_event": 10}], True),
        ([{"invalid_event": 9}, {"applied": 100}, {"invalid_event": 1}], False),
    ],
)
def test_the_workers_hold_when_enough_events_and_too_large_a_share_of_them_died(
    workers: Workers, share: DeadShare, packs: list[dict[str, int]], held: bool
) -> None:
    for pack in packs:
        count(share, workers, pack)
    assert holds(share) is held


def test_a_limit_of_one_never_holds(workers: Workers) -> None:
    share = DeadShare(workers.client, STREAM, limit=1.0, at_least=1)
    count(share, workers, {"invalid_event": 1000})
    assert not holds(share)


def test_the_reason_names_the_numbers_and_the_most_frequent_reason(workers: Workers, share: DeadShare) -> None:
    count(share, workers, {"invalid_event": 3, "unknown_user": 8, "applied": 1})
    with pytest.raises(Misconfigured, match=r"11 of the last minute's 12 events .* 8 as unknown_user") as held:
        share.check()
    assert "interviews resume" in held.value.remedy


def test_resume_begins_to_count_anew(workers: Workers, share: DeadShare) -> None:
    count(share, workers, {"invalid_event": 10})
    assert share.resume()
    count(share, workers, {"invalid_event": 9})
    assert not holds(share)
    count(share, workers, {"invalid_event": 1})
    assert holds(share)


def test_failures_that_are_accepted_do_not_hold(workers: Workers, share: DeadShare) -> None:
    assert not share.resume(accept_seconds=60)
    count(share, workers, {"invalid_event": 1000})
    assert not holds(share)


def resumed(*options: str) -> Result:
    done = CliRunner().invoke(interviews, ["resume", *options])
    assert done.exit_code == 0
    return done


def letters(database: Database) -> int:
    return int(database.one("select count(*) as n from public.interview_dead_letters")["n"])


def test_after_a_bad_deploy_the_stream_waits_until_a_person_resumes(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    database.connection.execute("truncate public.interview_dead_letters")
    events = crowd(user, rng, events=500)
    bad = [json.dumps(event("paused", f"session_{n}")).encode() for n in range(5_000)]
    with workers.running(INTERVIEW_PACK_SIZE="500") as worker:
        workers.stream.add(bad)
        wait_until(lambda: workers.hold() is not None, "the workers hold")
        hold = workers.hold()
        assert hold is not None
        assert "unsupported_type" in hold.reason
        assert "interviews resume" in str(hold.remedy)
        shown = CliRunner().invoke(interviews, ["status"])
        assert (shown.exit_code, "interviews resume" in shown.output) == (3, True)
        assert 100 <= letters(database) < 3_000  # and a pack of each slot, and those at hand

        workers.stream.add(encoded(events))
        assert "the workers go on" in resumed("--accept", "1").output
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    assert letters(database) == 5_000
    assert_rows_equal_their_stories(database, events)


def test_a_replay_of_what_is_dead_as_before_does_not_hold(workers: Workers, database: Database) -> None:
    bad = [json.dumps(event("paused", f"session_{n}")).encode() for n in range(150)]
    with workers.running(INTERVIEW_DEAD_SHARE_LIMIT="1") as worker:
        workers.stream.add(bad)
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    workers.client.flushdb()
    with workers.running() as worker:
        workers.stream.add(bad)
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    assert "nothing to resume" in resumed().output
