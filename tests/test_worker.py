"""The main job, from the stream to the rows, by real workers on real servers."""

import json
import os
import random
import threading
import uuid

import psutil
import pytest

from tests.database import Database, event
from tests.stories import assert_rows_equal_their_stories, chunks, crowd, encoded, shuffled_with_repeats
from tests.worker_process import Workers, wait_until
from worker.dead_letters import original_bytes
from worker.embedded import Stack

OUTAGE_SECONDS = float(os.environ.get("INTERVIEW_TEST_OUTAGE_SECONDS", "5"))


@pytest.fixture(autouse=True)
def _no_letters_of_others(database: Database) -> None:
    database.connection.execute("truncate public.interview_dead_letters")


def letters(database: Database) -> list[tuple[str, bytes]]:
    found = database.all("select reason, event from public.interview_dead_letters order by id")
    return sorted((row["reason"], original_bytes(row["event"])) for row in found)


def test_ten_thousand_events_in_random_order_with_repeats_tell_their_stories(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    events = crowd(user, rng, events=10_000)
    nobody = event("started", "unknown", user_id=str(uuid.uuid4()), email="e@example.com")
    bad = {
        b'{"specversion": "1.0", "id"': "invalid_json",
        b"\xff\xfe not text": "invalid_json",
        json.dumps(event("answered", "a", questions_answered=-1)).encode(): "invalid_event",
        json.dumps(event("paused", "a")).encode(): "unsupported_type",
        json.dumps(event("finished", "a", feedback={"text": "x" * 262_144})).encode(): "too_large",
    }
    for chunk in chunks(shuffled_with_repeats([*encoded([*events, nobody]), *bad], rng), 1000):
        workers.stream.add(chunk)

    with workers.running() as worker:
        workers.wait_until_empty()
        assert workers.stop(worker) == 0

    assert_rows_equal_their_stories(database, events)
    found = letters(database)
    assert [each for each in found if each[0] != "unknown_user"] == sorted((reason, raw) for raw, reason in bad.items())
    assert [json.loads(raw) for reason, raw in found if reason == "unknown_user"] == [nobody]


def test_a_worker_killed_again_and_again_loses_nothing(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    kills = 5
    events = crowd(user, rng, events=10_000)
    raw = shuffled_with_repeats(encoded(events), rng)

    def publish() -> None:
        for chunk in chunks(raw, 50):
            workers.stream.add(chunk)

    publisher = threading.Thread(target=publish)
    publisher.start()
    left_claimed = []
    for _ in range(kills):
        with workers.running() as worker:
            wait_for_progress(workers, database)
            for process in [*psutil.Process(worker.pid).children(), worker]:  # at one moment, as when a machine dies
                process.kill()
            worker.wait()
        left_claimed.append(workers.stream.state().pending)
    publisher.join()
    assert max(left_claimed) > 0  # the kills hit work under way

    with workers.running() as worker:
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    assert_rows_equal_their_stories(database, events)
    assert letters(database) == []


def wait_for_progress(workers: Workers, database: Database) -> None:
    before = applied(database)
    wait_until(lambda: applied(database) > before or workers.stream.state().length == 0, "some more are applied")


def applied(database: Database) -> int:
    return int(database.one("select count(*) as n from public.interview_events where applied_at is not null")["n"])


def test_an_outage_of_supabase_leaves_no_dead_letter_and_two_log_lines(
    workers: Workers, stack: Stack, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    events = crowd(user, rng, events=2_000)
    raw = encoded(events)
    outage = threading.Event()
    with workers.running() as worker:
        workers.stream.add(raw[:500])
        workers.wait_until_empty()

        stack.postgrest.stop()
        try:
            workers.stream.add(raw[500:1000])
            wait_until(lambda: workers.hold() is not None, "a hold is in force")
            for chunk in chunks(raw[1000:], 50):  # events come in all the while
                workers.stream.add(chunk)
                outage.wait(OUTAGE_SECONDS * 50 / len(raw[1000:]))
            assert workers.hold() is not None
            assert workers.stream.state().length == 1500
        finally:
            stack.postgrest.start()

        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    assert_rows_equal_their_stories(database, events)
    assert letters(database) == []
    assert len(workers.logged("hold.began")) == 1
    assert len(workers.logged("hold.ended")) == 1
    assert workers.logged("drain.reclaimed") == []  # the claims were kept fresh


def test_sigterm_drains_and_leaves_nothing_claimed(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    events = crowd(user, rng, events=10_000)
    for chunk in chunks(encoded(events), 1000):
        workers.stream.add(chunk)
    with workers.running(INTERVIEW_RECLAIM_SECONDS="60") as worker:
        wait_for_progress(workers, database)
        assert workers.stop(worker) == 0
    assert workers.stream.state().length > 0
    assert workers.stream.state().pending == 0
    with workers.running() as worker:
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    assert_rows_equal_their_stories(database, events)


def test_a_worker_goes_on_after_redis_restarted(
    workers: Workers, stack: Stack, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    events = crowd(user, rng, events=1_000)
    raw = encoded(events)
    with workers.running() as worker:
        workers.stream.add(raw[:500])
        workers.wait_until_empty()
        stack.redis.stop()
        stack.redis.start()
        workers.stream.add(raw[500:])
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    assert_rows_equal_their_stories(database, events)


def test_an_event_on_which_the_whole_call_fails_is_found_by_halving(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    events = crowd(user, rng, events=100)
    guilty = event("answered", "guilty", questions_answered=1)
    raw = encoded([*events, guilty])
    rng.shuffle(raw)
    database.connection.execute("""
        create function public.fail_on_guilty() returns trigger language plpgsql as $$
        begin
          raise exception using errcode = '57014';  -- as a statement timeout would, and past the SQL's own halving
        end $$;
        create trigger fail_on_guilty before insert on public.interview_events
          for each row when (new.session_id = 'guilty') execute function public.fail_on_guilty();
    """)
    try:
        with workers.running() as worker:
            workers.stream.add(raw)
            workers.wait_until_empty()
            assert workers.stop(worker) == 0
    finally:
        database.connection.execute("drop function public.fail_on_guilty() cascade")
    assert_rows_equal_their_stories(database, events)
    assert letters(database) == [("rejected", json.dumps(guilty).encode())]
    (told,) = database.dead_letters("guilty")
    assert "57014" in told["detail"]


def test_an_event_that_kills_its_process_again_and_again_is_poison_and_hurts_no_other(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    events = crowd(user, rng, events=50)
    deadly = event("answered", "deadly", questions_answered=1)
    raw = encoded([*events, deadly])
    rng.shuffle(raw)
    workers.stream.add(raw)
    with workers.running(app="tests.deadly_worker", INTERVIEW_RECLAIM_SECONDS="2.5") as worker:
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    assert_rows_equal_their_stories(database, events)
    assert letters(database) == [("poison", json.dumps(deadly).encode())]


def test_a_stream_entry_without_an_event_is_kept_as_a_dead_letter(workers: Workers, database: Database) -> None:
    workers.client.xadd("interview:events", {"evnet": "a typo", "n": "1"})
    with workers.running() as worker:
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    ((reason, raw),) = letters(database)
    assert reason == "invalid_event"
    assert json.loads(raw) == {"evnet": "a typo", "n": "1"}


def test_two_workers_share_the_work_and_apply_each_event_once(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    events = crowd(user, rng, events=5_000)
    with workers.running("--hostname=a@%h") as one, workers.running("--hostname=b@%h") as two:
        for chunk in chunks(shuffled_with_repeats(encoded(events), rng), 500):
            workers.stream.add(chunk)
        workers.wait_until_empty()
        assert [workers.stop(one), workers.stop(two)] == [0, 0]
    assert_rows_equal_their_stories(database, events)
