"""Supabase: the one module that calls it, and that tells its errors in the words of worker.errors."""

import gc
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property
from http import HTTPStatus
from typing import Any, Final, Literal, NamedTuple, NotRequired, TypedDict, get_args

import httpx
from postgrest import CountMethod
from postgrest.exceptions import APIError
from pydantic_core import from_json, to_json
from supabase import Client, ClientOptions, create_client
from yarl import URL

from events import Event
from worker import metrics, tracing
from worker.errors import Misconfigured, RefusedCall, Unavailable
from worker.settings import Settings
from worker.sql_files import VERSION

Outcome = Literal["applied", "duplicate", "waiting", "rejected"]
OUTCOMES: Final = frozenset(get_args(Outcome))
DEADLOCK_RETRIES: Final = 3
MAX_BATCHES: Final = 100  # of one round of maintenance; the next round goes on
LARGE_BODY_BYTES: Final = 1 << 20
NOT_OURS: Final = "{rpc} did not answer as it should: is SUPABASE_URL right?"
NOT_JSON: Final = "Supabase's answer is not JSON: is SUPABASE_URL right?"
SQL: Final = (
    "sql/supabase_table_interview_sessions.sql and sql/supabase_worker_interview_events.sql, in this order"
    " ('interviews sql' prints them)"
)


class Answer(TypedDict):
    """What became of one event; see apply_interview_events in the SQL."""

    id: str | None
    outcome: Outcome
    reason: str | None
    detail: str | None
    again: NotRequired[bool]  # of a rejected one: it was an open dead letter before


class Letter(TypedDict):
    """An event on its way to interview_dead_letters; see record_dead_interview_events in the SQL."""

    event: str
    event_id: str | None
    session_id: str | None
    type: str | None
    reason: str
    detail: str


@dataclass(frozen=True)
class Description:
    """What PostgREST tells our key of itself: the functions that it may call with their parameters, and the time.

    `sql_version` is as in sql_files.py, "" where the SQL does not say; `told_at` is a Unix time in whole seconds, None
    where the answer has none.
    """

    functions: Mapping[str, frozenset[str]]
    sql_version: str
    told_at: float | None


class PackResult(NamedTuple):
    """How many events of a pack were applied, and what became of the others."""

    applied: int
    others: list[Answer]


class Database:
    """One process's connection to Supabase, made at the first call; may be shared by threads.

    Every call raises Unavailable, Misconfigured or RefusedCall, and nothing else of the drivers'.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()

    @cached_property
    def client(self) -> Client:
        """The Supabase client: HTTP/1.1, no retries of its own, our timeout."""
        settings = self._settings
        timeout = settings.rpc_timeout_seconds
        options = ClientOptions(
            auto_refresh_token=False,
            persist_session=False,
            postgrest_client_retry=False,
            httpx_client=httpx.Client(
                http2=False,
                timeout=httpx.Timeout(timeout, connect=min(timeout, 5.0)),
                limits=httpx.Limits(max_connections=settings.concurrency),
                event_hooks={"request": [_trace], "response": [_raise_for_status]},
            ),
        )
        client = create_client(settings.supabase_url, settings.supabase_secret_key.get_secret_value(), options)
        if settings.supabase_rest_url is not None:
            client.rest_url = URL(settings.supabase_rest_url)
        return client

    def close(self) -> None:
        """Give the connections back, where any were made."""
        if "client" in self.__dict__ and self.client.options.httpx_client is not None:
            self.client.options.httpx_client.close()

    def apply_events(self, events: Sequence[Event | Mapping[str, Any]]) -> list[Answer]:
        """Apply a pack in one transaction; one answer per event, in order."""
        return self._call_pack("apply_interview_events", {"p_events": events}, len(events))

    def apply_pack(self, events: Sequence[Event], *, before_request: Callable[[], None] = lambda: None) -> PackResult:
        """Apply a pack in one transaction, as apply_events does, with a short answer.

        `before_request` is called when all is ready and the request is about to leave.
        """
        rpc = "apply_interview_events_summary"
        with metrics.timed_rpc(rpc), tracing.rpc_span(rpc):
            return _pack_result(self._post(rpc, {"p_events": events}, before_request), len(events))

    def record_dead_events(
        self, letters: Sequence[Letter], *, before_request: Callable[[], None] = lambda: None
    ) -> list[Answer]:
        """Keep events that cannot be applied; one answer per letter, in order."""
        return self._call_pack("record_dead_interview_events", {"p_letters": letters}, len(letters), before_request)

    def expire_waiting(self, *, hours: float) -> int:
        """Turn events that have waited longer into dead letters, in batches; answer how many."""
        count = self._call_until_zero("expire_waiting_interview_events", f"{hours * 3600:.0f} seconds")
        metrics.count_outcomes({"orphaned": count})
        return count

    def purge(self, *, days: float) -> int:
        """Remove the ledger of sessions that ended and have been quiet for longer, in batches; answer how many."""
        return self._call_until_zero("purge_interview_events", f"{days * 86400:.0f} seconds")

    def _call_until_zero(self, rpc: str, older_than: str) -> int:
        total = 0
        for _ in range(MAX_BATCHES):
            answer = self._call_despite_deadlocks(
                lambda client: client.rpc(rpc, {"p_older_than": older_than}).execute()
            )
            count = int(answer.data)
            total += count
            if not count:
                break
        return total

    def count_waiting(self) -> int:
        """How many events of the ledger wait for the start of their session."""
        return self.count("interview_events", lambda rows: rows.is_("applied_at", "null"))

    def count(self, table: str, where: Callable[[Any], Any] = lambda rows: rows) -> int:
        """How many rows of a table there are, of those that `where` filters."""
        # Not by HEAD: after some of them PostgREST 12.0 closes a connection that rests for a moment.
        answer = self.call(
            lambda client: where(client.table(table).select("*", count=CountMethod.exact).limit(0)).execute()
        )
        return int(answer.count or 0)

    def describe(self) -> Description:
        """What there is to call, looked up in the database now; PostgREST's schema cache may lag behind it."""

        return _description(self.call(lambda client: _request(client, "GET", "/")))

    def call(self, query: Callable[[Client], Any]) -> Any:
        """Run a query of supabase-py and answer its response, with errors in our words."""
        with self._lock:
            client = self.client
        try:
            return query(client)
        except httpx.HTTPError as error:
            raise Unavailable(f"no answer from Supabase ({type(error).__name__})") from error
        except APIError as error:  # 2xx with something that is not JSON: a proxy's page
            raise Unavailable(NOT_JSON) from error

    def _call_pack(
        self, rpc: str, parameters: dict[str, Any], count: int, before_request: Callable[[], None] = lambda: None
    ) -> list[Answer]:
        with metrics.timed_rpc(rpc), tracing.rpc_span(rpc):
            answers: list[Answer] = self._post(rpc, parameters, before_request)
            if not (isinstance(answers, list) and len(answers) == count and all(map(_is_answer, answers))):
                raise Unavailable(NOT_OURS.format(rpc=rpc))
        return answers

    def _post(self, rpc: str, parameters: dict[str, Any], before_request: Callable[[], None]) -> Any:
        """Call an RPC, and read its answer."""
        # Written and read by pydantic's JSON: client.rpc() would take twice the CPU time for a pack. Where `columns`
        # names what the body holds, PostgREST passes it on without reading it, and takes a quarter of the CPU time.
        path = f"/rpc/{rpc}?columns={','.join(parameters)}"
        body = to_json(parameters, exclude_none=True)
        before_request()
        try:
            response = self._call_despite_deadlocks(lambda client: _request(client, "POST", path, body))
        finally:
            if len(body) > LARGE_BODY_BYTES:
                gc.collect()  # httpx leaves its requests in cycles, with their bodies
        try:
            return from_json(response.content)
        except ValueError as error:
            raise Unavailable(NOT_JSON) from error

    def _call_despite_deadlocks(self, query: Callable[[Client], Any]) -> Any:
        """Packs never deadlock with each other, but may with a user's deletion; the loser just tries again."""
        for _ in range(DEADLOCK_RETRIES):
            try:
                return self.call(query)
            except Deadlocked:
                continue
        return self.call(query)


class Deadlocked(Unavailable):
    """Postgres chose this transaction as a deadlock's victim."""


def _is_answer(answer: object) -> bool:
    """Whether this is what became of one event; all outcomes are final."""
    return isinstance(answer, dict) and answer.get("outcome") in OUTCOMES


def _pack_result(answer: object, sent: int) -> PackResult:
    """Read the summary of a pack of so many events. Raises Unavailable where it does not account for each of them."""
    match answer:
        case {"received": int(received), "applied": int(applied), "others": list(others)} if (
            received == sent == applied + len(others)
            and applied >= 0
            and all(_is_answer(each) and each["outcome"] != "applied" for each in others)
        ):
            return PackResult(applied, others)
    raise Unavailable(NOT_OURS.format(rpc="apply_interview_events_summary"))


def _request(client: Client, method: str, path: str, body: bytes | None = None) -> httpx.Response:
    """Ask PostgREST through supabase-py's own session, with its headers; the body is JSON."""
    api = client.postgrest
    headers = {**api.headers, "Content-Type": "application/json"}
    return api.session.request(method, f"{str(client.rest_url).rstrip('/')}{path}", content=body, headers=headers)


def _description(response: httpx.Response) -> Description:
    """Read PostgREST's OpenAPI document."""
    try:
        posts = {
            path.removeprefix("/rpc/"): methods["post"]
            for path, methods in response.json()["paths"].items()
            if path.startswith("/rpc/")
        }
        functions = {
            name: frozenset(
                each for part in post["parameters"] for each in part.get("schema", {}).get("properties", {})
            )
            for name, post in posts.items()
        }
        version = VERSION.search(posts.get("apply_interview_events", {}).get("summary", ""))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Misconfigured("no Supabase API there", remedy="set SUPABASE_URL to the project's URL") from error
    date = response.headers.get("Date")
    return Description(
        functions, version[0] if version else "", parsedate_to_datetime(date).timestamp() if date else None
    )


def _trace(request: httpx.Request) -> None:
    """Let Supabase's own traces, where it keeps some, go on with ours."""
    tracing.inject(request.headers)


def _raise_for_status(response: httpx.Response) -> None:
    """Turn every answer but 2xx into an error of ours; supabase-py's own would lack the HTTP status."""
    if response.is_success:
        if response.status_code != HTTPStatus.NO_CONTENT and "json" not in response.headers.get("Content-Type", ""):
            raise Misconfigured(
                "Supabase's answer is not JSON", remedy="where it stays so: set SUPABASE_URL to the project's URL"
            )
        return
    response.read()
    try:
        body = response.json()
    except ValueError:
        body = {}
    told = body if isinstance(body, dict) else {}
    code = str(told.get("code") or "")
    if code.startswith("PT4"):  # raised by our own SQL, in words without data
        raise RefusedCall(str(told.get("message")))
    if code == "22023" and "role" in str(told.get("message")):  # the key's; the database knows no such role
        code = "PGRST302"
    raise _error(response.status_code, code, response.headers.get("Retry-After", ""))


def _error(status: int, code: str, retry_after: str) -> Exception:
    """The error for an HTTP status with PostgREST's or Postgres' code ('' where there is none)."""
    what = f"HTTP {status}{f', {code}' if code else ''}"
    if code == "42501" and status != HTTPStatus.UNAUTHORIZED:  # which it is where the key is the public's
        return Misconfigured(f"permission denied ({what})", remedy=f"run again {SQL}: they make the grants")
    if code in {"PGRST202", "PGRST203", "PGRST205", "42883", "42P01", "42703"}:
        return Misconfigured(
            f"a function or table is missing ({what})",
            remedy=f"run {SQL}; where they were run: notify pgrst, 'reload schema'",
        )
    if status in {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN} or code.startswith("PGRST3"):
        return Misconfigured(
            f"the key is not accepted ({what})",
            remedy="set SUPABASE_SECRET_KEY to the project's secret key (Project Settings, API keys)",
        )
    if code[:2] in {"22", "23", "54"} or code in {"57014", "PGRST102"} or status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return RefusedCall(what)
    if status == HTTPStatus.NOT_FOUND or status < HTTPStatus.BAD_REQUEST:  # redirects, from http:// for one
        return Misconfigured(f"no Supabase API there ({what})", remedy="set SUPABASE_URL to the project's URL")
    if code == "40P01":
        return Deadlocked(f"deadlock ({what})")
    return Unavailable(f"Supabase is ill ({what})", retry_after=float(retry_after) if retry_after.isdecimal() else 0.0)
