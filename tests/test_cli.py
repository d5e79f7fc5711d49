"""The command line as an operator meets it: what is printed, the exit status, and what has changed."""

import json
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import click
import pytest
import redis
from click.testing import CliRunner

from tests.database import Database, event
from worker.cli.main import interviews
from worker.dead_letters import stored_text
from worker.embedded import Stack

INTERVIEWS = Path(sys.executable).parent / "interviews"
PATIENCE_SECONDS = 60
DONE, FAILED, WRONG_USAGE, NEEDS_A_PERSON = 0, 1, 2, 3
ASIDE = 9  # the number of a Redis database that no worker reads
UNKNOWN_ID = "987654321"

Finished = subprocess.CompletedProcess[str]
Bury = Callable[..., int]


@pytest.fixture
def environment(stack: Stack, database: Database) -> Iterator[dict[str, str]]:
    """The settings of the stack, with a stream of the test's own and no dead letters."""
    settings = stack.environment
    settings["REDIS_URL"] = settings["REDIS_URL"].removesuffix("/0") + f"/{ASIDE}"
    settings["INTERVIEW_STREAM"] = f"test:{uuid.uuid4()}"
    database.connection.execute("delete from public.interview_dead_letters")
    yield settings
    database.connection.execute("delete from public.interview_dead_letters")
    with redis.Redis.from_url(settings["REDIS_URL"]) as client:
        client.delete(settings["INTERVIEW_STREAM"])


@pytest.fixture
def bury(environment: dict[str, str], database: Database) -> Bury:
    """Records an event as a dead letter; answers the letter's id."""

    def record(
        raw: bytes | None = None, *, reason: str = "unknown_user", status: str = "open", session_id: str = "session_1"
    ) -> int:
        database.record_dead(
            event=stored_text(raw if raw is not None else json.dumps(event("paused", "session_1")).encode()),
            session_id=session_id,
            type="interview.paused",
            reason=reason,
            detail="told by the test",
        )
        row = database.one("select max(id) as id from public.interview_dead_letters")
        database.connection.execute(
            "update public.interview_dead_letters set status = %s where id = %s", (status, row["id"])
        )
        return cast(int, row["id"])

    return record


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is ours and where nobody listens."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield closed.getsockname()[1]


def run(*arguments: str | int, env: dict[str, str], stdin: bytes = b"") -> Finished:
    done = subprocess.run(
        [INTERVIEWS, *map(str, arguments)],
        env=env,
        input=stdin,
        capture_output=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )
    return Finished(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def the_line(done: Finished, status: int) -> str:
    """The one line that tells why a command did not do; there is nothing else."""
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (status, "")
    assert line.startswith("interviews: ")
    return line


def usage_error(done: Finished) -> str:
    """click's own message: the last of its lines."""
    assert (done.returncode, done.stdout) == (WRONG_USAGE, "")
    assert done.stderr.startswith("Usage: interviews")
    return done.stderr.splitlines()[-1]


def published(env: dict[str, str]) -> list[bytes]:
    with redis.Redis.from_url(env["REDIS_URL"]) as client:
        entries = cast("list[tuple[bytes, dict[bytes, bytes]]]", client.xrange(env["INTERVIEW_STREAM"]))
    return [fields[b"event"] for _, fields in entries]


def statuses(database: Database) -> dict[int, str]:
    return {row["id"]: row["status"] for row in database.all("select id, status from public.interview_dead_letters")}


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE_SECONDS} s: {what}"
        time.sleep(0.02)


def answered(number: int = 1, **data: Any) -> bytes:
    return json.dumps(event("answered", f"session_{number}", questions_answered=number, **data)).encode()


# -------------------------------------------------------------------------------------------------------------- help


def commands(command: click.Command, *path: str) -> Iterator[tuple[str, ...]]:
    if isinstance(command, click.Group):
        for name, member in command.commands.items():
            yield from commands(member, *path, name)
    else:
        yield path


@pytest.mark.parametrize("path", list(commands(interviews)), ids=" ".join)
def test_every_command_has_help_with_an_example_of_itself(path: tuple[str, ...]) -> None:
    told = CliRunner().invoke(interviews, [*path, "--help"], prog_name="interviews")

    assert told.exit_code == DONE
    assert f"Example: interviews {' '.join(path)}" in " ".join(told.output.split())


def test_the_commands_are_those_of_the_design() -> None:
    assert {" ".join(path) for path in commands(interviews)} >= {
        *(
            "up",
            "publish",
            "simulate",
            "status",
            "doctor",
            "resume",
            "sql",
            "verify",
            "session show",
            "session rebuild",
        ),
        *(
            f"dlq {name}"
            for name in ("list", "groups", "show", "replay", "edit", "discard", "restore", "export", "audit")
        ),
    }


def test_help_and_version_need_no_settings() -> None:
    assert "Dead letters" in run("dlq", "-h", env={}).stdout
    assert "version" in run("--version", env={}).stdout


def test_an_unknown_command_is_wrong_usage() -> None:
    assert usage_error(run("mend", env={})) == "Error: No such command 'mend'."


def test_sql_prints_both_files_in_their_order() -> None:
    files = [Path(line) for line in run("sql", "--list", env={}).stdout.splitlines()]

    assert [file.name for file in files] == [
        "supabase_table_interview_sessions.sql",
        "supabase_worker_interview_events.sql",
    ]
    assert run("sql", env={}).stdout.split() == "\n".join(file.read_text() for file in files).split()


# ----------------------------------------------------------------------------------------------------------- publish


def test_publish_names_bad_lines_by_number_and_publishes_the_rest(environment: dict[str, str], tmp_path: Path) -> None:
    secret = "what the candidate said"
    lines = [answered(1), b"", secret.encode(), answered(4), answered(5, mood=secret), b" \t", answered(7)]
    file = tmp_path / "events.jsonl"
    file.write_bytes(b"\r\n".join(lines))

    done = run("publish", str(file), env=environment)

    assert (done.returncode, done.stdout) == (FAILED, "3 published, 2 left out\n")
    assert [line.partition(": ")[0] for line in done.stderr.splitlines()] == ["line 3", "line 5"]
    assert secret not in done.stderr
    assert [json.loads(raw)["subject"] for raw in published(environment)] == ["session_1", "session_4", "session_7"]


def test_publish_counts_lines_beyond_one_round_trip(environment: dict[str, str]) -> None:
    lines = [*(answered(number) for number in range(1, 1202)), b"{", answered(1203)]

    done = run("publish", "-", env=environment, stdin=b"\n".join(lines))

    assert (done.returncode, done.stdout) == (FAILED, "1202 published, 1 left out\n")
    assert done.stderr.startswith("line 1202: invalid_json")
    assert [json.loads(raw)["subject"] for raw in published(environment)] == [
        f"session_{number}" for number in range(1, 1204) if number != 1202
    ]


def test_publish_needs_nothing_of_supabase(environment: dict[str, str]) -> None:
    only_redis = {name: environment[name] for name in ("REDIS_URL", "INTERVIEW_STREAM")}

    done = run("publish", "-", env=only_redis, stdin=answered())

    assert (done.returncode, done.stdout, done.stderr) == (DONE, "1 published\n", "")


def test_publish_of_nothing_is_done_at_once(environment: dict[str, str]) -> None:
    done = run("publish", "-", env=environment)

    assert (done.returncode, done.stdout, done.stderr) == (DONE, "0 published\n", "")


def test_publish_unchecked_sends_every_line_as_it_is(environment: dict[str, str]) -> None:
    lines = [answered(), b"not json", b'{"type": "interview.paused"}', b"\xff\x00"]

    done = run("publish", "--unchecked", "-", env=environment, stdin=b"\n".join(lines) + b"\n")

    assert (done.returncode, done.stdout) == (DONE, "4 published\n")
    assert published(environment) == lines


@pytest.mark.parametrize("arguments", [[], ["/no/such/file"], ["/"], ["-", "-"], ["--uncheked", "-"]])
def test_publish_used_wrongly_publishes_nothing(environment: dict[str, str], arguments: list[str]) -> None:
    done = run("publish", *arguments, env=environment, stdin=answered())

    assert usage_error(done).startswith("Error: ")
    assert published(environment) == []


# ------------------------------------------------------------------------------------------------- dlq list and show


def test_dlq_list_shows_open_letters_with_their_reasons(environment: dict[str, str], bury: Bury) -> None:
    first, second = bury(reason="orphaned"), bury()
    bury(status="discarded", reason="poison")

    done = run("dlq", "list", env=environment)

    assert (done.returncode, done.stderr) == (DONE, "")
    _header, *rows = done.stdout.splitlines()
    assert [row.split()[:3] for row in rows] == [
        [str(second), "open", "unknown_user"],
        [str(first), "open", "orphaned"],
    ]


@pytest.mark.parametrize("session_id", ["[/nope]", "[bold]session[/bold]", "\x1b[31mred"])
def test_dlq_list_shows_letters_whatever_their_names_are(
    environment: dict[str, str], bury: Bury, session_id: str
) -> None:
    bury(session_id=session_id)

    done = run("dlq", "list", env=environment)

    assert (done.returncode, done.stderr) == (DONE, "")
    assert session_id.replace("\x1b", "") in done.stdout
    assert "\x1b" not in done.stdout


def test_dlq_list_for_a_program_is_json(environment: dict[str, str], bury: Bury) -> None:
    wanted = bury(reason="orphaned")
    bury()

    done = run("dlq", "list", "--json", "--reason", "orphaned", env=environment)

    (letter,) = json.loads(done.stdout)
    assert (letter["id"], letter["reason"], letter["detail"]) == (wanted, "orphaned", "told by the test")
    assert "event" not in letter


@pytest.mark.parametrize(
    ("options", "told"),
    [([], "no open dead letters\n"), (["--status", "all"], "no dead letters\n"), (["--json"], "[]\n")],
)
def test_dlq_list_without_letters_says_so(environment: dict[str, str], options: list[str], told: str) -> None:
    done = run("dlq", "list", *options, env=environment)

    assert (done.returncode, done.stdout, done.stderr) == (DONE, told, "")


def test_dlq_list_of_every_status_tells_when_there_may_be_more(environment: dict[str, str], bury: Bury) -> None:
    for status in ("open", "replayed", "resolved", "discarded"):
        bury(status=status)

    done = run("dlq", "list", "--status", "all", "--limit", "3", "--json", env=environment)

    assert [letter["status"] for letter in json.loads(done.stdout)] == ["discarded", "resolved", "replayed"]


@pytest.mark.parametrize("options", [["--status", "dead"], ["--limit", "0"], ["--limit", "many"], ["7"]])
def test_dlq_list_used_wrongly_is_wrong_usage(environment: dict[str, str], options: list[str]) -> None:
    assert usage_error(run("dlq", "list", *options, env=environment)).startswith("Error: ")


def test_dlq_show_prints_the_event_as_it_was_received(environment: dict[str, str], bury: Bury) -> None:
    letter_id = bury('{"id" :  "ü", '.encode())

    done = run("dlq", "show", letter_id, env=environment)

    assert (done.returncode, done.stderr) == (DONE, "")
    assert done.stdout.endswith('\n\n{"id" :  "ü", \n')
    assert f"{'reason':16} unknown_user" in done.stdout.splitlines()


def test_dlq_show_for_a_program_is_json(environment: dict[str, str], bury: Bury) -> None:
    letter_id = bury(b"\xff")

    assert json.loads(run("dlq", "show", letter_id, "--json", env=environment).stdout)["event"] == "base64:/w=="


# -------------------------------------------------------------------------------------------- dlq replay and discard

REPLAY, DISCARD = ("replay", "--wait", "0"), ("discard", "--note", "a test")
replay_and_discard = pytest.mark.parametrize("command", [REPLAY, DISCARD], ids=["replay", "discard"])


@replay_and_discard
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "Error: name dead letters by ID, by a filter as --reason, or all of them by --all"),
        (["{id}", "--all"], "Error: name dead letters by ID, by a filter as --reason, or all of them by --all"),
        (
            ["{id}", "--reason", "unknown_user"],
            "Error: name dead letters by ID, by a filter as --reason, or all of them by --all",
        ),
        (
            ["--all", "--reason", "unknown_user"],
            "Error: name dead letters by ID, by a filter as --reason, or all of them by --all",
        ),
        (["{id}", "seven"], "Error: Invalid value for '[ID]...': 'seven' is not a valid integer range."),
    ],
)
def test_letters_named_in_the_wrong_way_are_left_as_they_are(
    environment: dict[str, str],
    database: Database,
    bury: Bury,
    command: tuple[str, ...],
    arguments: list[str],
    told: str,
) -> None:
    letter_id = bury()

    done = run("dlq", *command, *(each.format(id=letter_id) for each in arguments), env=environment)

    assert usage_error(done) == told
    assert (statuses(database), published(environment)) == ({letter_id: "open"}, [])


@pytest.mark.parametrize("command", [REPLAY, DISCARD, ("show",)], ids=["replay", "discard", "show"])
def test_an_unknown_letter_is_named_and_nothing_changes(
    environment: dict[str, str], database: Database, bury: Bury, command: tuple[str, ...]
) -> None:
    letter_id = bury()
    known = [] if command == ("show",) else [letter_id]

    done = run("dlq", *command, *known, UNKNOWN_ID, env=environment)

    assert f"no dead letter {UNKNOWN_ID}: " in the_line(done, FAILED)
    assert (statuses(database), published(environment)) == ({letter_id: "open"}, [])


@pytest.mark.parametrize("arguments", [["discard", "{id}"], ["replay", "{id}", "--wait", "-1"], ["show"]])
def test_other_misuse_of_dlq_is_wrong_usage_and_changes_nothing(
    environment: dict[str, str], database: Database, bury: Bury, arguments: list[str]
) -> None:
    letter_id = bury()

    done = run("dlq", *(each.format(id=letter_id) for each in arguments), env=environment)

    assert usage_error(done).startswith("Error: ")
    assert (statuses(database), published(environment)) == ({letter_id: "open"}, [])


@replay_and_discard
@pytest.mark.parametrize("status", ["resolved", "discarded"])
def test_a_letter_that_is_closed_is_left_as_it_is(
    environment: dict[str, str], database: Database, bury: Bury, command: tuple[str, ...], status: str
) -> None:
    letter_id = bury(status=status)

    done = run("dlq", *command, letter_id, env=environment)

    assert done.stderr == f"{letter_id}: not open, left as it is\n"
    assert done.stdout.startswith("0 ")
    assert (statuses(database), published(environment)) == ({letter_id: status}, [])


@pytest.mark.parametrize("raw", [b'{"id" :  1}', b"\xff\x00\xfe", b"base64:/w=="])
def test_replay_publishes_the_event_as_it_was_received(
    environment: dict[str, str], database: Database, bury: Bury, raw: bytes
) -> None:
    letter_id = bury(raw)

    done = run("dlq", *REPLAY, letter_id, env=environment)

    assert (done.returncode, done.stdout) == (DONE, "1 replayed: 0 applied, 0 failed again, 1 under way\n")
    assert (statuses(database), published(environment)) == ({letter_id: "replayed"}, [raw])


@pytest.mark.parametrize("options", [["--all", "--yes"], ["--reason", "orphaned"]])
def test_replay_takes_the_open_letters_that_the_option_names(
    environment: dict[str, str], database: Database, bury: Bury, options: list[str]
) -> None:
    orphan, other = bury(b"orphan", reason="orphaned"), bury(b"other")
    closed = bury(b"closed", reason="orphaned", status="resolved")

    run("dlq", *REPLAY, "--no-ladder", *options, env=environment)

    everything = "--all" in options
    assert statuses(database) == {orphan: "replayed", other: "replayed" if everything else "open", closed: "resolved"}
    assert published(environment) == [b"orphan", *([b"other"] if everything else [])]


def replay_and_then(
    env: dict[str, str], letter_id: int, answer: Callable[[dict[str, Any]], object]
) -> tuple[int, str, str]:
    """Replay a letter, with `answer` in the worker's stead."""
    with subprocess.Popen(
        [INTERVIEWS, "dlq", "replay", str(letter_id), "--wait", str(PATIENCE_SECONDS)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_until(lambda: bool(published(env)), "the event is in the stream")
        answer(json.loads(published(env)[0]))
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, out, err


def buried_start(database: Database) -> tuple[int, uuid.UUID]:
    """A start that died of its unknown user."""
    user = uuid.uuid4()
    started = event("started", f"session-{user}", user_id=str(user), email="late@example.com")
    assert database.apply(started) == ["rejected"]
    (letter,) = database.dead_letters(started["subject"])
    return letter["id"], user


def test_replay_tells_that_the_event_was_applied(environment: dict[str, str], database: Database) -> None:
    letter_id, user = buried_start(database)
    database.create_user(user)

    status, out, err = replay_and_then(environment, letter_id, database.apply)

    assert (status, out, err) == (DONE, "1 replayed: 1 applied, 0 failed again, 0 under way\n", "")
    assert statuses(database) == {letter_id: "resolved"}


def test_replay_tells_that_the_event_failed_again_and_why(environment: dict[str, str], database: Database) -> None:
    letter_id, _ = buried_start(database)

    status, out, err = replay_and_then(environment, letter_id, database.apply)

    assert (status, out) == (FAILED, "1 replayed: 0 applied, 1 failed again, 0 under way\n")
    assert err == f"{letter_id}: failed again, unknown_user: no such user in auth.users\n"
    assert statuses(database) == {letter_id: "open"}


def test_replay_while_redis_is_away_leaves_the_letters_open(
    environment: dict[str, str], database: Database, bury: Bury, closed_port: int
) -> None:
    letter_id = bury()

    done = run("dlq", *REPLAY, letter_id, env=environment | {"REDIS_URL": f"redis://127.0.0.1:{closed_port}/0"})

    assert "REDIS_URL" in the_line(done, FAILED)
    assert statuses(database) == {letter_id: "open"}


def test_discard_closes_letters_and_keeps_them_with_the_note(
    environment: dict[str, str], database: Database, bury: Bury
) -> None:
    ids = [bury(b"one"), bury(b"two")]
    left = bury(b"three")

    done = run("dlq", "discard", *ids, "--note", "an engine's test", env=environment)

    assert (done.returncode, done.stdout, done.stderr) == (DONE, "2 discarded\n", "")
    assert statuses(database) == {**dict.fromkeys(ids, "discarded"), left: "open"}
    notes = database.all("select distinct note from public.interview_dead_letters where status = 'discarded'")
    assert notes == [{"note": "an engine's test"}]
    assert published(environment) == []


# ------------------------------------------------------------------------------------------------------------ status


def test_status_without_dead_letters_is_well(environment: dict[str, str], bury: Bury) -> None:
    bury(status="discarded")
    bury(status="resolved")

    done = run("status", env=environment)

    assert (done.returncode, done.stderr) == (DONE, "")
    assert "0 open" in done.stdout


def test_status_with_an_open_dead_letter_needs_a_person(environment: dict[str, str], bury: Bury) -> None:
    bury()

    done = run("status", env=environment)

    assert (done.returncode, done.stderr) == (NEEDS_A_PERSON, "")
    assert "interviews dlq list" in done.stdout


def test_status_for_a_program_is_json(environment: dict[str, str], bury: Bury) -> None:
    bury()
    bury(status="replayed")
    run("publish", "-", env=environment, stdin=answered() + b"\n" + answered())

    report = json.loads(run("status", "--json", env=environment).stdout)

    assert (report["stream_length"], report["stream_claimed"], report["messages_queued"]) == (2, 0, 0)
    assert (report["dead_letters_open"], report["dead_letters_replayed"]) == (1, 1)
    assert (report["supabase"], report["hold"]) == ("ok", None)
    assert report["oldest_seconds"] >= 0


def test_status_while_supabase_is_away_shows_the_stream_all_the_same(
    environment: dict[str, str], closed_port: int
) -> None:
    away = f"http://127.0.0.1:{closed_port}"
    run("publish", "-", env=environment, stdin=answered())

    done = run("status", "--json", env=environment | {"SUPABASE_URL": away, "SUPABASE_REST_URL": away})

    report = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (DONE, "")  # nobody is needed: the workers hold and resume by themselves
    assert (report["stream_length"], report["dead_letters_open"]) == (1, None)
    assert report["supabase"].startswith("no answer from Supabase")


def test_status_with_a_wrong_key_needs_a_person_and_says_what_to_do(environment: dict[str, str]) -> None:
    done = run("status", env=environment | {"SUPABASE_SECRET_KEY": "wrong-secret"})

    assert (done.returncode, done.stderr) == (NEEDS_A_PERSON, "")
    assert "set SUPABASE_SECRET_KEY" in done.stdout
    assert "wrong-secret" not in done.stdout


# -------------------------------------------------------------------------------------------------- what may be away

OF_SUPABASE = [
    ("dlq", "list"),
    ("dlq", "show", "1"),
    ("dlq", "groups"),
    ("dlq", "export"),
    ("dlq", "audit"),
    ("dlq", *REPLAY, "--all", "--yes"),
    ("dlq", *DISCARD, "--all", "--yes"),
]


@pytest.mark.parametrize("command", [("status",), ("dlq", "list"), ("publish", "-")], ids=" ".join)
def test_missing_settings_are_one_line(command: tuple[str, ...]) -> None:
    assert "set REDIS_URL" in the_line(run(*command, env={}, stdin=answered()), WRONG_USAGE)


@pytest.mark.parametrize("command", [("status",), ("publish", "-"), ("publish", "--unchecked", "-")], ids=" ".join)
def test_a_redis_that_is_away_is_one_line(
    environment: dict[str, str], closed_port: int, command: tuple[str, ...]
) -> None:
    away = environment | {"REDIS_URL": f"redis://:a-password@127.0.0.1:{closed_port}/0"}

    line = the_line(run(*command, env=away, stdin=answered()), FAILED)

    assert "Redis" in line
    assert "a-password" not in line


def test_a_wrong_password_of_redis_is_one_line(environment: dict[str, str]) -> None:
    server = environment["REDIS_URL"].partition("@")[2]

    line = the_line(run("status", env=environment | {"REDIS_URL": f"redis://:a-password@{server}"}), FAILED)

    assert "REDIS_URL" in line
    assert "a-password" not in line


@pytest.mark.parametrize("command", OF_SUPABASE, ids=" ".join)
def test_a_supabase_that_is_away_is_one_line(
    environment: dict[str, str], database: Database, bury: Bury, closed_port: int, command: tuple[str, ...]
) -> None:
    letter_id, away = bury(), f"http://127.0.0.1:{closed_port}"

    done = run(*command, env=environment | {"SUPABASE_URL": away, "SUPABASE_REST_URL": away})

    assert the_line(done, FAILED) == "interviews: no answer from Supabase (ConnectError)"
    assert (statuses(database), published(environment)) == ({letter_id: "open"}, [])


@pytest.mark.parametrize("command", OF_SUPABASE, ids=" ".join)
def test_a_wrong_key_is_one_line_that_says_what_to_do(
    environment: dict[str, str], database: Database, bury: Bury, command: tuple[str, ...]
) -> None:
    letter_id = bury()

    line = the_line(run(*command, env=environment | {"SUPABASE_SECRET_KEY": "wrong-secret"}), FAILED)

    assert "set SUPABASE_SECRET_KEY" in line
    assert "wrong-secret" not in line
    assert (statuses(database), published(environment)) == ({letter_id: "open"}, [])


def test_a_key_with_too_few_rights_is_one_line(environment: dict[str, str], stack: Stack) -> None:
    key = stack.token("anon")

    line = the_line(run("dlq", "list", env=environment | {"SUPABASE_SECRET_KEY": key}), FAILED)

    assert "set SUPABASE_SECRET_KEY" in line
    assert key not in line
