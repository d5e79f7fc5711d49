"""Settings: read once from the environment; a wrong or missing one is one line that names it, and exit status 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from worker.errors import SettingsError
from worker.settings import Settings, StreamSettings, load_settings

BIN = Path(sys.executable).parent
SECRET = "top-secret-value"
COMPLETE = {
    "REDIS_URL": f"redis://:{SECRET}@127.0.0.1:1/0",
    "SUPABASE_URL": "https://project.supabase.co",
    "SUPABASE_SECRET_KEY": SECRET,
}
# What the variable must be, with values that are not.
WRONG = [
    *[("REDIS_URL", value) for value in ("127.0.0.1:6379", f"http://:{SECRET}@127.0.0.1")],
    *[("SUPABASE_URL", value) for value in ("project.supabase.co", "ftp://project")],
    *[("SUPABASE_REST_URL", value) for value in ("project.supabase.co",)],
    *[("INTERVIEW_PACK_SIZE", value) for value in ("0", "1001", "many", "1.5")],
    *[("INTERVIEW_CONCURRENCY", value) for value in ("0", "65", "two")],
    *[("INTERVIEW_POOL", value) for value in ("gevent",)],
    *[("INTERVIEW_LOG_LEVEL", value) for value in ("loud", "info")],
    *[
        (f"INTERVIEW_{name.upper()}", value)
        for name in Settings.model_fields
        if name.endswith("_seconds")
        for value in ("0", "-1", "soon", "nan", "inf")
    ],
]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment with what is needed and nothing else that could be a setting."""
    for name in list(os.environ):
        if name.startswith(("INTERVIEW_", "REDIS_", "SUPABASE_")):
            monkeypatch.delenv(name)
    for name, value in COMPLETE.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def complaint(kind: type[StreamSettings] = Settings) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(kind)
    told = str(caught.value)
    assert "\n" not in told
    assert SECRET not in told + repr(caught.value)
    assert caught.value.__cause__ is None
    return told


def test_three_variables_are_enough(environment: pytest.MonkeyPatch) -> None:
    settings = load_settings()

    assert settings.redis_url.get_secret_value() == COMPLETE["REDIS_URL"]
    assert settings.supabase_url == COMPLETE["SUPABASE_URL"]
    assert settings.supabase_secret_key.get_secret_value() == SECRET
    assert settings.stream == "interview:events"


def test_every_other_setting_comes_from_its_variable(environment: pytest.MonkeyPatch) -> None:
    for name, value in {"STREAM": "other", "PACK_SIZE": "7", "POOL": "threads", "HOLD_SECONDS": "0.5"}.items():
        environment.setenv(f"INTERVIEW_{name}", value)

    settings = load_settings()

    assert (settings.stream, settings.pack_size, settings.pool, settings.hold_seconds) == ("other", 7, "threads", 0.5)


@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("missing", COMPLETE)
def test_a_missing_or_empty_variable_is_named(environment: pytest.MonkeyPatch, missing: str, empty: bool) -> None:
    environment.delenv(missing)
    if empty:
        environment.setenv(missing, "")

    told = complaint()

    assert f"set {missing} " in told
    assert not any(name in told for name in COMPLETE if name != missing)


def test_all_missing_variables_are_named_in_one_line(environment: pytest.MonkeyPatch) -> None:
    for name in COMPLETE:
        environment.delenv(name)

    assert complaint().startswith(f"set {', '.join(COMPLETE)} ")


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_variable_is_named(environment: pytest.MonkeyPatch, name: str, value: str) -> None:
    environment.setenv(name, value)

    assert complaint().startswith(f"{name} ")


def test_missing_and_wrong_variables_are_told_together(environment: pytest.MonkeyPatch) -> None:
    environment.delenv("SUPABASE_URL")
    environment.setenv("REDIS_URL", SECRET)
    environment.setenv("INTERVIEW_PACK_SIZE", "many")

    told = complaint()

    assert all(name in told for name in ("REDIS_URL", "INTERVIEW_PACK_SIZE", "set SUPABASE_URL"))


@pytest.mark.parametrize("empty", [False, True])
def test_the_older_name_of_the_key_does_as_well(environment: pytest.MonkeyPatch, empty: bool) -> None:
    environment.delenv("SUPABASE_SECRET_KEY")
    if empty:
        environment.setenv("SUPABASE_SECRET_KEY", "")
    environment.setenv("SUPABASE_SERVICE_ROLE_KEY", "older-key")

    assert load_settings().supabase_secret_key.get_secret_value() == "older-key"


def test_the_newer_name_of_the_key_goes_first(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("SUPABASE_SERVICE_ROLE_KEY", "older-key")

    assert load_settings().supabase_secret_key.get_secret_value() == SECRET


@pytest.mark.parametrize(
    ("times", "named"),
    [
        ({"RECLAIM": "10", "RPC_TIMEOUT": "10"}, "INTERVIEW_RECLAIM_SECONDS must exceed INTERVIEW_RPC_TIMEOUT_SECONDS"),
        ({"RECLAIM": "5"}, "INTERVIEW_RECLAIM_SECONDS must exceed INTERVIEW_RPC_TIMEOUT_SECONDS"),
    ],
)
def test_times_that_do_not_fit_each_other_are_refused(
    environment: pytest.MonkeyPatch, times: dict[str, str], named: str
) -> None:
    for name, seconds in times.items():
        environment.setenv(f"INTERVIEW_{name}_SECONDS", seconds)

    assert complaint().startswith(named)


@pytest.mark.parametrize(
    "times", [{"RECLAIM": "10.1", "RPC_TIMEOUT": "10"}, {"VISIBILITY_TIMEOUT": "3610.1"}, {"HOLD": "7189.9"}]
)
def test_times_that_just_fit_are_taken(environment: pytest.MonkeyPatch, times: dict[str, str]) -> None:
    for name, seconds in times.items():
        environment.setenv(f"INTERVIEW_{name}_SECONDS", seconds)

    assert load_settings().rpc_timeout_seconds == 10


def test_publishing_needs_redis_only(environment: pytest.MonkeyPatch) -> None:
    environment.delenv("SUPABASE_URL")
    environment.delenv("SUPABASE_SECRET_KEY")

    assert load_settings(StreamSettings).stream == "interview:events"
    environment.delenv("REDIS_URL")
    assert complaint(StreamSettings).startswith("set REDIS_URL ")


def test_settings_show_no_secret(environment: pytest.MonkeyPatch) -> None:
    settings = load_settings()

    assert SECRET not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"


def test_settings_do_not_change(environment: pytest.MonkeyPatch) -> None:
    settings = load_settings()

    with pytest.raises(ValidationError):
        settings.pack_size = 1  # type: ignore[misc]  # misuse is the point
    assert settings.pack_size == 1000


# ----------------------------------------------------------------------------------------------- as an operator sees

STATUS = ["interviews", "status"]
REPORT = ["celery", "-A", "worker", "report"]
WORKER = ["celery", "-A", "worker", "worker"]


def run(command: list[str], settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "C_FORCE_ROOT": "1", **settings}
    return subprocess.run(
        [BIN / command[0], *command[1:]], env=environment, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize(
    ("command", "change", "named"),
    [
        *[(each, dict.fromkeys(COMPLETE), ", ".join(COMPLETE)) for each in (STATUS, REPORT, WORKER)],
        *[(each, {"INTERVIEW_PACK_SIZE": "many"}, "INTERVIEW_PACK_SIZE") for each in (STATUS, REPORT, WORKER)],
        (STATUS, {"SUPABASE_SECRET_KEY": None}, "SUPABASE_SECRET_KEY"),
        (WORKER, {"REDIS_URL": SECRET}, "REDIS_URL"),
        (WORKER, {"INTERVIEW_RECLAIM_SECONDS": "1"}, "INTERVIEW_RECLAIM_SECONDS"),
        pytest.param(STATUS, {"REDIS_URL": "redis://127.0.0.1:port/0"}, "REDIS_URL"),
        pytest.param(WORKER, {"REDIS_URL": "redis://127.0.0.1:port/0"}, "REDIS_URL"),
        pytest.param(STATUS, {"REDIS_URL": "redis://127.0.0.1:1/0?foo=bar"}, "REDIS_URL"),
        pytest.param(STATUS, {"REDIS_URL": f"redis://:{SECRET}/x@127.0.0.1"}, "REDIS_URL"),
    ],
)
def test_settings_that_do_not_do_are_one_line_and_exit_status_2(
    command: list[str], change: dict[str, str | None], named: str
) -> None:
    settings = {name: value for name, value in {**COMPLETE, **change}.items() if value is not None}

    done = run(command, settings)

    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert named in line
    assert SECRET not in line


@pytest.mark.parametrize(
    ("name", "value"),
    [("SUPABASE_URL", "https://"), ("SUPABASE_URL", "https://project:port"), ("SUPABASE_SECRET_KEY", f"{SECRET}ü")],
)
def test_what_no_client_of_supabase_can_use_is_one_line_and_exit_status_2(name: str, value: str) -> None:
    done = run(["interviews", "dlq", "list"], COMPLETE | {name: value})

    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert name in line
    assert SECRET not in line
