"""What a person has to mend holds a real worker, which says how; when that is done, it goes on by itself.

One worker serves most of these tests, one after the other, behind a gateway that can be told to answer in
PostgREST's stead.
"""

import itertools
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import httpx
import pytest

from events.publisher import FIELD
from tests.database import Database, event
from tests.stories import assert_rows_equal_their_stories, crowd, encoded
from tests.worker_process import STREAM, Workers, wait_until
from worker import stopping
from worker.database import Database as Supabase
from worker.embedded import Stack
from worker.errors import Misconfigured, Unavailable
from worker.hold import POLL_SECONDS, Hold, HoldState, hold_key
from worker.settings import load_settings
from worker.sql_files import sql_files, sql_folder
from worker.stream import EventStream, connect

INTERVIEWS = Path(sys.executable).parent / "interviews"
NEEDS_A_PERSON = 3
PATIENCE_SECONDS = 60
ASIDE = 2  # the number of a Redis database that no other worker reads

RELOAD: Final = "notify pgrst, 'reload schema'"
KEPT_HEADERS: Final = ("content-type", "content-range")


# ---------------------------------------------------------------------------------------------------- a gateway


@dataclass(frozen=True)
class Reply:
    """What the gateway says in PostgREST's stead."""

    status: int
    body: str
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Asked:
    """A request: by whom it was answered, and when it came and was answered, as numbers in one row."""

    body: bytes
    came: int
    answered: int | None = None
    by_postgrest: bool = False


ILL: Final = Reply(503, "upstream connect error")
LATER: Final = Reply(429, '{"message": "Too many requests"}', {"Retry-After": "1"})
POOL_EXHAUSTED: Final = Reply(
    504, '{"code": "PGRST003", "details": null, "hint": null, "message": "Timed out acquiring connection from pool."}'
)
WEB_PAGE: Final = Reply(200, "<!doctype html><title>Welcome</title>", {"Content-Type": "text/html"})


class Gateway:
    """Stands before PostgREST: `reply` is what it says in its stead; while `gate` is clear it says nothing."""

    def __init__(self, target: str) -> None:
        self.reply: Reply | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.asked: list[Asked] = []
        self._moments = itertools.count()
        self._target = httpx.Client(base_url=target, timeout=PATIENCE_SECONDS)
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @contextmanager
    def open(self) -> Iterator["Gateway"]:
        """Serve in threads of its own."""
        thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield self
        finally:
            self.gate.set()
            self._server.shutdown()
            thread.join()
            self._server.server_close()
            self._target.close()

    @contextmanager
    def replying(self, reply: Reply) -> Iterator[None]:
        """Say this in PostgREST's stead."""
        self.reply = reply
        try:
            yield
        finally:
            self.reply = None

    def waiting(self) -> int:
        """Requests that have no answer yet."""
        return sum(each.answered is None for each in list(self.asked))

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
        """Called by the server's threads."""
        asked = Asked(body, came=next(self._moments))
        self.asked.append(asked)
        self.gate.wait(PATIENCE_SECONDS)
        reply = self.reply
        asked.by_postgrest = reply is None
        if reply is None:
            reply = self._forwarded(method, path, headers, body)
        asked.answered = next(self._moments)
        return reply

    def _forwarded(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Reply:
        sent = {name: value for name, value in headers.items() if name.lower() not in ("host", "connection")}
        told = self._target.request(method, path, headers=sent, content=body)
        kept = {name: value for name, value in told.headers.items() if name.lower() in KEPT_HEADERS}
        return Reply(told.status_code, told.text, kept)


def _handler_of(gateway: Gateway) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            reply = gateway.answer(self.command, self.path, dict(self.headers), body)
            told = b"" if self.command == "HEAD" else reply.body.encode()
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(len(told))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(told)

        do_GET = do_HEAD = do_POST = answer  # noqa: N815 - http.server's names

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
            """Nothing."""

    return Handler


@pytest.fixture(scope="module")
def gateway(stack: Stack) -> Iterator[Gateway]:
    with Gateway(stack.environment["SUPABASE_REST_URL"]).open() as gateway:
        yield gateway


# ------------------------------------------------------------------------------------------------- one worker for all


@pytest.fixture(scope="module")
def one_worker(stack: Stack, gateway: Gateway, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """A worker behind the gateway, on a Redis database of its own."""
    environment = stack.environment | {
        "REDIS_URL": stack.environment["REDIS_URL"].removesuffix("/0") + f"/{ASIDE}",
        "SUPABASE_REST_URL": gateway.url,
    }
    with pytest.MonkeyPatch.context() as patched:
        for name, value in environment.items():
            patched.setenv(name, value)
        client = connect(load_settings())
    with client:
        client.flushdb()
        workers = Workers(environment, tmp_path_factory.mktemp("one_worker"), client, EventStream(client, STREAM))
        with workers.running() as worker:
            yield workers
            assert workers.stop(worker) == 0


@dataclass
class Scene:
    """One test with the worker of all: what it publishes, sees and mends."""

    workers: Workers
    gateway: Gateway
    stack: Stack
    database: Database
    user: uuid.UUID
    published: list[dict[str, Any]] = field(default_factory=list)
    bad: int = 0
    _lines: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lines = {name: len(self.workers.logged(name)) for name in ("hold.began", "hold.ended")}
        self.database.connection.execute("truncate public.interview_dead_letters")

    def publish(self, *, bad: int = 0) -> None:
        """Five interviews, and some events that break the contract, at one moment: they make one pack."""
        self.published, self.bad = crowd(self.user, random.Random(str(self.user)), events=50), bad
        invalid = [json.dumps(event("answered", "invalid", questions_answered=-1)).encode() for _ in range(bad)]
        with self.workers.client.pipeline(transaction=True) as pipeline:
            for raw in [*invalid, *encoded(self.published)]:
                pipeline.xadd(STREAM, {FIELD: raw})
            pipeline.execute()

    def hold(self) -> HoldState:
        """The hold, once it is in force."""
        wait_until(lambda: self.workers.hold() is not None, "a hold is in force")
        found = self.workers.hold()
        assert found is not None
        return found

    def wait_until_asked_again(self, times: int) -> None:
        """Wait until the worker has probed so many times more."""
        before = len(self.gateway.asked)
        wait_until(lambda: len(self.gateway.asked) >= before + times, "the worker has probed")

    def remedy(self, code: str) -> str:
        """The advice, which is the same in the hold, in its one log line and in `interviews status`."""
        hold = self.hold()
        assert code in hold.reason
        assert hold.remedy is not None
        wait_until(lambda: bool(self.told("hold.began")), "the log tells of it, too")
        (line,) = self.told("hold.began")
        assert (line["reason"], line["remedy"]) == (hold.reason, hold.remedy)
        status = subprocess.run(
            [INTERVIEWS, "status"],
            env={**os.environ, **self.workers.environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_SECONDS,
        )
        assert status.returncode == NEEDS_A_PERSON
        assert hold.remedy in " ".join(status.stdout.split())
        return hold.remedy

    def told(self, event_name: str) -> list[dict[str, Any]]:
        """The worker's lines of this name since the test began."""
        return self.workers.logged(event_name)[self._lines[event_name] :]

    def assert_nothing_was_done(self) -> None:
        """All that was published waits in the stream, claimed or not, and nothing is dead."""
        assert self.workers.stream.state().length == len(self.published) + self.bad
        assert self.letters() == []

    def assert_all_was_done(self) -> None:
        """The worker went on by itself, said so, and every event is where it belongs."""
        self.workers.wait_until_empty()
        wait_until(lambda: len(self.told("hold.ended")) == 1, "the end of the hold is told")
        assert len(self.told("hold.began")) == 1
        assert self.workers.hold() is None
        assert_rows_equal_their_stories(self.database, self.published)
        assert self.letters() == ["invalid_event"] * self.bad

    def letters(self) -> list[str]:
        return [row["reason"] for row in self.database.all("select reason from public.interview_dead_letters")]

    def run_sql(self, file: Path, *, reload: bool = True) -> None:
        """Run a file of SQL as the editor does; its last line tells PostgREST to look again."""
        sql = file.read_text()
        assert sql.rstrip().endswith(f"{RELOAD};")
        self.database.connection.execute((sql if reload else sql.replace(f"{RELOAD};", "")).encode())

    @contextmanager
    def postgrest_anew(self) -> Iterator[None]:
        """PostgREST ends before and starts after: no reload that somebody asked for is still under way."""
        self.stack.postgrest.stop()
        try:
            yield
        finally:
            self.stack.postgrest.start()


@pytest.fixture
def scene(one_worker: Workers, gateway: Gateway, stack: Stack, database: Database, user: uuid.UUID) -> Iterator[Scene]:
    """Whatever a test breaks is mended when it ends: the stack is everybody's."""
    scene = Scene(one_worker, gateway, stack, database, user)
    try:
        yield scene
    finally:
        gateway.reply = None
        for file in sql_files():
            scene.run_sql(file)
        one_worker.wait_until_empty()
        wait_until(lambda: one_worker.hold() is None, "the hold is over")


# ------------------------------------------------------------------------------------------------ what is missing

APPLY, RECORD_DEAD = RPCS = ("apply_interview_events_summary", "record_dead_interview_events")
# The second is called only where a pack holds an event that breaks the contract.
both = pytest.mark.parametrize(("function", "bad"), [(APPLY, 0), (RECORD_DEAD, 1)], ids=RPCS)


def follow(scene: Scene, remedy: str) -> None:
    """Do what the remedy says: run the SQL files that it names, as it names them."""
    files = re.findall(r"sql/\w+\.sql", remedy)
    assert files
    for file in files:
        scene.run_sql(sql_folder().parent / file)


@both
def test_a_missing_function_holds_until_the_sql_is_run(scene: Scene, function: str, bad: int) -> None:
    """Where the SQL was never run, or is older than the worker."""
    with scene.postgrest_anew():
        scene.database.connection.execute(f"drop function public.{function}(jsonb)".encode())
    scene.publish(bad=bad)

    remedy = scene.remedy("PGRST202")
    scene.assert_nothing_was_done()
    follow(scene, remedy)

    scene.assert_all_was_done()


def test_a_function_dropped_behind_postgrests_back_holds_until_the_sql_is_run(scene: Scene) -> None:
    with scene.postgrest_anew():
        pass
    scene.database.connection.execute(f"drop function public.{APPLY}(jsonb)".encode())
    scene.publish()

    remedy = scene.remedy("42883")
    scene.assert_nothing_was_done()
    follow(scene, remedy)

    scene.assert_all_was_done()


@both
def test_a_missing_grant_holds_until_the_sql_is_run(scene: Scene, function: str, bad: int) -> None:
    scene.database.connection.execute(f"revoke execute on function public.{function}(jsonb) from service_role".encode())
    scene.publish(bad=bad)

    remedy = scene.remedy("42501")
    scene.assert_nothing_was_done()
    follow(scene, remedy)

    scene.assert_all_was_done()


def unknown_to_postgrest(scene: Scene) -> None:
    """The function is there, and PostgREST's cache does not know: its SQL was run without the last line."""
    with scene.postgrest_anew():
        scene.database.connection.execute(f"drop function public.{APPLY}(jsonb)".encode())
    scene.run_sql(sql_files()[1], reload=False)
    scene.publish()
    assert "PGRST202" in scene.hold().reason


def test_a_function_that_postgrest_does_not_know_of_holds_until_it_is_told_to_reload(scene: Scene) -> None:
    unknown_to_postgrest(scene)

    remedy = scene.remedy("PGRST202")
    scene.wait_until_asked_again(3)  # which does not make PostgREST look by itself
    scene.assert_nothing_was_done()
    (advice,) = re.findall(r"notify pgrst, '[\w ]+'", remedy)
    scene.database.connection.execute(advice.encode())

    scene.assert_all_was_done()


def test_a_function_that_postgrest_does_not_know_of_is_found_when_it_connects_to_the_database_anew(
    scene: Scene,
) -> None:
    unknown_to_postgrest(scene)

    scene.database.connection.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where usename = 'authenticator'"
    )

    scene.assert_all_was_done()


def test_a_grant_that_is_missing_in_the_seeds_sql_is_mended_by_the_remedy_too(scene: Scene) -> None:
    scene.database.connection.execute("revoke insert, update on public.interview_sessions from service_role")
    scene.publish()

    remedy = scene.remedy("42501")
    scene.assert_nothing_was_done()
    assert [file.name for file in sql_files()] == [Path(each).name for each in re.findall(r"sql/\w+\.sql", remedy)]
    follow(scene, remedy)

    scene.assert_all_was_done()


# ------------------------------------------------------------------------------------------------ what settings say


def test_a_wrong_key_holds_and_the_next_worker_with_the_right_one_goes_on(
    workers: Workers, database: Database, user: uuid.UUID
) -> None:
    database.connection.execute("truncate public.interview_dead_letters")
    events = crowd(user, random.Random(str(user)), events=100)
    workers.stream.add(encoded(events))
    with workers.running(SUPABASE_SECRET_KEY="sb_secret_wrong") as worker:
        wait_until(lambda: workers.hold() is not None, "a hold is in force")
        assert "SUPABASE_SECRET_KEY" in str(workers.hold())
        assert workers.stop(worker) == 0  # a hold does not keep it from stopping
    with workers.running() as worker:
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    assert_rows_equal_their_stories(database, events)
    assert database.all("select reason from public.interview_dead_letters") == []


def test_status_does_not_take_a_web_page_for_supabase(stack: Stack, gateway: Gateway) -> None:
    with gateway.replying(WEB_PAGE):
        done = subprocess.run(
            [INTERVIEWS, "status", "--json"],
            env={**os.environ, **stack.environment, "SUPABASE_URL": gateway.url, "SUPABASE_REST_URL": ""},
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_SECONDS,
        )
    assert json.loads(done.stdout)["supabase"] != "ok"
    assert "SUPABASE_URL" in done.stdout


def test_a_key_of_the_public_in_place_of_the_secret_one_is_told_as_such(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (stack.environment | {"SUPABASE_SECRET_KEY": stack.token("anon")}).items():
        monkeypatch.setenv(name, value)
    supabase = Supabase(load_settings())
    with pytest.raises(Misconfigured) as told:
        supabase.apply_events([event("answered", "session", questions_answered=1)])
    supabase.close()
    assert "SUPABASE_SECRET_KEY" in told.value.remedy


# ------------------------------------------------------------------------------------------------ what passes by itself


@pytest.mark.parametrize(
    ("reply", "reason"),
    [(ILL, "HTTP 503"), (LATER, "HTTP 429"), (POOL_EXHAUSTED, "PGRST003"), (WEB_PAGE, "SUPABASE_URL")],
    ids=["503", "429", "no connection left in the pool", "a web page"],
)
def test_what_a_gateway_says_in_a_bad_hour_holds_and_passes_by_itself(scene: Scene, reply: Reply, reason: str) -> None:
    with scene.gateway.replying(reply):
        scene.publish(bad=1)
        hold = scene.hold()
        scene.wait_until_asked_again(1)
        scene.assert_nothing_was_done()
    assert reason in str(hold)
    scene.assert_all_was_done()


def test_one_pack_is_asked_for_again_and_again_and_the_others_wait_for_its_success(
    workers: Workers, gateway: Gateway, database: Database, user: uuid.UUID
) -> None:
    """No stampede: neither while Supabase is ill, nor when it is well again."""
    slots = 4
    settings = {
        "SUPABASE_REST_URL": gateway.url,
        "INTERVIEW_PACK_SIZE": "10",
        "INTERVIEW_CONCURRENCY": str(slots),
        "INTERVIEW_BACKOFF_SECONDS": "0.2",
        "INTERVIEW_RPC_TIMEOUT_SECONDS": "20",
        "INTERVIEW_RECLAIM_SECONDS": "30",
    }
    events = crowd(user, random.Random(str(user)), events=300)
    gateway.asked.clear()
    gateway.gate.clear()
    with gateway.replying(ILL), workers.running(**settings) as worker:
        workers.stream.add(encoded(events))
        wait_until(lambda: gateway.waiting() == slots, "the process of every slot waits for Supabase")
        gateway.gate.set()
        wait_until(lambda: len(gateway.asked) >= slots + 8, "Supabase has been asked again and again")
        gateway.reply = None
        workers.wait_until_empty()
        assert workers.stop(worker) == 0

    at_first, probes = gateway.asked[:slots], [each for each in gateway.asked[slots:] if not each.by_postgrest]
    first, *others = [each for each in gateway.asked if each.by_postgrest]
    assert len({each.body for each in at_first}) == slots
    assert {each.body for each in probes} == {first.body}
    assert first.answered is not None
    assert [each for each in others if each.came < first.answered] == []
    assert [len(workers.logged(name)) for name in ("hold.began", "hold.ended")] == [1, 1]
    assert_rows_equal_their_stories(database, events)


# ------------------------------------------------------------------------------------------------ the hold itself


@pytest.fixture
def hold(workers: Workers) -> Iterator[Hold]:
    stopping.resume()
    yield Hold(workers.client, load_settings().model_copy(update={"backoff_seconds": 0.01, "rpc_timeout_seconds": 1.0}))
    stopping.resume()


def test_the_hold_lasts_as_long_as_the_wait_that_supabase_asks_for(
    workers: Workers, hold: Hold, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the others take it for over, and ask in the meantime."""
    answers: list[Exception] = [Unavailable("HTTP 429", retry_after=30.0)]
    waits: list[float] = []
    leases: list[float] = []

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        leases.append(workers.client.pttl(hold_key(STREAM)) / 1000)
        return False

    def call() -> None:
        if answers:
            raise answers.pop()

    clock = SimpleNamespace(time=time.time, monotonic=lambda: sum(waits))  # on which no wait takes any time
    monkeypatch.setattr("worker.hold.time", clock)
    monkeypatch.setattr(stopping, "wait", wait)
    hold.run(call)

    assert sum(waits) == 30.0
    assert max(waits) <= POLL_SECONDS  # in between the task keeps its claim
    assert min(leases) > 30.0


def test_a_hold_tells_what_is_the_matter_now(workers: Workers, hold: Hold) -> None:
    """Supabase was away, and is back with another key."""
    answers: list[Exception] = [
        *[Misconfigured("the key is not accepted", remedy="set the key")] * 2,
        Unavailable("no answer from Supabase"),
    ]
    seen = []

    def call() -> None:
        seen.append(workers.hold())
        if answers:
            raise answers.pop()

    hold.run(call)

    assert [state and (state.reason, state.remedy) for state in seen] == [
        None,
        ("no answer from Supabase", None),
        ("the key is not accepted", "set the key"),
        ("the key is not accepted", "set the key"),
    ]
