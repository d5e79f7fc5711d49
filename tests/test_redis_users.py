"""Who may do what in Redis: deploy/redis/users.acl on a real server, role by role, each thing allowed and refused."""

import asyncio
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from events import Answered, AsyncPublisher, Event, Publisher, parse_event
from tests.chaos.proxy import Proxy
from tests.database import Database, event
from tests.stories import assert_rows_equal_their_stories, crowd, encoded
from tests.worker_process import PATIENCE_SECONDS, QUICK, STREAM, Workers, wait_until
from worker import stopping
from worker.apply.drain import SUSPECT_DELIVERIES
from worker.dead_share import DeadShare
from worker.embedded import Stack, StackError
from worker.embedded.binaries import redis_server
from worker.embedded.server import Server, free_port
from worker.errors import Misconfigured, Unavailable
from worker.hold import Hold, hold_key
from worker.outcomes import Outcomes
from worker.settings import load_settings
from worker.stream import GROUP, EventStream
from worker.worker_state import WorkerState, WorkerStates

USERS = Path(__file__).parent.parent / "deploy" / "redis" / "users.acl"
BIN = Path(sys.executable).parent
ROLES = ("engine", "worker", "operator")
PASSWORDS = {role: f"password-of-the-{role}" for role in (*ROLES, "admin")}
ADMIN = f"user admin on >{PASSWORDS['admin']} ~* &* +@all\n"
GREETINGS = "+client|setinfo +client|maint_notifications"  # redis-py's; 6.2 knows neither, and logs them as refused
SWEPT = "_kombu.binding_deadlines"  # kombu cleans up behind those whose time is over
ELSES = "somebody:elses"  # a key of another application

each_role = pytest.mark.parametrize("role", ROLES)
Words = tuple[str | int, ...]

# Commands as they travel, and those that a script runs.
COMMAND = re.compile(rb"\*\d+\r\n\$\d+\r\n([A-Za-z]+)\r\n(?:\$\d+\r\n([A-Za-z]+)\r\n)?")
CALL = re.compile(rb"redis\.p?call\(\s*['\"]([A-Za-z]+)['\"](?:,\s*['\"]([A-Za-z]+)['\"])?")
CONTAINERS = {"client", "script", "xgroup", "xinfo"}  # whose subcommands have rules of their own
UNUSED_HERE = {"select": "for another database than 0"}


# ---------------------------------------------------------------------------------------------------- the server


class Recorder(Proxy):
    """Stands before Redis, and remembers which commands came by; a process of Celery's is sent here."""

    def __init__(self, target_port: int) -> None:
        super().__init__(target_port)
        self.commands: set[str] = set()

    def record(self, chunk: bytes) -> None:
        for name, sub in (*COMMAND.findall(chunk), *CALL.findall(chunk)):
            command = name.decode().lower()
            self.commands.add(f"{command}|{sub.decode().lower()}" if command in CONTAINERS else command)

    async def _pump(self, source: Any, sink: Any, *, reply: bool) -> None:
        tapped: Any = source if reply else Tapped(source, self.record)
        await super()._pump(tapped, sink, reply=reply)


@dataclass(frozen=True)
class Tapped:
    """A stream whose every chunk is recorded."""

    source: asyncio.StreamReader
    record: Callable[[bytes], None]

    async def read(self, size: int) -> bytes:
        chunk = await self.source.read(size)
        self.record(chunk)
        return chunk


@dataclass(frozen=True)
class Door:
    """A Redis that only lets in who users.acl names, and an admin that this test adds."""

    port: int
    recorder: Recorder | None = None

    def url(self, user: str) -> str:
        return f"redis://{user}:{PASSWORDS[user]}@127.0.0.1:{self.port}/0"

    def recorded_url(self, user: str) -> str:
        assert self.recorder is not None
        return self.url(user).replace(f":{self.port}/", f":{self.recorder.port}/")

    def client(self, user: str) -> Any:  # redis-py types each answer as "maybe awaitable"
        return redis.Redis.from_url(self.url(user), socket_timeout=5, protocol=2)

    def may(self, user: str, *words: str | int) -> bool:
        """Whether a command passes the rules, on a connection of its own; what it answers then does not matter."""
        return self._refusal(user, *words) is None

    def may_run(self, user: str, *words: str | int) -> bool:
        """Whether a command as such passes, be it that its keys or channels do not."""
        return " to run " not in str(self._refusal(user, *words))

    def _refusal(self, user: str, *words: str | int) -> str | None:
        with self.client(user) as client:
            client.response_callbacks.clear()  # they know what each answer looks like, but not of these odd commands
            try:
                client.execute_command(*words)
            except redis.exceptions.RedisError as error:
                told = str(error)
                if "wrong number of arguments" in told:  # told before the rules are asked
                    raise
                if "permission" in told:
                    return told
                if "unknown" in told or "not allowed" in told:
                    return "nobody can get this Redis to run it"
        return None


def users_with_passwords() -> str:
    """The file as an operator fills it in, and on 6.2 with what its README adds for that version."""
    rules = USERS.read_text()
    for role in ROLES:
        rules = rules.replace(f"#CHANGE-ME-{role}", "#" + hashlib.sha256(PASSWORDS[role].encode()).hexdigest())
    told = subprocess.run([redis_server(), "--version"], capture_output=True, text=True, check=True).stdout
    if "v=6." in told:
        rules = "".join(
            f"{line} {GREETINGS}\n" if line.split()[1] in ROLES else f"{line}\n" for line in rules.splitlines()
        )
    return rules


def server(folder: Path, rules: str, port: int) -> Server:
    (folder / "users.acl").write_text(rules)
    (folder / "redis.conf").write_text(
        f'bind 127.0.0.1\nport {port}\ndir "{folder}"\naclfile "{folder}/users.acl"\nappendonly yes\nsave ""\n'
    )
    return Server(
        name="redis",
        argv=[str(redis_server()), str(folder / "redis.conf")],
        log=folder / "redis.log",
        ready=lambda: bool(Door(port).client("admin").ping()),
    )


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    port = free_port()
    running = server(tmp_path_factory.mktemp("guarded"), users_with_passwords() + ADMIN, port)
    running.start()
    recorder = Recorder(port)
    with recorder.running():
        yield Door(port, recorder)
    running.stop()


@pytest.fixture
def door(guarded: Door) -> Door:
    """The server, empty, and with nothing in its log of refusals."""
    with guarded.client("admin") as admin:
        admin.flushall()
        admin.script_flush()  # who needs a script loads it, and is seen to
        admin.acl_log_reset()
    return guarded


@pytest.fixture
def admin(door: Door) -> Iterator[Any]:
    with door.client("admin") as client:
        yield client


def refusals(admin: Any) -> list[tuple[str, str, str, str]]:
    """What ACL LOG holds: who, for what reason, which command, key or channel, in which command."""
    return [
        (each["username"], each["reason"], each["object"], each["client-info"]["cmd"]) for each in admin.acl_log(128)
    ]


def answers(count: int) -> list[Event]:
    return [Answered.new(f"session_{number}", questions_answered=number) for number in range(count)]


def every_command(admin: Any, argument: str = "x") -> dict[str, Words]:
    """Every command, from Redis 7 on every subcommand, with as few words as it takes."""
    table = admin.command()
    arity = {name: each["arity"] for name, each in table.items()}
    arity |= {sub[0].decode(): sub[1] for each in table.values() for sub in each.get("subcommands", [])}
    assert len(arity) > 200
    return {
        name: (*(words := name.split("|")), *[argument] * (abs(number) - len(words))) for name, number in arity.items()
    }


def every_command_on(key: str, admin: Any) -> list[Words]:
    """Every command of this Redis that takes keys, with that key for each of its arguments."""
    table = admin.command()
    found = [(name, *[key] * (abs(each["arity"]) - 1)) for name, each in table.items() if each["first_key_pos"] > 0]
    assert len(found) > 100
    return [
        *found,
        ("EVAL", "return 1", 1, key),
        ("EVALSHA", "0" * 40, 1, key),
        ("XREAD", "STREAMS", key, "0"),
        ("XREADGROUP", "GROUP", GROUP, "me", "STREAMS", key, ">"),
        ("XGROUP", "CREATE", key, GROUP, "0"),
        ("XGROUP", "DELCONSUMER", key, GROUP, "x"),
        ("XINFO", "STREAM", key),
        ("XINFO", "CONSUMERS", key, GROUP),
        ("OBJECT", "ENCODING", key),
        ("MEMORY", "USAGE", key),
    ]


# ---------------------------------------------------------------------------------------------------- who gets in


def test_the_file_does_not_load_before_its_passwords_are_chosen(tmp_path: Path) -> None:
    with pytest.raises(StackError, match=r"users.acl:2: .*password hash"):
        server(tmp_path, USERS.read_text(), free_port()).start()


def test_the_lines_in_the_readme_give_each_role_a_password_that_works(tmp_path: Path) -> None:
    lines = (USERS.parent / "README.md").read_text().split("```sh\n")[1].split("```")[0]
    copy = tmp_path / "users.acl"
    copy.write_text(USERS.read_text())
    told = subprocess.run(["sh", "-euc", lines], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    urls = dict(line.split(": REDIS_URL=") for line in told.splitlines())
    assert tuple(urls) == ROLES
    port = free_port()
    running = server(tmp_path, copy.read_text() + ADMIN, port)
    running.start()
    try:
        for url in urls.values():
            with redis.Redis.from_url(url.replace("redis.internal:6379", f"127.0.0.1:{port}")) as client:
                assert client.ping()
    finally:
        running.stop()


def test_who_gives_no_password_or_a_wrong_one_is_refused(door: Door) -> None:
    strangers = [(None, None), (None, PASSWORDS["engine"]), ("default", ""), ("engine", PASSWORDS["worker"])]
    for user, password in strangers:
        with (
            redis.Redis(port=door.port, username=user, password=password, retry=Retry(NoBackoff(), 0)) as stranger,
            pytest.raises(redis.exceptions.AuthenticationError),
        ):
            stranger.ping()


@each_role
def test_a_role_may_use_another_database_of_this_redis(door: Door, admin: Any, role: str) -> None:
    assert door.may(role, "SELECT", 3)
    assert refusals(admin) == []


@each_role
def test_no_role_may_run_a_dangerous_command(door: Door, admin: Any, role: str) -> None:
    dangerous = {*admin.acl_cat("dangerous"), *admin.acl_cat("admin")}
    assert {"keys", "flushall", "debug", "shutdown", "replicaof"} <= dangerous
    passed = {name for name, words in every_command(admin).items() if name in dangerous and door.may_run(role, *words)}
    assert passed <= {"worker": {"client|list", "client|unblock"}, "operator": {"info"}}.get(role, set())


@each_role
@pytest.mark.parametrize(
    "words",
    [
        ("CONFIG", "GET", "requirepass"),
        ("CONFIG", "SET", "appendonly", "no"),
        ("ACL", "LIST"),
        ("CLIENT", "KILL", "TYPE", "normal"),
        ("CLIENT", "PAUSE", 1),
        ("CLIENT", "NO-EVICT", "on"),
        ("SCRIPT", "FLUSH"),
        ("SCAN", 0),
        ("RANDOMKEY",),
        ("DBSIZE",),
        ("PUBSUB", "CHANNELS"),
        ("SUBSCRIBE", "/0.celery.pidbox"),
        ("XGROUP", "DESTROY", STREAM, GROUP),
        ("XGROUP", "SETID", STREAM, GROUP, "$"),
        ("XTRIM", STREAM, "MAXLEN", 0),
        ("XSETID", STREAM, "9-9"),
        ("RENAME", STREAM, f"{STREAM}:away"),
        ("FLUSHDB",),
        ("SWAPDB", 0, 1),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_no_role_may(door: Door, role: str, words: Words) -> None:
    assert not door.may(role, *words)


@each_role
def test_no_role_reaches_a_key_of_another_application_by_any_command(door: Door, admin: Any, role: str) -> None:
    admin.set(ELSES, "theirs")
    assert [words for words in every_command_on(ELSES, admin) if door.may(role, *words)] == []
    assert admin.get(ELSES) == b"theirs"
    assert admin.keys() == [ELSES.encode()]


@pytest.mark.parametrize("role", ["worker", "operator"])
def test_a_script_reaches_no_further_than_its_user(door: Door, admin: Any, role: str) -> None:
    with door.client(role) as client:
        for script in (f"return redis.call('set', '{ELSES}', 1)", "return redis.call('keys', '*')"):
            loaded = client.script_load(script)
            with pytest.raises(redis.exceptions.ResponseError, match=r"(?i)permission|can't"):
                client.evalsha(loaded, 0)
    assert admin.keys() == []


# ---------------------------------------------------------------------------------------------------- the engine


def test_the_engine_publishes_one_and_many_events(door: Door, admin: Any) -> None:
    events = answers(1200)
    with Publisher(door.url("engine")) as publisher:
        assert publisher.publish(events[0])
        assert None not in publisher.publish_many(events[1:])
    assert [fields[b"event"] for _, fields in admin.xrange(STREAM)] == [each.to_json() for each in events]
    assert refusals(admin) == []


def test_the_engine_publishes_from_asyncio(door: Door, admin: Any) -> None:
    async def publish() -> str | None:
        async with AsyncPublisher(door.url("engine")) as publisher:
            return await publisher.publish(answers(1)[0])

    assert asyncio.run(publish())
    assert admin.xlen(STREAM) == 1
    assert refusals(admin) == []


def test_the_engine_brings_what_an_outage_left_in_its_spool(door: Door, admin: Any, tmp_path: Path) -> None:
    spool = tmp_path / "events.spool"
    away = f"redis://engine:secret@127.0.0.1:{free_port()}/0"
    with Publisher(away, spool=spool, retries=0, timeout=0.1) as publisher:
        assert publisher.publish_many(answers(3)) == [None] * 3
    with Publisher(door.url("engine"), spool=spool) as publisher:
        assert publisher.flush() == 0
    assert admin.xlen(STREAM) == 3
    assert refusals(admin) == []


def test_the_engine_may_run_no_command_but_xadd_and_what_a_connection_needs(door: Door, admin: Any) -> None:
    passed = {name for name, words in every_command(admin, STREAM).items() if door.may_run("engine", *words)}
    assert passed <= {"xadd", "select", *admin.acl_cat("connection")}
    assert "xadd" in passed
    assert not door.may("engine", "CLIENT", "LIST")  # 6.2 counts CLIENT as one command


def test_the_engine_may_run_no_command_on_keys_but_xadd(door: Door, admin: Any) -> None:
    admin.xadd(STREAM, {"event": "1"})
    admin.xgroup_create(STREAM, GROUP, id="0")
    commands = [*every_command_on(STREAM, admin), ("EVAL", "return 1", 0), ("SCRIPT", "LOAD", "return 1")]
    assert {str(words[0]).lower() for words in commands if door.may("engine", *words)} == {"xadd"}
    assert admin.xlen(STREAM) == 1
    assert admin.xpending(STREAM, GROUP)["pending"] == 0


@pytest.mark.parametrize("key", ["interview", f"{STREAM}:hold", f"{STREAM}2", "interview:event", "x"])
def test_the_engine_may_add_to_no_other_key(door: Door, admin: Any, key: str) -> None:
    assert not door.may("engine", "XADD", key, "*", "event", "1")
    assert admin.keys() == []


def test_the_engine_neither_speaks_nor_listens_on_a_channel(door: Door, admin: Any) -> None:
    for words in [("PUBLISH", "/0.celery.pidbox", "x"), ("SUBSCRIBE", "x"), ("PSUBSCRIBE", "*")]:
        assert not door.may_run("engine", *words)
    assert not admin.acl_getuser("engine")["channels"]


# ------------------------------------------------------------------------------------- the worker and the operator


@pytest.fixture
def workers(door: Door, stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    """Workers on the stack's Supabase, and on the guarded Redis as its user `worker`."""
    environment = stack.environment | {"REDIS_URL": door.recorded_url("worker")}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with door.client("admin") as client:
        yield Workers(environment, tmp_path, client, EventStream(client, STREAM))


@pytest.fixture(autouse=True)
def _no_letters_of_others(request: pytest.FixtureRequest) -> None:
    if "database" in request.fixturenames:
        request.getfixturevalue("database").connection.execute("truncate public.interview_dead_letters")


def publish(door: Door, raw: list[bytes], *, user: str = "engine") -> None:
    with Publisher(door.url(user)) as publisher:
        publisher.publish_many([parse_event(each) for each in raw])


@contextmanager
def celery(log: Path, app: str, *arguments: str, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Celery process as its users start it; killed at the end if it still runs."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [BIN / "celery", "-A", app, *arguments],
            env={**os.environ, **QUICK, **settings},
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def run(*command: str, door: Door, status: int = 0) -> str:
    """A command of the operator's; answers what it prints."""
    done = ran(*command, url=door.url("operator"))
    assert done.returncode == status, done.stderr
    return done.stdout


def ran(*command: str, url: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / command[0], *command[1:]],
        env={**os.environ, "REDIS_URL": url},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )


def test_a_worker_a_beat_the_engine_and_an_operator_do_all_their_work_and_nothing_is_refused(
    workers: Workers,
    door: Door,
    admin: Any,
    database: Database,
    user: uuid.UUID,
    rng: random.Random,
    tmp_path: Path,
) -> None:
    events = crowd(user, rng, events=100)
    late, newcomer = f"late-{uuid.uuid4()}", uuid.uuid4()
    story = crowd(newcomer, rng, events=10)
    (tmp_path / "quick_beat.py").write_text(
        "from worker.celery import app\n"
        "for each in app.conf.beat_schedule.values():\n    each['schedule'] = 0.2\n"
        f"app.conf.beat_schedule_filename = {str(tmp_path / 'schedule')!r}\n"
    )
    log = tmp_path / "default-worker.log"
    settings = {"INTERVIEW_WAITING_HOURS": "0.0001", "INTERVIEW_METRICS_PORT": str(free_port())}
    admin.zadd(SWEPT, {"gone": 1})
    with celery(log, "worker", "worker", "--hostname", "guarded@here", **settings) as worker:
        wait_until(lambda: b"worker.started" in log.read_bytes(), "the worker has started")
        wait_until(lambda: admin.zscore(SWEPT, "gone") is None, "kombu has cleaned up")
        publish(door, [*encoded(events), *encoded([event("answered", late, questions_answered=1)])])
        workers.wait_until_empty()
        with celery(tmp_path / "beat.log", "quick_beat", "--workdir", str(tmp_path), "beat"):
            wait_until(lambda: database.dead_letters(late) != [], "the schedule has found what waits too long")
        publish(door, encoded(story), user="operator")
        workers.wait_until_empty()
        report = json.loads(run("interviews", "status", "--json", door=door, status=3))
        assert (report["stream_length"], report["messages_queued"], report["dead_letters_open"]) == (0, 0, 2)
        assert "unknown_user" in run("interviews", "dlq", "list", door=door)
        database.create_user(newcomer)
        assert "1 applied" in run("interviews", "dlq", "replay", "--reason", "unknown_user", door=door)
        admin.zadd(SWEPT, {"away": 1})
        admin.script_flush()  # as a restart of Redis would
        metrics = urllib.request.urlopen(f"http://127.0.0.1:{settings['INTERVIEW_METRICS_PORT']}").read()
        assert b"interview_redis_up 1.0" in metrics
        ping = ("inspect", "ping", "--timeout", "10", "--destination", "guarded@here")
        assert "pong" in run("celery", "-A", "worker", *ping, door=door)
        assert admin.zscore(SWEPT, "away") is None
        assert workers.stop(worker) == 0
    assert_rows_equal_their_stories(database, [*events, *story])
    assert refusals(admin) == []


def test_a_worker_takes_over_from_one_that_died_and_holds_and_nothing_is_refused(
    workers: Workers, door: Door, admin: Any, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    events = crowd(user, rng, events=100)
    with ExitStack() as running:
        patient = {
            "INTERVIEW_POOL": "threads",
            "INTERVIEW_RPC_TIMEOUT_SECONDS": "20",
            "INTERVIEW_RECLAIM_SECONDS": "60",
        }
        dies = running.enter_context(workers.running(**patient))
        with database.connection.transaction():
            database.connection.execute("lock table public.interview_events")  # nothing is applied meanwhile
            publish(door, encoded(events))
            wait_until(lambda: workers.stream.state().pending > 0, "the worker holds events")
            dies.kill()
            hasty = {"INTERVIEW_RPC_TIMEOUT_SECONDS": "0.5", "INTERVIEW_RECLAIM_SECONDS": "1"}
            heir = running.enter_context(workers.running(**hasty))
            wait_until(lambda: workers.hold() is not None, "the next worker has claimed them, and holds")
        workers.wait_until_empty()
        assert workers.stop(heir) == 0
    assert workers.logged("drain.reclaimed") != []
    assert_rows_equal_their_stories(database, events)
    assert refusals(admin) == []


def test_a_worker_drains_a_full_redis_and_nothing_is_refused(
    workers: Workers, door: Door, admin: Any, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    """And before it was full: a suspect alone, and what is on Celery's queue and cannot be read."""
    events = crowd(user, rng, events=100)
    publish(door, encoded(events[:1]))
    admin.xgroup_create(STREAM, GROUP, id="0")
    ((_, [(suspect, _)]),) = admin.xreadgroup(GROUP, "dead", {STREAM: ">"})
    admin.xclaim(STREAM, GROUP, "dead", 0, [suspect], idle=3_600_000, retrycount=SUSPECT_DELIVERIES, justid=True)
    with workers.running() as worker:
        admin.lpush("interview", "not JSON")
        wait_until(lambda: len(workers.logged("event.dead_lettered")) == 1, "what cannot be read is a dead letter")
        workers.wait_until_empty()
        assert [each["deliveries"] for each in workers.logged("drain.reclaimed")] == [SUSPECT_DELIVERIES + 1]
        admin.set(hold_key(STREAM), json.dumps({"reason": "a test", "since": time.time()}))
        wait_until(lambda: not claiming(admin), "no slot waits for events")
        publish(door, encoded(events[1:]))
        admin.config_set("maxmemory", 1)
        try:
            admin.delete(hold_key(STREAM))
            workers.wait_until_empty()
        finally:
            admin.config_set("maxmemory", 0)
        assert workers.stop(worker) == 0
    assert workers.logged("dispatcher.redis_full") != []
    assert_rows_equal_their_stories(database, events)
    assert refusals(admin) == []


def claiming(admin: Any) -> bool:
    return any(each["cmd"] == "xreadgroup" and "b" in each["flags"] for each in admin.client_list())


PROCESSES: Final = (
    test_a_worker_a_beat_the_engine_and_an_operator_do_all_their_work_and_nothing_is_refused,
    test_a_worker_takes_over_from_one_that_died_and_holds_and_nothing_is_refused,
    test_a_worker_drains_a_full_redis_and_nothing_is_refused,
)


def test_a_worker_may_run_no_command_that_it_does_not_need(request: pytest.FixtureRequest, door: Door) -> None:
    """By what the workers and the beat of the tests above have sent to Redis."""
    ran = {each.name for each in request.session.items}
    if not ran.issuperset(each.__name__ for each in PROCESSES):
        pytest.skip("needs the tests above, in the same run")
    (line,) = [line for line in USERS.read_text().splitlines() if line.startswith("user worker ")]
    granted = {word[1:] for word in line.split() if word.startswith("+") and "@" not in word}
    assert door.recorder is not None
    assert granted - door.recorder.commands - UNUSED_HERE.keys() == set()


def test_a_worker_makes_every_call_of_the_stream_and_of_the_hold(workers: Workers, door: Door, admin: Any) -> None:
    tries = iter([Unavailable("ill"), Unavailable("still ill"), None])

    def ill_twice() -> None:
        if (error := next(tries)) is not None:
            raise error

    with door.client("worker") as client:
        stream = EventStream(client, STREAM)
        assert stream.claim("a", 3, block_ms=1).entries == []  # which makes the group
        ids = stream.add([b"1", b"2", b"3"])
        assert stream.wait_for_undelivered(block_ms=1)
        claimed = stream.claim("a", 3, block_ms=1).entries
        assert stream.refresh("a", claimed, min_idle_ms=0, held=True) == set(ids)
        stream.give_back("a", claimed, idle_ms=1000)
        admin.xdel(STREAM, ids[0])  # by hand: its claim is to be dropped
        idle = stream.idle(idle_ms=1000, count=10)
        reclaimed = stream.reclaim("b", idle, idle_ms=1000).entries
        assert [entry.id for entry in reclaimed] == ids[1:]
        assert stream.state().pending == 2
        attempt = stream.attempt(ids[1])
        assert attempt.count() == 1
        attempt.withdraw()
        stream.acknowledge(ids[1:], attempted=True)
        assert stream.forget_consumers(idle_ms=-1) == 2
        stopping.wake(client, "nobody")
        assert stream.state().length == 0
        stopping.resume()
        Hold(client, load_settings().model_copy(update={"backoff_seconds": 0.01})).run(ill_twice)
    assert refusals(admin) == []


def test_a_worker_counts_what_dies_and_an_operator_lets_it_go_on(door: Door, admin: Any) -> None:
    with door.client("worker") as worker, door.client("operator") as operator:
        share = DeadShare(worker, STREAM, limit=0.5, at_least=1)
        outcomes = {"applied": 1, "rejected": 2}
        with worker.pipeline(transaction=False) as pipeline:
            share.count(pipeline, outcomes)
            pipeline.execute()
        share.close_where_too_many(outcomes)
        with pytest.raises(Misconfigured):
            share.check()
        assert Outcomes(operator, STREAM).last_minute()["rejected"] == 2
        assert DeadShare(operator, STREAM).resume(accept_seconds=60)
        share.check()
    assert refusals(admin) == []


def test_a_worker_tells_how_it_fares_and_an_operator_reads_it(door: Door, admin: Any) -> None:
    now = time.time()
    state = WorkerState(hostname="a", pid=1, started_at=now, told_at=now, state="running", packs=1)
    with door.client("worker") as worker, door.client("operator") as operator:
        WorkerStates(worker, STREAM).tell("a-1", state)
        assert WorkerStates(operator, STREAM).alive() == {"a-1": state}
        WorkerStates(worker, STREAM).forget("a-1")
    assert refusals(admin) == []


def test_an_operator_may_ask_how_redis_and_the_stream_fare(door: Door, admin: Any) -> None:
    admin.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
    with door.client("operator") as operator:
        assert operator.info()["aof_enabled"] == 1
        assert [group["name"] for group in operator.xinfo_groups(STREAM)] == [GROUP.encode()]
        assert operator.xpending_range(STREAM, GROUP, "-", "+", 1) == []
    assert refusals(admin) == []


@pytest.mark.parametrize(
    "words",
    [
        ("HINCRBY", f"{STREAM}:outcomes:1", "applied", 1),
        ("HSET", f"{STREAM}:workers", "a", "x"),
        ("XREADGROUP", "GROUP", GROUP, "me", "STREAMS", STREAM, ">"),
        ("XACK", STREAM, GROUP, "1-1"),
        ("XDEL", STREAM, "1-1"),
        ("XCLAIM", STREAM, GROUP, "me", 0, "1-1"),
        ("XAUTOCLAIM", STREAM, GROUP, "me", 0, "0"),
        ("MGET", STREAM),
        ("XREAD", "STREAMS", STREAM, "0"),
        ("XGROUP", "CREATE", STREAM, "mine", "0"),
        ("CLIENT", "LIST"),
        ("PSUBSCRIBE", "/0.celery.pidbox"),
        ("PUBLISH", "/0.celeryev/worker.heartbeat", "x"),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_an_operator_takes_nothing_from_the_workers(door: Door, words: Words) -> None:
    assert not door.may("operator", *words)


@pytest.mark.parametrize("channel", ["*", "/0.*", "/1.celery.pidbox", "somebody.elses"])
def test_a_worker_hears_only_celerys_channels_of_its_database(door: Door, channel: str) -> None:
    assert not door.may("worker", "PSUBSCRIBE", channel)
    assert not door.may("worker", "PUBLISH", channel, "x")
    assert door.may("worker", "PSUBSCRIBE", "/0.celery.pidbox")


def test_a_command_of_a_user_who_may_not_says_so_and_not_that_redis_is_away(workers: Workers, door: Door) -> None:
    done = ran("interviews", "status", url=door.url("engine"))
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("interviews: Redis refuses this user")
    assert "users.acl" in line
