"""The embedded stack: found by a second start, gone without a trace however it ends, and its data stay."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest
import redis

from tests.database import Database
from worker.embedded import Stack, StackError
from worker.sql_files import sql_files

INTERVIEWS = Path(sys.executable).parent / "interviews"
PATIENCE_SECONDS = 60
SERVERS = {"postgres", "redis", "postgrest"}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user may enter: as root, Postgres runs as another one."""
    home = Path(tempfile.mkdtemp(prefix="interviews-test-"))
    home.chmod(0o755)
    yield home / "stack"
    shutil.rmtree(home)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE_SECONDS} s: {what}"
        time.sleep(0.05)


def servers_of(folder: Path) -> set[str]:
    """The servers that run in a folder, found by the log that each process writes there."""
    found = set()
    for process in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):  # it has ended, or is none of ours
            found.add(Path(f"/proc/{process}/fd/1").readlink())
    return {log.stem for log in found if log.parent == folder / "log"}


def command(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [INTERVIEWS, *arguments],
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )


@contextmanager
def starting(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """`interviews up` in a process of its own, which is gone with its servers afterwards."""
    process = subprocess.Popen(
        [INTERVIEWS, "up", "--data", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_SECONDS)
        wait_until(lambda: not servers_of(folder), "all servers have ended")


@contextmanager
def up(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """`interviews up`, once it says that it runs."""
    with starting(folder) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first.startswith("# running"), first or process.communicate()
        yield process


def waits_for_a_signal(pid: int) -> bool:
    """Whether a process sleeps and would handle SIGTERM itself."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return status["State"].startswith("S") and bool(int(status["SigCgt"], 16) >> (signal.SIGTERM - 1) & 1)


def settings_of(folder: Path) -> dict[str, str]:
    settings = Stack.running(folder)
    assert settings is not None
    return settings


def exports(text: str) -> dict[str, str]:
    """The settings that a shell would take from what `up` prints."""
    lines = [line.removeprefix("export ") for line in text.splitlines() if line.startswith("export ")]
    return dict(line.split("=", 1) for line in lines)


# ------------------------------------------------------------------------------------------------------ in one process


def test_a_running_stack_is_found_and_a_stopped_one_is_not(folder: Path) -> None:
    assert Stack.running(folder) is None

    with Stack(folder) as stack:
        assert Stack.running(folder) == stack.environment
        assert servers_of(folder) == SERVERS

    assert Stack.running(folder) is None
    assert not servers_of(folder)


def test_a_second_stack_in_the_same_folder_is_refused_and_leaves_the_first_alone(folder: Path) -> None:
    with Stack(folder) as stack:
        with pytest.raises(StackError, match="is running in"), Stack(folder, temporary=True):
            pass

        assert settings_of(folder) == stack.environment
        assert redis.Redis.from_url(stack.environment["REDIS_URL"]).ping() is True


def test_two_stacks_in_two_folders_do_not_meet(stack: Stack, folder: Path) -> None:
    with Stack(folder) as other:
        assert set(other.environment.values()).isdisjoint(stack.environment.values())


def test_a_port_that_is_taken_before_its_server_starts_is_replaced(folder: Path) -> None:
    taken: list[socket.socket] = []

    class Robbed(Stack):
        def _apply_sql(self) -> None:
            super()._apply_sql()
            if not taken:
                taken.append(socket.create_server(("127.0.0.1", self._state["ports"]["postgrest"])))

    with Robbed(folder) as stack, taken[0] as thief:
        ports = stack._state["ports"]
        assert ports["postgrest"] != thief.getsockname()[1]
        assert len(set(ports.values())) == len(ports)
        assert stack.postgrest.ready()


def test_a_temporary_stack_leaves_no_folder(folder: Path) -> None:
    with Stack(folder, temporary=True) as stack:
        assert stack.folder.exists()

    assert not stack.folder.exists()


def test_data_and_settings_survive_a_restart(folder: Path) -> None:
    with Stack(folder) as stack:
        before = stack.environment
        with psycopg.connect(stack.database_url) as connection:
            connection.execute("insert into auth.users (email) values ('stays@example.com')")
        with redis.Redis.from_url(before["REDIS_URL"]) as client:
            client.xadd("interview:events", {"event": "stays"})

    with Stack(folder) as stack:
        assert stack.environment == before
        with psycopg.connect(stack.database_url) as connection:
            assert connection.execute("select email from auth.users").fetchall() == [("stays@example.com",)]
        with redis.Redis.from_url(before["REDIS_URL"]) as client:
            assert client.xlen("interview:events") == 1


def test_the_folder_keeps_its_secrets_from_other_users(folder: Path) -> None:
    with Stack(folder) as stack:
        secrets = [stack.folder / name for name in ("state.json", "redis.conf")]

        assert [oct(file.stat().st_mode & 0o077) for file in secrets] == ["0o0", "0o0"]
        assert not (stack.folder / "initdb-password").exists()


def test_data_of_another_postgres_are_refused_and_left_as_they_are(folder: Path) -> None:
    with Stack(folder) as stack:
        version = stack.folder / "postgres" / "PG_VERSION"

    with pytest.raises(StackError, match="holds Postgres 18 data, not 16"), Stack(folder, postgres_version=16):
        pass

    assert version.read_text().strip() == "18"
    assert not servers_of(folder)


def test_a_postgres_that_is_not_installed_is_one_line(folder: Path) -> None:
    with pytest.raises(StackError, match="Postgres 12 is not installed"), Stack(folder, postgres_version=12):
        pass


# ---------------------------------------------------------------------------------------------------- `interviews up`


def printed_until(word: str, process: subprocess.Popen[str]) -> str:
    """What the process has printed up to the line with this word."""
    assert process.stdout is not None
    lines: list[str] = []
    while not lines or word not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], f"it ended before it printed {word}"
    return "".join(lines)


def test_up_prints_the_settings_and_writes_them_where_a_shell_can_read_them(folder: Path) -> None:
    with up(folder) as process:
        env_file = folder / "env"
        printed = printed_until("DATABASE_URL", process)
        sourced = subprocess.check_output(["sh", "-c", f". {env_file} && echo $REDIS_URL $SUPABASE_URL"], text=True)

        settings = settings_of(folder)
        assert sourced.split() == [settings["REDIS_URL"], settings["SUPABASE_URL"]]
        assert env_file.stat().st_mode & 0o077 == 0
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_SECONDS)
        assert exports(printed) == settings


def test_a_second_up_prints_the_same_settings_and_ends_well(folder: Path) -> None:
    with up(folder) as process:
        second = command("up", "--data", str(folder))

        assert (second.returncode, second.stderr) == (0, "")
        assert "already running" in second.stdout
        assert exports(second.stdout) == settings_of(folder)
        assert process.poll() is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_up_leaves_no_process_behind_however_it_ends(folder: Path, number: signal.Signals) -> None:
    with up(folder) as process:
        assert servers_of(folder) == SERVERS

        process.send_signal(number)
        process.wait(PATIENCE_SECONDS)

        wait_until(lambda: not servers_of(folder), "its servers have ended")
        assert Stack.running(folder) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_up_leaves_no_process_behind_when_it_ends_at_its_start(folder: Path, number: signal.Signals) -> None:
    with starting(folder) as process:
        wait_until(lambda: "postgres" in servers_of(folder), "the first server has started")

        process.send_signal(number)
        process.wait(PATIENCE_SECONDS)

        assert process.returncode != 0
        wait_until(lambda: not servers_of(folder), "its servers have ended")
        assert Stack.running(folder) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_that_is_asked_to_stop_ends_well(folder: Path, number: signal.Signals) -> None:
    with up(folder) as process:
        wait_until(lambda: waits_for_a_signal(process.pid), "it has nothing to do but to wait")
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)

    assert (process.returncode, errors) == (0, "# stopping\n")


def test_what_was_committed_survives_a_kill(folder: Path) -> None:
    with up(folder) as process:
        with psycopg.connect(settings_of(folder)["DATABASE_URL"]) as connection:
            connection.execute("insert into auth.users (email) values ('stays@example.com')")
        process.kill()
        process.wait()
        wait_until(lambda: not servers_of(folder), "its servers have ended")

    with Stack(folder) as stack, psycopg.connect(stack.database_url) as connection:
        assert connection.execute("select email from auth.users").fetchall() == [("stays@example.com",)]


def test_up_starts_at_once_after_a_kill(folder: Path) -> None:
    with up(folder) as process:
        process.kill()
        process.wait()
        with Stack(folder) as stack:
            assert Stack.running(folder) == stack.environment


@pytest.mark.parametrize(
    "program",
    [
        "/bin/false",
        pytest.param("/does/not/exist"),
        pytest.param("/etc/passwd"),
    ],
)
def test_an_error_half_way_is_one_line_and_leaves_nothing_running(folder: Path, program: str) -> None:
    done = command("up", "--data", str(folder), environment={"POSTGREST_BIN": program})

    wait_until(lambda: not servers_of(folder), "the servers that had started have ended")
    assert Stack.running(folder) is None
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("interviews: ")
    assert "postgrest" in line or program in line


@pytest.mark.parametrize("data", ["/dev/null/stack", "/proc/stack"])
def test_a_folder_that_cannot_be_made_is_one_line(data: str) -> None:
    done = command("up", "--data", data)

    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert data in line


def test_after_an_error_half_way_the_next_start_does(folder: Path) -> None:
    assert command("up", "--data", str(folder), environment={"POSTGREST_BIN": "/bin/false"}).returncode == 1

    with Stack(folder) as stack:
        assert Stack.running(folder) == stack.environment


# ------------------------------------------------------------------------------------------------------------ the SQL

SCHEMA_QUERIES = {
    "columns": """
        select table_name, column_name, ordinal_position, data_type, is_nullable, column_default, is_identity
          from information_schema.columns where table_schema = 'public'""",
    "constraints": """
        select conrelid::regclass::text, conname, pg_get_constraintdef(oid)
          from pg_constraint where connamespace = 'public'::regnamespace""",
    "indexes": "select tablename, indexname, indexdef from pg_indexes where schemaname = 'public'",
    "functions": """
        select proname, pg_get_functiondef(oid), proacl::text, obj_description(oid)
          from pg_proc where pronamespace = 'public'::regnamespace""",
    "triggers": """
        select tgrelid::regclass::text, tgname, pg_get_triggerdef(oid), tgenabled::text
          from pg_trigger where not tgisinternal""",
    "policies": "select tablename, policyname, permissive, roles::text, cmd, qual, with_check from pg_policies",
    "relations": """
        select relname, relkind::text, relrowsecurity, relforcerowsecurity, relacl::text, reloptions::text,
               obj_description(oid), case when relkind = 'v' then pg_get_viewdef(oid) end
          from pg_class where relnamespace = 'public'::regnamespace""",
    "default privileges": "select defaclrole::regrole::text, defaclobjtype::text, defaclacl::text from pg_default_acl",
    "rows": """
        select (select count(*) from public.interview_sessions), (select count(*) from public.interview_events),
               (select count(*) from public.interview_dead_letters)""",
}


def schema(database: Database) -> dict[str, list[str]]:
    found = {}
    for name, query in SCHEMA_QUERIES.items():
        rows = database.connection.execute(query.encode()).fetchall()
        found[name] = sorted(json.dumps(row, default=str, sort_keys=True) for row in rows)
    return found


def test_the_sql_applied_again_changes_nothing(database: Database) -> None:
    before = schema(database)
    assert all(before[name] for name in SCHEMA_QUERIES if name != "default privileges")

    for _ in range(2):
        for file in sql_files():
            database.connection.execute(file.read_bytes())

    assert schema(database) == before
