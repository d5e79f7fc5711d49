"""The doctor: each fault is provoked on real servers, told, and mended by running the remedy's own lines."""

import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import jwt
import psycopg
import pytest
import redis
from psycopg.rows import dict_row

from events.publisher import FIELD
from tests.database import Database
from tests.test_security import REGIMES, fresh_database, rest_api
from tests.worker_process import QUICK, wait_until
from worker import stopping
from worker.database import Database as Supabase
from worker.database import Description
from worker.dead_share import DeadShare
from worker.doctor import Finding, examine, examine_environment
from worker.doctor.broker import Facts, version
from worker.doctor.supabase_api import RUN_SQL, check_functions, expected_functions
from worker.embedded import Stack
from worker.embedded.binaries import postgres_bin, redis_server
from worker.embedded.server import Server, free_port
from worker.hold import Hold, hold_key, read_hold
from worker.settings import load_settings
from worker.sql_files import sql_files, sql_version
from worker.stream import GROUP
from worker.worker_state import WorkerState, WorkerStates

BIN: Final = Path(sys.executable).parent
PATIENCE_SECONDS: Final = 60
DONE, WRONG_USAGE, NEEDS_A_PERSON = 0, 2, 3
OURS: Final = ("INTERVIEW_", "REDIS_", "SUPABASE_", "DATABASE_URL")
PASSWORD: Final = "the-doctor-s-own-password"
CLI: Final = r'redis-cli -u "${REDIS_URL/\/://default:}"'
EXPECTED: Final = frozenset({
    *("settings", "Redis", "Redis version", "Redis mode", "Redis role", "Redis persistence", "Redis eviction"),
    *("Redis memory", "Redis clock", "stream", "consumer group", "Celery queue", "workers", "dead share", "hold"),
    *("PostgREST pool", "Supabase key", "Supabase", "Supabase clock", "SQL functions"),
    *("apply_interview_events_summary", "record_dead_interview_events", "get_interview_timeline"),
    *("writing tables", "reading tables"),
})  # fmt: skip


# --------------------------------------------------------------------------------------------------- the patient


@dataclass
class Patient:
    """A Redis server, a database with a PostgREST, and the environment that leads to them."""

    environment: dict[str, str]
    client: Any  # redis-py types each answer as "maybe awaitable"
    database: Database
    folder: Path
    right: dict[str, str] = field(default_factory=dict)  # the environment as it was when all was well
    clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        self.right = dict(self.environment)

    @property
    def stream(self) -> str:
        return self.environment["INTERVIEW_STREAM"]

    @contextmanager
    def as_environment(self) -> Iterator[None]:
        """Our own environment is the patient's."""
        with pytest.MonkeyPatch.context() as patched:
            for name in [name for name in os.environ if name.startswith(OURS)]:
                patched.delenv(name)
            for name, value in self.environment.items():
                patched.setenv(name, value)
            yield

    def examined(self) -> list[Finding]:
        with self.as_environment():
            return list(examine_environment(clock=self.clock))

    def found(self, check: str) -> Finding:
        """What the check says, which is not "ok"."""
        (finding,) = [each for each in self.examined() if each.check == check and each.state != "ok"]
        assert finding.remedy
        return finding

    def failed(self, check: str) -> Finding:
        finding = self.found(check)
        assert finding.state == "failed"
        return finding

    def follow(self, finding: Finding) -> None:
        """Run the remedy as a person pastes it in a shell; who reads a placeholder fills in what is right."""
        assert finding.remedy is not None
        script = f"{finding.remedy}\nenv -0 > {self.folder / 'environment'}"
        subprocess.run(
            ["bash", "-euc", script], env=self.shell(), check=True, capture_output=True, timeout=PATIENCE_SECONDS
        )
        after = dict(each.split("=", 1) for each in (self.folder / "environment").read_text().split("\0") if each)
        told = {name: value for name, value in after.items() if name.startswith(OURS)}
        changed = {name for name in told if told[name] != self.environment.get(name)}
        self.environment = told | {name: self.right[name] for name in changed & self.right.keys()}

    def shell(self) -> dict[str, str]:
        """The environment of an operator's terminal, with the programs that a remedy may name."""
        programs = [str(self.folder), str(BIN), str(redis_server().parent), str(postgres_bin(18)), os.environ["PATH"]]
        rest = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        return {**rest, **self.environment, "PATH": ":".join(programs), "PGOPTIONS": "--client-min-messages=warning"}

    def is_well(self) -> bool:
        return all(finding.state == "ok" for finding in self.examined())

    def assert_well(self) -> None:
        assert [finding for finding in self.examined() if finding.state != "ok"] == []


def redis_with(folder: Path, port: int, *lines: str, password: str = PASSWORD) -> Server:
    file = folder / f"redis-{port}.conf"
    settings = ("bind 127.0.0.1", f"port {port}", f"requirepass {password}", f'dir "{folder}"', 'save ""', *lines)
    file.write_text("\n".join(settings) + "\n")
    return Server(
        name="redis",
        argv=[str(redis_server()), str(file)],
        log=folder / f"redis-{port}.log",
        ready=lambda: bool(redis.Redis(port=port, password=password).ping()),
    )


@pytest.fixture(scope="module")
def own_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose settings we may change; answers its URL."""
    port = free_port()
    server = redis_with(tmp_path_factory.mktemp("redis"), port, "appendonly yes", "maxmemory-policy noeviction")
    server.start()
    yield f"redis://:{PASSWORD}@127.0.0.1:{port}/0"
    server.stop()


@pytest.fixture(scope="module")
def own_database(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A database whose SQL we may hurt, as a superuser's URL, and the URL of its PostgREST."""
    log = tmp_path_factory.mktemp("postgrest") / "postgrest.log"
    regime = "nothing granted by default"
    assert regime in REGIMES
    with fresh_database(stack, regime) as name, rest_api(stack, name, log) as api:
        yield _url(stack, name), str(api.base_url)


def _url(stack: Stack, database: str) -> str:
    return stack.database_url.rpartition("/")[0] + f"/{database}"


@pytest.fixture
def patient(stack: Stack, own_redis: str, own_database: tuple[str, str], tmp_path: Path) -> Iterator[Patient]:
    """All is well at the beginning, and again at the end."""
    database_url, web = own_database
    environment = {
        "REDIS_URL": own_redis,
        "SUPABASE_URL": web,
        "SUPABASE_REST_URL": web,
        "SUPABASE_SECRET_KEY": stack.token("service_role"),
        "INTERVIEW_STREAM": f"test:{uuid.uuid4()}",
        "DATABASE_URL": database_url,
    }
    with (
        redis.Redis.from_url(own_redis) as client,
        psycopg.connect(database_url, autocommit=True, row_factory=dict_row) as connection,
    ):
        client.flushall()
        patient = Patient(environment, client, Database(connection), tmp_path)
        yield patient
        patient.client.config_set("appendonly", "yes")
        patient.client.config_set("maxmemory-policy", "noeviction")
        patient.client.config_set("maxmemory", "0")
        patient.client.execute_command("REPLICAOF", "NO", "ONE")
        for name in {user.split()[1] for user in patient.client.acl_list()} - {"default"}:
            patient.client.acl_deluser(name)


@pytest.fixture
def closed_port() -> int:
    return free_port()


# ------------------------------------------------------------------------------------------------------ all is well


def test_where_all_is_well_every_check_says_so_and_nothing_has_changed(patient: Patient) -> None:
    findings = patient.examined()

    assert {finding.check for finding in findings} == EXPECTED
    assert {finding.state for finding in findings} == {"ok"}
    assert {finding.remedy for finding in findings} == {None}
    assert patient.client.dbsize() == 0
    assert patient.database.one(
        "select (select count(*) from public.interview_sessions) + (select count(*) from public.interview_events)"
        " + (select count(*) from public.interview_dead_letters) as rows"
    ) == {"rows": 0}


def test_who_has_settings_may_have_them_examined(patient: Patient) -> None:
    with patient.as_environment():
        settings = load_settings()

    assert {finding.check for finding in examine(settings)} == EXPECTED - {"settings"}


# -------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("wrong", "told", "checked"),
    [
        ({"INTERVIEW_CONCURRENCY": "0"}, "INTERVIEW_CONCURRENCY", EXPECTED),
        ({"INTERVIEW_POOL": "gevent", "INTERVIEW_LOG_LEVEL": "LOUD"}, "INTERVIEW_LOG_LEVEL", EXPECTED),
        ({"INTERVIEW_RECLAIM_SECONDS": "3"}, "or work doubles", EXPECTED),
        ({"SUPABASE_SECRET_KEY": "two words"}, "characters that no key has", {"Redis", "hold"}),
        ({"SUPABASE_URL": ""}, "set SUPABASE_URL", {"Redis", "hold"}),
        ({"REDIS_URL": "127.0.0.1:6379", "INTERVIEW_CONCURRENCY": "many"}, "REDIS_URL", {"Supabase", "writing tables"}),
        ({"REDIS_URL": "", "SUPABASE_URL": "", "SUPABASE_SECRET_KEY": ""}, "set REDIS_URL", {"settings"}),
    ],
    ids=["one", "two", "times that do not fit", "key", "no URL", "redis and another", "none"],
)
def test_a_wrong_setting_is_told_and_the_rest_is_checked_all_the_same(
    patient: Patient, wrong: dict[str, str], told: str, checked: set[str]
) -> None:
    patient.environment |= wrong

    finding = patient.failed("settings")
    assert told in finding.told
    assert checked <= {each.check for each in patient.examined()}
    patient.follow(finding)

    patient.assert_well()


def test_a_mistyped_setting_is_told_though_nobody_reads_it(patient: Patient) -> None:
    patient.environment |= {"INTERVIEW_CONCURENCY": "3", "INTERVIEW_TEST_POSTGRES": "18"}

    patient.follow(patient.failed("settings"))

    assert patient.environment["INTERVIEW_CONCURRENCY"] == "3"
    patient.assert_well()


# ------------------------------------------------------------------------------------------------------------ Redis


def test_a_redis_that_is_away_is_back_when_it_is_started_as_told(patient: Patient, closed_port: int) -> None:
    url = f"redis://127.0.0.1:{closed_port}/0"
    patient.environment["REDIS_URL"] = url

    finding = patient.failed("Redis")
    assert "Supabase" in {each.check for each in patient.examined()}
    with started(finding, patient):
        wait_until(patient.is_well, "all is well")


@contextmanager
def started(finding: Finding, patient: Patient) -> Iterator[subprocess.Popen[bytes]]:
    """The program that the remedy's one command starts, in the foreground; killed at the end."""
    (command,) = commands(finding)
    with (patient.folder / "started.log").open("wb") as log:
        running = subprocess.Popen(
            ["bash", "-euc", f"exec {command}"],
            cwd=patient.folder,
            env=patient.shell() | QUICK,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        yield running
    finally:
        running.terminate()
        running.wait(PATIENCE_SECONDS)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("redis://127.0.0.1:{port}/0", "refuses the password"),
        ("redis://:not-the-password@127.0.0.1:{port}/0", "refuses the password"),
        ("redis://:{password}@127.0.0.1:{port}/4711", "out of range"),
    ],
    ids=["no password", "a wrong one", "no such database"],
)
def test_a_redis_that_refuses_us_is_told_without_the_password(patient: Patient, wrong: str, told: str) -> None:
    port = patient.client.connection_pool.connection_kwargs["port"]
    patient.environment["REDIS_URL"] = wrong.format(port=port, password=PASSWORD)

    finding = patient.failed("Redis")
    assert told in finding.told
    assert "password@" not in str(patient.examined())
    patient.follow(finding)

    patient.assert_well()


def a_replica(client: Any) -> None:
    client.execute_command("REPLICAOF", "127.0.0.1", str(free_port()))


def nearly_full(client: Any) -> None:
    client.config_set("maxmemory", client.info("memory")["used_memory"] + 20_000)


@pytest.mark.parametrize(
    ("check", "hurt"),
    [
        ("Redis persistence", lambda client: client.config_set("appendonly", "no")),
        ("Redis eviction", lambda client: client.config_set("maxmemory-policy", "allkeys-lru")),
        ("Redis memory", nearly_full),
        ("Redis role", a_replica),
    ],
    ids=["persistence", "eviction", "memory", "role"],
)
def test_a_redis_that_would_lose_or_refuse_events_is_mended_by_the_remedy(
    patient: Patient, check: str, hurt: Callable[[Any], None]
) -> None:
    hurt(patient.client)

    patient.follow(patient.failed(check))

    patient.assert_well()


def test_what_config_set_mends_is_in_redis_own_file_for_the_next_start(patient: Patient) -> None:
    patient.client.config_set("appendonly", "no")

    patient.follow(patient.failed("Redis persistence"))

    assert "appendonly yes" in Path(patient.client.info("server")["config_file"]).read_text().splitlines()


def as_user(patient: Patient, *rules: str) -> None:
    """Redis knows us as another user from now on."""
    patient.client.execute_command("ACL", "SETUSER", "guest", "on", f">{PASSWORD}", "~*", "&*", "+@all", *rules)
    patient.environment["REDIS_URL"] = patient.environment["REDIS_URL"].replace("redis://:", "redis://guest:")


def test_a_redis_that_refuses_config_and_has_no_file_cannot_tell_whether_it_keeps_events(patient: Patient) -> None:
    """As one that somebody manages for us: it may keep events in a way of its own."""
    patient.client.config_set("appendonly", "no")
    as_user(patient, "-config")

    finding = patient.found("Redis persistence")

    assert (finding.state, finding.told) == ("unknown", "it tells of no append-only file, and CONFIG is refused")
    patient.follow(finding)  # it shows where to look, and changes nothing
    assert not patient.is_well()


def test_a_wrong_policy_is_told_though_config_is_refused(patient: Patient) -> None:
    patient.client.config_set("maxmemory-policy", "volatile-ttl")
    as_user(patient, "-config")

    finding = patient.failed("Redis eviction")

    assert finding.remedy is not None
    (setting,) = re.findall(r"maxmemory-policy (\w+)$", finding.remedy)
    patient.client.config_set("maxmemory-policy", setting)  # the provider's settings
    patient.assert_well()


def test_a_user_who_may_not_look_learns_what_to_look_at(patient: Patient) -> None:
    as_user(patient, "-@dangerous", "+client")  # redis-py tells its name

    unknown = {finding.check for finding in patient.examined() if finding.state != "ok"}

    assert unknown == {"Redis persistence", "Redis eviction", "Redis memory"}
    assert patient.found("Redis memory").state == "unknown"


def test_a_user_who_may_only_publish_cannot_look_at_the_work(patient: Patient) -> None:
    as_user(patient, "-@all", "+@connection", "+time", "+xadd")

    assert patient.found("Redis user").state == "unknown"
    assert "Supabase" in {each.check for each in patient.examined()}


def test_a_cluster_is_told_and_not_looked_into(patient: Patient) -> None:
    port = free_port()
    cluster = redis_with(patient.folder, port, "cluster-enabled yes", "appendonly no")
    cluster.start()
    try:
        patient.environment["REDIS_URL"] = f"redis://:{PASSWORD}@127.0.0.1:{port}/0"
        finding = patient.failed("Redis mode")
        assert "stream" not in {each.check for each in patient.examined()}
        patient.follow(finding)
    finally:
        cluster.stop()

    patient.assert_well()


@pytest.mark.parametrize(
    ("told", "state"),
    [("6.2.0", "ok"), ("7.4.1", "ok"), ("10.0", "ok"), ("6.0.16", "failed"), ("5.0.7", "failed"), ("", "unknown")],
)
def test_redis_must_be_6_2_or_newer(told: str, state: str) -> None:
    assert version(Facts(hello={"version": told})).state == state
    assert version(Facts(info={"redis_version": told})).state == state


# --------------------------------------------------------------------------------------------------------- the work


@pytest.mark.parametrize("check", ["stream", "Celery queue"])
def test_a_key_that_holds_something_else_is_moved_out_of_the_way(patient: Patient, check: str) -> None:
    key = {"stream": patient.stream, "Celery queue": f"interview:{patient.stream}"}[check]
    patient.client.set(key, "somebody else's")

    patient.follow(patient.failed(check))

    patient.assert_well()
    assert patient.client.get(f"{key}:moved") == b"somebody else's"


@pytest.mark.parametrize("protocol", [2, 3])
def test_entries_that_the_group_has_passed_over_are_handed_out_again(patient: Patient, protocol: int) -> None:
    patient.environment["REDIS_URL"] += f"?protocol={protocol}"
    assert patient.is_well()
    patient.client.xadd(patient.stream, {FIELD: b"{}"})
    patient.client.xgroup_create(patient.stream, GROUP, id="$")

    patient.follow(patient.failed("consumer group"))

    assert patient.client.xreadgroup(GROUP, "somebody", {patient.stream: ">"})
    (group,) = [each for each in patient.examined() if each.check == "consumer group"]
    assert (group.state, group.told) == ("ok", f"{GROUP}, 1 entries claimed")


def test_events_that_wait_are_applied_when_a_worker_is_started_as_told(patient: Patient) -> None:
    patient.client.xadd(patient.stream, {FIELD: b"no event"})

    finding = patient.failed("workers")
    assert finding.told == "none runs, and 1 events wait"
    with started(finding, patient):
        wait_until(lambda: patient.client.xlen(patient.stream) == 0, "the event has left the stream")
        wait_until(patient.is_well, "all is well")
    patient.database.connection.execute("truncate public.interview_dead_letters")


def tell(
    patient: Patient, *, state: str = "running", workers: int = 1, hostname: str = "celery@host", pid: int = 1
) -> None:
    """Tell of workers as they do of themselves."""
    now = time.time()
    for number in range(workers):
        told = WorkerState(hostname=hostname, pid=pid, started_at=now, told_at=now, state=state, packs=3)
        WorkerStates(patient.client, patient.stream).tell(f"celery@host-{number}", told)


def test_a_worker_that_stands_still_is_ended_by_the_remedy(patient: Patient) -> None:
    stalled = subprocess.Popen(["sleep", str(PATIENCE_SECONDS)])
    tell(patient, state="stalled: the dispatcher has stood still for 61 s", pid=stalled.pid)

    finding = patient.failed("workers")
    assert finding.told == "celery@host is stalled: the dispatcher has stood still for 61 s"
    patient.follow(finding)

    assert stalled.wait(PATIENCE_SECONDS) == -15
    WorkerStates(patient.client, patient.stream).forget("celery@host-0")  # as a worker does that ends
    patient.assert_well()


def close_latch(patient: Patient, outcomes: dict[str, int]) -> None:
    share = DeadShare(patient.client, patient.stream, limit=0.5, at_least=10)
    with patient.client.pipeline(transaction=False) as pipeline:
        share.count(pipeline, outcomes)
        pipeline.execute()
    share.close_where_too_many(outcomes)


def test_a_latch_that_too_many_dead_letters_closed_is_opened_by_the_remedy(patient: Patient) -> None:
    close_latch(patient, {"invalid_event": 20})

    finding = patient.failed("dead share")
    assert "20 as invalid_event" in finding.told
    patient.follow(finding)

    patient.assert_well()


def test_a_hold_ends_when_what_the_doctor_finds_is_mended(patient: Patient) -> None:
    patient.database.connection.execute("drop function public.apply_interview_events_summary(jsonb)")
    with patient.as_environment():
        settings = load_settings()
    hold = Hold(patient.client, settings.model_copy(update={"backoff_seconds": 0.1, "rpc_timeout_seconds": 2.0}))
    supabase = Supabase(settings)
    stopping.resume()
    task = threading.Thread(target=hold.run, args=(lambda: supabase.apply_pack([]),))
    task.start()
    try:
        wait_until(lambda: read_hold(patient.client, hold_key(patient.stream)) is not None, "a hold is in force")
        assert "function or table is missing" in patient.failed("hold").told
        patient.follow(patient.failed("SQL functions"))
        wait_until(patient.is_well, "all is well")
    finally:
        stopping.stop()
        task.join()
        stopping.resume()
        supabase.close()


def test_a_hold_that_passes_by_itself_is_no_fault(patient: Patient) -> None:
    state = {"reason": "no answer from Supabase (ConnectError)", "since": time.time() - 90, "remedy": None}
    patient.client.set(hold_key(patient.stream), json.dumps(state))

    finding = patient.found("hold")

    assert (finding.state, finding.told) == ("unknown", "for 90 s: no answer from Supabase (ConnectError)")


def test_what_others_wrote_is_no_command_in_a_remedy(patient: Patient) -> None:
    state = {"reason": "r", "since": time.time(), "remedy": "this,\nexit 7"}
    patient.client.set(hold_key(patient.stream), json.dumps(state))
    tell(patient, state="stalled: s", hostname="celery@host\nexit 7", pid=4711)

    assert commands(patient.failed("hold")) == []
    assert commands(patient.failed("workers")) == ["kill -TERM 4711"]


def commands(finding: Finding) -> list[str]:
    assert finding.remedy is not None
    return [line for line in finding.remedy.splitlines() if not line.startswith("#")]


def test_more_calls_at_once_than_a_small_pool_serves_are_told(patient: Patient) -> None:
    tell(patient, workers=6)

    finding = patient.found("PostgREST pool")
    assert (finding.state, "18 calls at once" in finding.told) == ("unknown", True)
    patient.follow(finding)

    patient.assert_well()


# ----------------------------------------------------------------------------------------------------------- clocks


@pytest.mark.parametrize("ahead", [60.0, -60.0, 7.0])
def test_a_clock_that_is_wrong_is_told_and_set_by_the_remedy(patient: Patient, ahead: float) -> None:
    mended = patient.folder / "mended"
    sudo = patient.folder / "sudo"  # in place of the one that would set this machine's clock
    sudo.write_text(f'#!/bin/sh\ntest "$*" = "timedatectl set-ntp true" && touch {mended}\n')
    sudo.chmod(0o755)
    patient.clock = lambda: time.time() + (0.0 if mended.exists() else ahead)

    wrong = {finding.check: finding for finding in patient.examined() if finding.state == "failed"}
    assert wrong.keys() == {"Redis clock", "Supabase clock"}
    assert ("ahead of" if ahead > 0 else "behind") in wrong["Redis clock"].told
    patient.follow(wrong["Supabase clock"])

    patient.assert_well()


def test_a_clock_may_differ_by_some_seconds(patient: Patient) -> None:
    patient.clock = lambda: time.time() + 3.0

    patient.assert_well()


# --------------------------------------------------------------------------------------------------- Supabase's key


def a_jwt(**claims: Any) -> str:
    return jwt.encode(claims, "a secret that nobody asks for, of 32 bytes or more", algorithm="HS256")


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("sb_publishable_0123456789", "sb_pub... is the publishable key"),
        (a_jwt(role="anon", exp=4102444800), "is the anon key"),
        (a_jwt(role="authenticated", sub=str(uuid.uuid4())), "is a JWT of role authenticated"),
        (a_jwt(role="service_role", exp=1577836800), "ended on 2020-01-01"),
        (a_jwt(role="service_role", exp=int(time.time()) + 86400), "ends on"),
        (a_jwt(role="service_role", exp=-1e300), "ended on 1970-01-01"),
        (a_jwt(role="service_role")[:60], "is a JWT that is cut or mistyped"),
    ],
    ids=["publishable", "anon", "a user's", "expired", "soon", "long ago", "cut"],
)
def test_a_key_that_is_not_the_secret_one_is_told_by_six_characters(patient: Patient, key: str, told: str) -> None:
    patient.environment["SUPABASE_SECRET_KEY"] = key

    finding = patient.failed("Supabase key")
    assert told in finding.told
    assert key[:7] not in str(patient.examined())
    patient.follow(finding)

    patient.assert_well()


@pytest.mark.parametrize(
    ("key", "state", "told"),
    [
        ("sb_secret_0123456789", "ok", "sb_sec..., a secret key"),
        ("a-key-of-somebody-else", "unknown", "a-key-... begins as no key of Supabase does"),
        (a_jwt(role="service_role"), "ok", "eyJhbG..., a service_role JWT without an end"),
        (a_jwt(role="service_role", exp=1e300), "ok", "eyJhbG..., a service_role JWT until 9999-12-31"),
    ],
    ids=["secret", "neither", "no end", "no end in sight"],
)
def test_a_key_that_is_not_this_projects_is_refused_by_it(patient: Patient, key: str, state: str, told: str) -> None:
    patient.environment["SUPABASE_SECRET_KEY"] = key

    found = {finding.check: finding for finding in patient.examined()}
    assert (found["Supabase key"].state, found["Supabase key"].told) == (state, told)
    assert "the key is not accepted" in found["Supabase"].told
    patient.follow(found["Supabase"])

    patient.assert_well()


def test_a_key_of_another_project_is_told(patient: Patient) -> None:
    patient.environment |= {
        "SUPABASE_URL": "https://abcdefghijklmnopqrst.supabase.co",
        "SUPABASE_SECRET_KEY": a_jwt(role="service_role", ref="zyxwvutsrqponmlkjihg", exp=4102444800),
    }

    assert "project zyxwvutsrqponmlkjihg" in patient.failed("Supabase key").told


# --------------------------------------------------------------------------------------------------- Supabase's API


def test_a_supabase_that_does_not_answer_is_told(patient: Patient, closed_port: int) -> None:
    away = f"http://127.0.0.1:{closed_port}"
    patient.environment |= {"SUPABASE_URL": away, "SUPABASE_REST_URL": ""}

    finding = patient.failed("Supabase")
    assert finding.told == f"127.0.0.1:{closed_port}: no answer from Supabase (ConnectError)"
    patient.environment["SUPABASE_REST_URL"] = patient.right["SUPABASE_REST_URL"]  # ours needs both
    patient.follow(finding)

    patient.assert_well()


@pytest.mark.parametrize(
    "url",
    ["http://abcdefghijklmnopqrst.supabase.co", "https://abcdefghijklmnopqrst.supabase.co/rest/v1/"],
    ids=["not encrypted", "a path too many"],
)
def test_an_url_of_supabase_with_something_wrong_is_corrected(patient: Patient, url: str, closed_port: int) -> None:
    patient.environment |= {"SUPABASE_URL": url, "SUPABASE_REST_URL": f"http://127.0.0.1:{closed_port}"}
    patient.right.pop("SUPABASE_URL")

    patient.follow(patient.failed("Supabase"))

    assert patient.environment["SUPABASE_URL"] == "https://abcdefghijklmnopqrst.supabase.co"


@contextmanager
def answering(status: int, kind: str, body: str) -> Iterator[str]:
    """A server that always says the same; answers its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (200, "text/html", "<title>Welcome</title>"),
        (200, "application/json", '{"hello": "world"}'),
        (200, "application/json", "[1]"),
        (404, "application/json", '{"message": "no Route matched"}'),
    ],
    ids=["a web page", "another API", "a list", "nothing there"],
)
def test_an_url_where_no_supabase_is_is_told(patient: Patient, status: int, kind: str, body: str) -> None:
    with answering(status, kind, body) as url:
        patient.environment |= {"SUPABASE_URL": url, "SUPABASE_REST_URL": url}
        finding = patient.failed("Supabase")
        assert "writing tables" not in {each.check for each in patient.examined()}
    patient.environment["SUPABASE_REST_URL"] = patient.right["SUPABASE_REST_URL"]
    patient.follow(finding)

    patient.assert_well()


def test_a_postgrest_that_does_not_describe_itself_is_checked_by_calls(
    patient: Patient, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGRST_OPENAPI_MODE", "disabled")
    name = patient.environment["DATABASE_URL"].rpartition("/")[2]
    with rest_api(stack, name, patient.folder / "postgrest.log") as api:
        patient.environment["SUPABASE_REST_URL"] = str(api.base_url)
        found = {finding.check: finding.state for finding in patient.examined()}

    assert found.pop("SQL functions") == "unknown"
    assert found.keys() == EXPECTED - {"SQL functions", "Supabase clock"}
    assert set(found.values()) == {"ok"}


# ---------------------------------------------------------------------------------------------------------- our SQL


@pytest.mark.parametrize(
    ("checks", "hurt"),
    [
        (
            {"SQL functions", "record_dead_interview_events"},
            "drop function public.record_dead_interview_events(jsonb)",
        ),
        (
            {"SQL functions", "apply_interview_events_summary"},
            "revoke execute on function public.apply_interview_events_summary(jsonb) from service_role",
        ),
        ({"SQL functions"}, "drop function public.cancel_interview(text, text)"),
        (
            {"writing tables", "reading tables"},
            "revoke insert on public.interview_events from service_role;"
            " revoke select on public.interview_dead_letters from service_role",
        ),
        (
            {"SQL functions", "get_interview_timeline", "writing tables", "reading tables"},
            "drop table public.interview_events cascade",
        ),
    ],
    ids=["a function", "a grant", "one of the seed's", "the tables' grants", "a table"],
)
def test_what_is_missing_in_the_database_is_mended_by_the_remedy(patient: Patient, checks: set[str], hurt: str) -> None:
    patient.database.connection.execute(f"begin; {hurt}; notify pgrst, 'reload schema'; commit".encode())
    try:
        wait_until(lambda: checks <= wrong(patient), f"{checks} fail")
        finding = patient.failed(min(checks))
        assert finding.remedy == RUN_SQL
        patient.follow(finding)
        wait_until(patient.is_well, "all is well")
    finally:
        for file in sql_files():
            patient.database.connection.execute(file.read_bytes())


def wrong(patient: Patient) -> set[str]:
    return {finding.check for finding in patient.examined() if finding.state != "ok"}


def test_functions_are_expected_as_postgres_has_them(patient: Patient) -> None:
    there = patient.database.all(
        "select proname, coalesce(proargnames[:pronargs], '{}') as names from pg_proc"
        " where pronamespace = 'public'::regnamespace and has_function_privilege('service_role', oid, 'execute')"
    )

    assert expected_functions() == {row["proname"]: frozenset(row["names"]) for row in there}


def test_a_function_that_lacks_a_parameter_is_older_than_the_worker() -> None:
    there = expected_functions()

    older = {**there, "complete_interview": frozenset({"p_session_id"})}
    finding = check_functions(Description(older, sql_version(), None))

    assert finding.state == "failed"
    assert "complete_interview (p_completed_at, p_feedback, p_score)" in finding.told


def test_functions_of_another_version_are_found_out(patient: Patient) -> None:
    patient.database.connection.execute(
        "comment on function public.apply_interview_events(jsonb) is 'Applies a pack of events. Version 0123abcd.'"
    )
    patient.database.connection.execute("notify pgrst, 'reload schema'")
    finding = patient.failed("SQL functions")
    assert f"0123abcd, not {sql_version()}" in finding.told

    patient.follow(finding)

    patient.assert_well()


# ------------------------------------------------------------------------------------------------- the command line


def run(patient: Patient, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "interviews", "doctor", *arguments],
        env=patient.shell() | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )


def test_the_command_tells_every_check_and_below_it_what_mends_it(patient: Patient) -> None:
    patient.client.config_set("appendonly", "no")

    done = run(patient)

    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (NEEDS_A_PERSON, "")
    place = next(number for number, line in enumerate(lines) if line.startswith("✗ Redis persistence"))
    assert lines[place + 1] == f"    {CLI} CONFIG SET appendonly yes"
    assert lines[-1] == f"{len(EXPECTED) - 1} ok, 1 failed, 0 cannot tell"


def test_the_command_for_a_program_is_json(patient: Patient) -> None:
    tell(patient, workers=6)

    done = run(patient, "--json")

    found = {each["check"]: each for each in json.loads(done.stdout)}
    assert (done.returncode, done.stderr) == (DONE, "")
    assert set(found) == EXPECTED
    assert found["Redis"].keys() == {"check", "state", "told", "remedy"}
    assert found["PostgREST pool"]["state"] == "unknown"


def test_the_command_without_any_setting_says_what_to_set(patient: Patient) -> None:
    patient.environment = {}

    done = run(patient)

    assert (done.returncode, done.stderr) == (NEEDS_A_PERSON, "")
    assert "export REDIS_URL=" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 ok, 1 failed, 0 cannot tell"


def test_the_command_used_wrongly_is_wrong_usage(patient: Patient) -> None:
    done = run(patient, "--mend")

    assert (done.returncode, done.stdout) == (WRONG_USAGE, "")


def test_a_terminal_without_unicode_is_served_too(patient: Patient) -> None:
    patient.environment["INTERVIEW_STREAM"] = "interviews of today"

    done = run(patient, PYTHONIOENCODING="ascii")

    assert (done.returncode, done.stderr) == (DONE, "")
    assert done.stdout.startswith("+ settings ")


def test_on_a_narrow_screen_what_is_to_be_copied_stays_in_one_line(patient: Patient) -> None:
    patient.client.config_set("maxmemory-policy", "allkeys-lru")
    ours, theirs = pty.openpty()
    narrow = patient.shell() | {"COLUMNS": "40", "TERM": "xterm"}
    with subprocess.Popen([BIN / "interviews", "doctor"], env=narrow, stdout=theirs, stderr=theirs) as done:
        os.close(theirs)
        shown = all_of(ours)
    os.close(ours)

    assert done.returncode == NEEDS_A_PERSON
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert f"    {CLI} CONFIG SET maxmemory-policy noeviction\r\n" in plain
    assert max(len(line) for line in plain.splitlines() if not line.startswith("    ")) <= 40


def all_of(terminal: int) -> str:
    """What a terminal shows until its last program has ended, which Linux tells by an error."""
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError:
            return shown.decode()
