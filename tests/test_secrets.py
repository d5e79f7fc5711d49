"""Nobody reads in a log, a message or a terminal what belongs to a candidate, or what opens a door."""

import asyncio
import base64
import json
import os
import random
import socket
import subprocess
import sys
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

from events import Answered, AsyncPublisher, Publisher, PublishError
from tests.conftest import Leaks
from tests.database import Database, event
from tests.stories import (
    EMAIL,
    FEEDBACK,
    REASON,
    RESUME,
    assert_rows_equal_their_stories,
    crowd,
    encoded,
)
from tests.worker_process import QUICK, Workers, wait_until
from worker.app import make_app
from worker.database import Database as Supabase
from worker.embedded import Stack
from worker.errors import Misconfigured, Unavailable
from worker.settings import StreamSettings, load_settings
from worker.stream import EventStream, connect

BIN = Path(sys.executable).parent
PATIENCE_SECONDS = 60
WRONG_KEY = "sb_secret_which-is-of-another-project"
WRONG_PASSWORD = "which-is-of-another-redis"
NODE = "told@localhost"


@pytest.fixture(autouse=True)
def _no_letters_of_others(database: Database) -> None:
    database.connection.execute("truncate public.interview_dead_letters")


@pytest.fixture(autouse=True)
def _wrong_ones_are_secrets_too(leaks: Leaks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(leaks.forbidden, "a wrong key", WRONG_KEY)
    monkeypatch.setitem(leaks.forbidden, "a wrong password", WRONG_PASSWORD)


# ---------------------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize("spelling", ["plain", "base64", "quoted"])
@pytest.mark.parametrize("before", ["", "x", "xy"])
def test_a_leak_is_found_in_any_spelling_and_told_without_being_repeated(
    tmp_path: Path, spelling: str, before: str
) -> None:
    spell: dict[str, Callable[[str], str]] = {
        "plain": str,
        "base64": lambda text: base64.b64encode(text.encode()).decode(),
        "quoted": lambda text: quote(text, safe=""),
    }
    told = spell[spelling](f"{before}{EMAIL}, {FEEDBACK}: p@ss/word")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "worker-0.log").write_text(f"a line\n{told}\nanother")
    (tmp_path / "events.jsonl").write_text(EMAIL)  # no log
    leaks = Leaks()
    leaks.forbidden |= {"a password": "p@ss/word", "a key": "sb_secret_elsewhere"}

    found = leaks.in_folder(tmp_path)

    (tmp_path / "deep" / "worker-0.log").unlink()  # or the end of the run would find it
    assert found == [f"deep/worker-0.log holds {kind}" for kind in ("an e-mail address", "feedback", "a password")]


# ---------------------------------------------------------------------------------------------------------- logs


def test_a_worker_that_tells_all_it_can_tells_nothing_personal_and_no_secret(
    workers: Workers, stack: Stack, database: Database, user: uuid.UUID, rng: random.Random, leaks: Leaks
) -> None:
    """Good events, bad ones, refused ones, one that kills; a wrong key, an outage, a Redis that lets nobody in."""
    events = crowd(user, rng, events=150)
    nobody = event("started", "nobody", user_id=str(uuid.uuid4()), email=EMAIL, resume_filename=RESUME)
    guilty = event("cancelled", "guilty", reason=REASON)
    deadly = event("finished", "deadly", feedback={"notes": FEEDBACK})
    bad = [
        f'{{"data": {{"email": "{EMAIL}"'.encode(),
        b"\xff" + EMAIL.encode(),
        json.dumps(event("started", EMAIL, email=FEEDBACK, user_id=REASON, resume_filename=7)).encode(),
        json.dumps(event("finished", "bad", score=FEEDBACK, feedback={FEEDBACK: {REASON: "\0"}})).encode(),
        json.dumps(event("cancelled", "bad", time=EMAIL, reason=[REASON])).encode(),
        json.dumps(event(FEEDBACK, "bad")).encode(),
        json.dumps(event("finished", "bad", feedback={"notes": FEEDBACK * 10_000})).encode(),
    ]
    raw = [*encoded([*events, nobody, guilty, deadly]), *bad]
    rng.shuffle(raw)
    settings = {
        "INTERVIEW_LOG_LEVEL": "DEBUG",
        "INTERVIEW_RECLAIM_SECONDS": "1.5",
        "INTERVIEW_RPC_TIMEOUT_SECONDS": "1.2",
        "INTERVIEW_DEAD_SHARE_LIMIT": "1",
    }
    postgres_log = stack.folder / "log" / "postgres.log"

    with refusing(database, "guilty"):
        logged_before = postgres_log.stat().st_size
        with workers.running(SUPABASE_SECRET_KEY=WRONG_KEY, **settings) as worker:
            workers.stream.add(raw)
            wait_until(lambda: workers.hold() is not None, "a hold is in force")
            assert workers.stop(worker) == 0
        stack.postgrest.stop()
        with workers.running(app="tests.deadly_worker", **settings) as worker:
            try:
                wait_until(lambda: len(workers.logged("hold.began")) == 2, "the next hold has begun")
            finally:
                stack.postgrest.start()
            workers.wait_until_empty()
            with locked_out(workers):
                wait_until(lambda: bool(workers.logged("dispatcher.redis_away")), "Redis lets nobody in")
            wait_until(lambda: bool(workers.logged("dispatcher.resumed")), "Redis lets the worker in")
            workers.stream.add(encoded(events[:10]))
            workers.wait_until_empty()
            assert workers.stop(worker) == 0

    assert_rows_equal_their_stories(database, events)
    reasons = [row["reason"] for row in database.all("select reason from public.interview_dead_letters")]
    assert sorted(reasons) == sorted(
        [
            *["invalid_json"] * 2,
            *["invalid_event"] * 3,
            *("unsupported_type", "too_large", "unknown_user", "rejected", "poison"),
        ]
    )
    assert len(workers.logged("event.dead_lettered")) >= len(reasons)
    assert workers.logged("pack.applied")  # which only DEBUG tells
    assert leaks.in_folder(workers.folder) == []
    with postgres_log.open("rb") as log:  # Postgres tells of what we let it fail on
        log.seek(logged_before)
        assert leaks.in_text(log.read()) == []


@contextmanager
def refusing(database: Database, session_id: str) -> Iterator[None]:
    """The database fails on a whole call for one session's sake, as on a statement timeout."""
    database.connection.execute("""
        create function public.fail_on_guilty() returns trigger language plpgsql as $$
        begin
          raise exception using errcode = '57014', message = 'canceling statement due to statement timeout';
        end $$;
        create trigger fail_on_guilty before insert on public.interview_events
          for each row when (new.session_id = 'guilty') execute function public.fail_on_guilty();
    """)
    assert session_id == "guilty"
    try:
        yield
    finally:
        database.connection.execute("drop function public.fail_on_guilty() cascade")


@contextmanager
def locked_out(workers: Workers) -> Iterator[None]:
    """Redis has another password than the worker."""
    workers.client.config_set("requirepass", WRONG_PASSWORD)
    try:
        workers.client.client_kill_filter(_type="normal", skipme=True)
        yield
    finally:
        workers.client.config_set("requirepass", str(urlsplit(workers.environment["REDIS_URL"]).password))


# -------------------------------------------------------------------------------------------- an operator's terminal


@pytest.fixture
def learnt(stack: Stack, leaks: Leaks) -> Leaks:
    """The search, which knows the stack's secrets by now."""
    return leaks


@contextmanager
def node(workers: Workers, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A worker as an operator starts it in a terminal, its banner with its log."""
    with output.open("wb") as terminal:
        worker = subprocess.Popen(
            [BIN / "celery", "-A", "worker", "worker", "-n", NODE],
            env={**os.environ, **QUICK, **workers.environment},
            stdout=terminal,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_until(lambda: b"ready." in output.read_bytes(), "the worker is ready")
        yield worker
    finally:
        worker.kill()
        worker.wait()


def asked(workers: Workers, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / command[0], *command[1:]],
        env={**os.environ, **workers.environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )


@pytest.mark.parametrize("command", [("celery", "-A", "worker", "report"), ("interviews", "status")], ids=" ".join)
def test_what_tells_of_the_settings_shows_no_secret(workers: Workers, learnt: Leaks, command: tuple[str, ...]) -> None:
    done = asked(workers, *command)

    assert done.returncode == 0
    assert learnt.in_text(done.stdout + done.stderr) == []


def test_a_worker_shows_no_secret_and_nobodys_data_at_its_start_nor_when_it_is_asked(
    workers: Workers, stack: Stack, user: uuid.UUID, rng: random.Random, learnt: Leaks, tmp_path: Path
) -> None:
    terminal = tmp_path / "worker-of-an-operator.log"
    stack.postgrest.stop()
    try:
        with node(workers, terminal):
            workers.stream.add(encoded(crowd(user, rng, events=1_000)))
            wait_until(lambda: workers.hold() is not None, "a task holds its pack")
            told = {each: inspect(workers, *each.split()) for each in ("conf true", "stats", "active", "reserved")}
    finally:
        stack.postgrest.start()

    told["its start"] = terminal.read_text()
    assert "transport:" in told["its start"]
    assert "broker_url" in told["conf true"]
    assert "interview.apply_events" in told["active"]
    assert {each: found for each, text in told.items() if (found := learnt.in_text(text))} == {}


def inspect(workers: Workers, *command: str) -> str:
    done = asked(workers, "celery", "-A", "worker", "inspect", "-d", NODE, "-t", "5", *command)
    assert done.returncode == 0, "the worker did not answer"
    return done.stdout + done.stderr


# ---------------------------------------------------------------------------------------------- objects and errors


def shown(thing: object) -> str:
    told = f"{thing!r} {thing} {thing:}"
    return told + "".join(traceback.format_exception(thing)) if isinstance(thing, BaseException) else told


def test_what_a_developer_prints_shows_no_secret(workers: Workers, learnt: Leaks, tmp_path: Path) -> None:
    """In a debugger, a test's output, an f-string. (tests/test_settings.py has Settings.)"""
    settings, url = load_settings(), workers.environment["REDIS_URL"]
    supabase, client = Supabase(settings), connect(settings)
    with Publisher(url, spool=tmp_path / "spool") as publisher:
        asynchronous = AsyncPublisher(url)
        things = [
            *(load_settings(StreamSettings), publisher, asynchronous, supabase, supabase.client),
            *(client, client.connection_pool, client.connection_pool.make_connection(), EventStream(client, "s")),
            *(make_app(settings), make_app(settings).connection()),
        ]
        assert [type(thing) for thing in things if learnt.in_text(shown(thing))] == []
        asyncio.run(asynchronous.close())


def test_what_an_error_tells_shows_no_secret_and_nobodys_data(
    workers: Workers, learnt: Leaks, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        errors = [
            refused(PublishError, lambda: publish(f"redis://:{WRONG_PASSWORD}@127.0.0.1:{port}/0")),
            refused(PublishError, lambda: publish(f"redis://:{WRONG_PASSWORD}@{address(workers)}/0")),
            refused(Misconfigured, lambda: apply(monkeypatch, SUPABASE_SECRET_KEY=WRONG_KEY)),
            refused(Unavailable, lambda: apply(monkeypatch, SUPABASE_REST_URL=f"http://127.0.0.1:{port}")),
        ]
    assert [type(error) for error in errors if learnt.in_text(shown(error))] == []


def address(workers: Workers) -> str:
    return urlsplit(workers.environment["REDIS_URL"]).netloc.partition("@")[2]


def refused(kind: type[Exception], call: Callable[[], object]) -> Exception:
    with pytest.raises(kind) as caught:
        call()
    return caught.value


def publish(url: str) -> None:
    with Publisher(url, retries=0) as publisher:
        publisher.publish(Answered.new("session", questions_answered=1))


def apply(monkeypatch: pytest.MonkeyPatch, **settings: str) -> None:
    with monkeypatch.context() as changed:
        for name, value in settings.items():
            changed.setenv(name, value)
        supabase = Supabase(load_settings())
    try:
        supabase.apply_events([event("cancelled", "session", reason=REASON)])
    finally:
        supabase.close()
