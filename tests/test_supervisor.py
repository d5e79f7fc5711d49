"""A worker that stands still says so, and one that is told to end ends."""

import json
import random
import signal
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from tests.database import Database
from tests.stories import assert_rows_equal_their_stories, crowd, encoded
from tests.worker_process import Workers, hanging_supabase, wait_until
from worker.cli.main import interviews
from worker.embedded import Stack

Worker = subprocess.Popen[bytes]


@pytest.fixture
def heartbeat(tmp_path: Path) -> Path:
    return tmp_path / "heartbeat"


def wait_for_a_beat(heartbeat: Path) -> None:
    heartbeat.unlink(missing_ok=True)
    wait_until(heartbeat.exists, "the heartbeat file is touched")


def status() -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(interviews, ["status", "--json"])
    return done.exit_code, json.loads(done.output)


def states() -> list[str]:
    return [worker["state"] for worker in status()[1]["workers"]]


@contextmanager
def stopped_pool(worker: Worker) -> Iterator[list[psutil.Process]]:
    """The pool's processes stand still, as if each call hung for ever."""
    children = psutil.Process(worker.pid).children()
    assert children
    for child in children:
        child.send_signal(signal.SIGSTOP)
    yield children
    for child in children:
        if child.is_running():
            child.send_signal(signal.SIGCONT)


def test_the_heart_beats_while_redis_is_away_and_while_supabase_is(
    workers: Workers, stack: Stack, database: Database, user: uuid.UUID, rng: random.Random, heartbeat: Path
) -> None:
    events = crowd(user, rng, events=100)
    with workers.running(app="tests.hurt_worker", INTERVIEW_HEARTBEAT_FILE=str(heartbeat)) as worker:
        wait_for_a_beat(heartbeat)
        wait_until(lambda: states() == ["running"], "it tells its state")

        stack.redis.stop()
        wait_until(lambda: bool(workers.logged("dispatcher.redis_away")), "the worker misses Redis")
        wait_for_a_beat(heartbeat)
        stack.redis.start()

        stack.postgrest.stop()
        workers.stream.add(encoded(events))
        wait_until(lambda: states() == ["holding"], "the worker holds")
        wait_for_a_beat(heartbeat)
        stack.postgrest.start()

        workers.wait_until_empty()
        wait_until(lambda: states() == ["running"], "the worker goes on")
        assert workers.stop(worker) == 0
    assert states() == []
    assert workers.logged("worker.stalled") == []
    assert_rows_equal_their_stories(database, events)


def test_a_worker_whose_pool_stands_still_stalls_and_says_so_until_it_goes_on(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random, heartbeat: Path
) -> None:
    events = crowd(user, rng, events=2_000)
    quick = {"INTERVIEW_RPC_TIMEOUT_SECONDS": "0.2", "INTERVIEW_HEARTBEAT_FILE": str(heartbeat)}  # stalls after 2.4 s
    with workers.running(app="tests.hurt_worker", **quick) as worker:
        wait_for_a_beat(heartbeat)
        with stopped_pool(worker):
            workers.stream.add(encoded(events))
            wait_until(lambda: bool(workers.logged("worker.stalled")), "it says that it stalls")
            heartbeat.unlink(missing_ok=True)
            wait_until(lambda: states()[0].startswith("stalled: events wait"), "status says that it stalls")
            code, report = status()
            assert (code, "restart it" in str(report["problems"])) == (3, True)
            assert not heartbeat.exists()
        wait_until(heartbeat.exists, "the heart beats again")
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    assert_rows_equal_their_stories(database, events)


def test_a_dispatcher_that_dies_is_started_again(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    events = crowd(user, rng, events=100)
    workers.stream.add(encoded(events))
    with workers.running(app="tests.hurt_worker", HURT_DISPATCHER="1") as worker:
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    assert len(workers.logged("dispatcher.died")) == 1
    assert_rows_equal_their_stories(database, events)


def test_status_names_a_killed_worker_until_its_events_are_taken_over(
    workers: Workers, stack: Stack, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    events = crowd(user, rng, events=2_000)
    with hanging_supabase(stack) as settings, workers.running(**settings) as worker:
        workers.stream.add(encoded(events))
        wait_until(lambda: workers.stream.state().pending > 0, "it has claimed events")
        children = psutil.Process(worker.pid).children()
        worker.kill()
        worker.wait()
        for child in children:
            child.kill()
    workers.client.delete("interview:events:workers")  # as if it had been silent for a while
    workers.client.delete("interview:events:hold")
    assert states() == ["silent"]
    (silent,) = status()[1]["workers"]
    assert silent["claimed"] == workers.stream.state().pending
    with workers.running() as worker:
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    assert_rows_equal_their_stories(database, events)


def test_sigterm_ends_a_worker_whose_call_hangs(
    workers: Workers, stack: Stack, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    events = crowd(user, rng, events=1_000)
    with hanging_supabase(stack) as settings, workers.running(**settings) as worker:
        workers.stream.add(encoded(events))
        wait_until(lambda: workers.hold() is not None, "the first call has timed out")
        assert workers.stop(worker) == 0
    assert workers.stream.state().length == len(events)
    with workers.running() as worker:
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    assert_rows_equal_their_stories(database, events)


@pytest.mark.parametrize("signals", [1, 2], ids=["after its grace", "at the second SIGTERM"])
def test_a_worker_whose_pool_never_ends_is_cut_off(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random, signals: int
) -> None:
    events = crowd(user, rng, events=1_000)
    grace = {1: "3", 2: "3600"}[signals]
    with workers.running(INTERVIEW_GRACE_SECONDS=grace) as worker, stopped_pool(worker) as children:
        workers.stream.add(encoded(events))
        wait_until(lambda: workers.client.llen("interview") > 0, "the pool has its messages, and one more waits")
        worker.send_signal(signal.SIGTERM)
        if signals == 2:
            wait_until(lambda: not states() or states() == ["silent"], "it is stopping")
            worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 1
        wait_until(lambda: not any(child.is_running() for child in children), "its processes are gone")
    assert len(workers.logged("worker.ended_at_once")) == 1
    with workers.running() as worker:
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    assert_rows_equal_their_stories(database, events)
