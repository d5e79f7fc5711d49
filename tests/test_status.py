"""`interviews status`: one look, and look after look."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.database import Database, event
from tests.stories import encoded
from tests.worker_process import PATIENCE_SECONDS, Workers, wait_until
from worker import database as supabase
from worker.cli.main import interviews
from worker.dlq import DeadLetters
from worker.embedded import Stack
from worker.settings import load_settings

WATCH = [str(Path(sys.executable).parent / "interviews"), "status", "--watch", "--interval", "0.1"]


def look(*options: str) -> Result:
    return CliRunner().invoke(interviews, ["status", *options])


@contextmanager
def watched(workers: Workers, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The command on a terminal, and a file that fills with what the terminal is sent."""
    leader, follower = pty.openpty()
    screen = tmp_path / "screen"
    with screen.open("wb") as output:
        copy = subprocess.Popen(["cat"], stdin=leader, stdout=output, stderr=subprocess.DEVNULL)
    environment = {**os.environ, **workers.environment, "TERM": "xterm", "COLUMNS": "80"}
    command = subprocess.Popen(WATCH, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    os.close(leader)
    try:
        yield command, screen
    finally:
        command.kill()
        command.wait()
        copy.wait()


def test_a_watch_shows_what_changes_and_ends_at_ctrl_c_with_the_status_of_its_last_look(
    workers: Workers, tmp_path: Path
) -> None:
    with watched(workers, tmp_path) as (command, screen):
        wait_until(lambda: screen.read_bytes().count(b"Ctrl-C ends") > 2, "it has looked more than once")
        assert b"0 events, 0 of them claimed" in screen.read_bytes()
        workers.stream.add([b"one", b"two"])
        wait_until(lambda: b"2 events, 0 of them claimed" in screen.read_bytes(), "it shows two events")
        command.send_signal(signal.SIGINT)
        status = command.wait(PATIENCE_SECONDS)
    assert status == look().exit_code
    assert b"Traceback" not in screen.read_bytes()


def test_a_watch_outlives_redis(workers: Workers, stack: Stack, tmp_path: Path) -> None:
    with watched(workers, tmp_path) as (command, screen):
        wait_until(lambda: b"Ctrl-C ends" in screen.read_bytes(), "it has looked")
        stack.redis.stop()
        try:
            wait_until(lambda: b"bring Redis back" in screen.read_bytes(), "it says that Redis is away")
        finally:
            stack.redis.start()
        seen = screen.read_bytes().count(b"of them claimed")
        wait_until(lambda: screen.read_bytes().count(b"of them claimed") > seen, "it shows the stream again")
        command.send_signal(signal.SIGINT)
        assert command.wait(PATIENCE_SECONDS) in {0, 3}


def test_a_watch_for_a_program_is_refused(workers: Workers) -> None:
    done = look("--watch", "--json")
    assert done.exit_code == 2
    assert "--watch is for a person" in done.output


def test_dead_letters_are_told_by_reason(workers: Workers, database: Database) -> None:
    def told() -> dict[str, int]:
        reasons: dict[str, int] = json.loads(look("--json").output)["dead_letters_by_reason"]
        return reasons

    before = told()
    nobody = [event("started", f"by-reason-{n}", user_id=str(uuid.uuid4()), email="e@example.com") for n in range(3)]
    database.apply(*nobody)
    after = told()
    assert after["unknown_user"] == before.get("unknown_user", 0) + len(nobody)
    done = look()
    assert f"{after['unknown_user']} unknown_user" in done.output
    assert done.exit_code == 3


def test_count_after_count_is_answered_on_a_connection_that_rests_in_between(workers: Workers) -> None:
    counts = set()
    with closing(supabase.Database(load_settings())) as kept:
        letters = DeadLetters(kept)
        for _ in range(40):  # where they were counted by HEAD, most of these looks found Supabase ill
            counts.add((kept.count_waiting(), kept.count("interview_events"), str(letters.counts())))
            time.sleep(0.02)
    assert len(counts) == 1


@pytest.mark.parametrize("count", [0, 90])
def test_the_last_minute_is_told_as_a_rate(workers: Workers, database: Database, count: int) -> None:
    user = database.create_user()
    started = event("started", f"rate-{user}", user_id=str(user), email="e@example.com")
    answers = [event("answered", f"rate-{user}", questions_answered=n) for n in range(count and count - 1)]
    with workers.running() as worker:
        workers.stream.add(encoded([started, *answers][:count]))
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    told = look().output
    assert ("1.5 events/s: " if count else "no events") in told


def test_a_redis_that_is_nearly_full_needs_a_person(workers: Workers) -> None:
    used = workers.client.info("memory")["used_memory"]
    workers.client.config_set("maxmemory", int(used * 1.05))
    try:
        done = look()
    finally:
        workers.client.config_set("maxmemory", 0)
    assert "Redis is nearly full" in " ".join(done.output.split())
    assert done.exit_code == 3
    assert "Redis is nearly full" not in " ".join(look().output.split())
