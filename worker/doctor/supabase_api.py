"""Supabase: the key, the API, and whether our SQL is there and lets us in."""

import base64
import json
import re
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final
from urllib.parse import urlsplit

from supabase import Client

from worker.database import Database, Description
from worker.doctor.clocks import check_clock
from worker.doctor.environment import EXPORTS, WHERE_THE_KEY_IS
from worker.doctor.finding import Finding
from worker.errors import Misconfigured, WorkerError
from worker.sessions import Sessions
from worker.settings import Settings
from worker.sql_files import sql_text, sql_version

SHOWN: Final = 6  # characters of a key
NAMED: Final = 5  # functions in one line
SOON_SECONDS: Final = 14 * 24 * 3600.0
LATEST: Final = datetime.max.replace(tzinfo=UTC).timestamp() - 1
TABLES: Final = ("interview_sessions", "interview_events", "interview_dead_letters")
RUN_SQL: Final = (
    'interviews sql | psql "$DATABASE_URL"\n'
    "# or paste what 'interviews sql' prints in Supabase's SQL editor; what is right stays as it is"
)
SET_KEY: Final = f"{WHERE_THE_KEY_IS}\n{EXPORTS['SUPABASE_SECRET_KEY']}"


def check_supabase(settings: Settings, clock: Callable[[], float]) -> Iterator[Finding]:
    """Check the key, the API behind it, and our SQL behind that."""
    key = check_key(settings, clock())
    yield key
    database = Database(settings)
    try:
        began = clock()
        try:
            api = _description(database)
        except WorkerError as error:
            yield _no_api(settings, error)
            return
        ended = clock()
        yield Finding("Supabase", "ok", f"{_host(settings)} answers")
        if api is not None and api.told_at is not None:
            yield check_clock("Supabase clock", "Supabase", api.told_at + 0.5, (began + ended) / 2, precision=1.0)
        if key.state != "failed":
            yield check_functions(api)
            yield from check_calls(database)
    finally:
        database.close()


def check_key(settings: Settings, now: float) -> Finding:
    """Is it the secret one, of this project, and not expired? Says no more of it than its beginning."""
    key = settings.supabase_secret_key.get_secret_value()
    shown = f"{key[:SHOWN]}..."
    if key.startswith("sb_secret_"):
        return _key("ok", f"{shown}, a secret key")
    if key.startswith("sb_publishable_"):
        return _key("failed", f"{shown} is the publishable key")
    claims = _claims(key)
    if claims is not None:
        return _legacy_key(shown, claims, urlsplit(settings.supabase_url).hostname or "", now)
    if key.startswith("eyJ"):
        return _key("failed", f"{shown} is a JWT that is cut or mistyped")
    return _key("unknown", f"{shown} begins as no key of Supabase does")


def _legacy_key(shown: str, claims: dict[str, Any], host: str, now: float) -> Finding:
    role, project, expiry = claims.get("role"), claims.get("ref"), claims.get("exp")
    if role == "anon":
        return _key("failed", f"{shown} is the anon key")
    if role != "service_role":
        return _key("failed", f"{shown} is a JWT of role {role}")
    if isinstance(project, str) and host.endswith(".supabase.co") and host != f"{project}.supabase.co":
        return _key("failed", f"{shown} is the key of project {project}, and SUPABASE_URL names {host}")
    if not isinstance(expiry, int | float):
        return _key("ok", f"{shown}, a service_role JWT without an end")
    day = datetime.fromtimestamp(min(max(expiry, 0), LATEST), UTC).date()
    if expiry < now + SOON_SECONDS:
        return _key("failed", f"{shown} {'ended' if expiry < now else 'ends'} on {day}")
    return _key("ok", f"{shown}, a service_role JWT until {day}")


def _claims(key: str) -> dict[str, Any] | None:
    """A JWT's payload, unverified; None where it is none."""
    _, _, rest = key.partition(".")
    payload, dot, _ = rest.partition(".")
    try:
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except ValueError:
        return None
    return claims if dot and isinstance(claims, dict) else None


def _key(state: Any, told: str) -> Finding:
    return Finding("Supabase key", state, told, None if state == "ok" else SET_KEY)


def check_functions(api: Description | None) -> Finding:
    """Are all functions of our SQL there, with all parameters, of our version, and open to the key?"""
    check, wanted = "SQL functions", expected_functions()
    if api is None:
        return Finding(check, "unknown", "PostgREST's description of itself is switched off", RUN_SQL)
    closed = [name for name in wanted if name not in api.functions]
    older = [
        f"{name} ({', '.join(sorted(lacking))})"
        for name, parameters in wanted.items()
        if name in api.functions and (lacking := parameters - api.functions[name])
    ]
    told = [f"missing, or without grant: {_few(closed)}"] if closed else []
    told += [f"older than this worker, without a parameter: {_few(older)}"] if older else []
    if not told and api.sql_version != sql_version():
        told = [f"another version than this worker's: {api.sql_version or 'unknown'}, not {sql_version()}"]
    if told:
        return Finding(check, "failed", "; ".join(told), RUN_SQL)
    return Finding(check, "ok", f"all {len(wanted)} are there, with their grants, in version {api.sql_version}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def expected_functions() -> dict[str, frozenset[str]]:
    """The functions that our SQL files grant to service_role, with the names of their parameters."""
    text = sql_text()
    defined = dict(re.findall(r"create or replace function public\.(\w+)\(([^)]*)\)", text))
    grants = re.findall(r"grant execute on function([^;]*)\bto\b[^;]*\bservice_role\b", text)
    return {
        name: frozenset(re.findall(r"(?:^|,)\s*(\w+)", defined[name]))
        for granted in grants
        for name in re.findall(r"public\.(\w+)\(", granted)
    }


def check_calls(database: Database) -> Iterator[Finding]:
    """Call what workers and operators call, with nothing to do, and look at no row of each table."""
    yield _called("apply_interview_events_summary", lambda: database.apply_pack([]))
    yield _called("record_dead_interview_events", lambda: database.record_dead_events([]))
    yield _called("get_interview_timeline", lambda: Sessions(database).timeline(f"doctor {uuid.uuid4()}"))
    yield _called("writing tables", lambda: _apply_empty_pack(database))
    yield _called("reading tables", lambda: _look_at_no_row(database))


def _apply_empty_pack(database: Database) -> None:
    """This function runs its statements for an empty pack, too: Postgres checks the grants on the tables."""
    database.call(lambda client: client.rpc("apply_interview_event_pack", {"p_events": []}).execute())


def _look_at_no_row(database: Database) -> None:
    for table in TABLES:
        database.call(partial(_select_nothing, table))


def _select_nothing(table: str, client: Client) -> Any:
    return client.table(table).select("*").limit(0).execute()


def _called(check: str, call: Callable[[], object]) -> Finding:
    began = time.monotonic()
    try:
        call()
    except Misconfigured as wrong:  # the key has been checked: it is the SQL
        return Finding(check, "failed", str(wrong), RUN_SQL)
    except WorkerError as error:
        return Finding(check, "failed", str(error), "# if it does not pass: Supabase, Logs, tells why")
    return Finding(check, "ok", f"in {(time.monotonic() - began) * 1000:.0f} ms")


def _description(database: Database) -> Description | None:
    """What the API tells of itself, None where only that is switched off."""
    try:
        return database.describe()
    except Misconfigured:
        database.apply_events([])  # raises what is the matter
        return None


def _no_api(settings: Settings, error: WorkerError) -> Finding:
    lines = ["# is the project paused? Restore it in Supabase's dashboard. Is this its URL?", EXPORTS["SUPABASE_URL"]]
    url = urlsplit(settings.supabase_url)
    if isinstance(error, Misconfigured):
        exports = [line for name, line in EXPORTS.items() if name in error.remedy]
        lines = [f"# {error.remedy}", *exports]
    if url.hostname and url.hostname.endswith(".supabase.co") and settings.supabase_url.rstrip("/") != _origin(url):
        lines = [f"export SUPABASE_URL={_origin(url)}"]
    if settings.supabase_rest_url is not None:
        lines.append(f"# SUPABASE_REST_URL is set, to {_host(settings)}; Supabase itself needs none")
    return Finding("Supabase", "failed", f"{_host(settings)}: {error}", "\n".join(lines))


def _origin(url: Any) -> str:
    return f"https://{url.hostname}"


def _host(settings: Settings) -> str:
    url = urlsplit(settings.supabase_rest_url or settings.supabase_url)
    return f"{url.hostname}:{url.port}" if url.port else str(url.hostname)
