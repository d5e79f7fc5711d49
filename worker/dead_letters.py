"""Dead letters: how an event becomes one, and how an operator finds, replays and discards them."""

import base64
import json
from functools import partial
from typing import Any, Final, Literal

import redis
from postgrest import CountMethod
from supabase import Client

from worker.database import Database, Letter
from worker.stream import EventStream

REASONS: Final = (
    "invalid_json",
    "invalid_event",
    "unsupported_type",
    "too_large",
    "unknown_user",
    "session_conflict",
    "rejected",
    "orphaned",
    "poison",
)
Status = Literal["open", "replayed", "resolved", "discarded"]
BASE64_MARK: Final = "base64:"
MAX_NAME: Final = 200  # characters kept of an id, a session or a type that breaks the contract
TABLE: Final = "interview_dead_letters"
PAGE: Final = 1000  # rows in one answer: Supabase's own limit
BATCH: Final = 100  # letters in one request: their ids travel in the URL


def dead_letter(raw: bytes, reason: str, detail: str) -> Letter:
    """The letter for an event as it was received, with whatever can be read of it."""
    event = _readable(raw)
    return Letter(
        event=stored_text(raw),
        event_id=_name(event.get("id")),
        session_id=_name(event.get("subject")),
        type=_name(event.get("type")),
        reason=reason,
        detail=detail,
    )


def stored_text(raw: bytes) -> str:
    """An event's bytes as text that Postgres can hold: themselves, or marked base64."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text or text.startswith(BASE64_MARK):
        return BASE64_MARK + base64.b64encode(raw).decode()
    return text


def original_bytes(stored: str) -> bytes:
    """The reverse of stored_text."""
    if stored.startswith(BASE64_MARK):
        return base64.b64decode(stored.removeprefix(BASE64_MARK))
    return stored.encode()


def _readable(raw: bytes) -> dict[str, Any]:
    try:
        event = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return event if isinstance(event, dict) else {}


def _name(value: object) -> str | None:
    if not isinstance(value, str):
        return None
    return "".join(c for c in value[:MAX_NAME] if c != "\0" and not "\ud800" <= c <= "\udfff")


class DeadLetters:
    """The operator's view of interview_dead_letters. Raises what worker.database raises."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, *, status: Status | None, reason: str | None = None, limit: int) -> list[dict[str, Any]]:
        """Letters, the latest failure first, without their events."""

        def query(client: Client) -> Any:
            found = client.table(TABLE).select(
                "id, event_id, session_id, type, reason, detail, attempts, status, first_failed_at, last_failed_at"
            )
            if status is not None:
                found = found.eq("status", status)
            if reason is not None:
                found = found.eq("reason", reason)
            return found.order("last_failed_at", desc=True).order("id", desc=True).limit(limit).execute()

        letters: list[dict[str, Any]] = self._database.call(query).data
        return letters

    def open_ids(self, *, reason: str | None = None) -> list[int]:
        """The ids of all open letters (of one reason), in ascending order, read in pages."""
        ids: list[int] = []
        while page := self._database.call(partial(_open_ids_after, ids[-1] if ids else 0, reason)).data:
            ids += [letter["id"] for letter in page]
        return ids

    def get(self, ids: list[int]) -> list[dict[str, Any]]:
        """Whole letters by id, in ascending order; unknown ids are missing."""
        letters: list[dict[str, Any]] = []
        for batch in _batches(ids):
            letters += self._database.call(partial(_select, batch)).data
        return letters

    def count(self, status: Status) -> int:
        """How many letters there are of one status."""
        answer = self._database.call(
            lambda client: (
                client.table(TABLE).select("id", count=CountMethod.exact, head=True).eq("status", status).execute()
            )
        )
        return int(answer.count or 0)

    def replay(self, ids: list[int], stream: EventStream) -> list[dict[str, Any]]:
        """Publish the events of open letters again; answer these letters. Raises redis.RedisError, too.

        They are marked first: the worker may resolve them at once. Where Redis does not take them they are open
        again; a crash in between leaves letters that say "replayed" and can be replayed once more.
        """
        replayed = self._move(ids, {"status": "replayed"})
        try:
            stream.add([original_bytes(letter["event"]) for letter in replayed])
        except redis.RedisError:
            self._move([letter["id"] for letter in replayed], {"status": "open"})
            raise
        return replayed

    def discard(self, ids: list[int], note: str) -> list[dict[str, Any]]:
        """Close open letters without applying them; answer those that were closed."""
        return self._move(ids, {"status": "discarded", "note": note, "resolved_at": "now"})

    def _move(self, ids: list[int], values: dict[str, str]) -> list[dict[str, Any]]:
        moved: list[dict[str, Any]] = []
        for batch in _batches(ids):
            moved += self._database.call(partial(_update_open, batch, values)).data
        return moved


def _open_ids_after(last: int, reason: str | None, client: Client) -> Any:
    found = client.table(TABLE).select("id").eq("status", "open").gt("id", last)
    if reason is not None:
        found = found.eq("reason", reason)
    return found.order("id").limit(PAGE).execute()


def _select(ids: list[int], client: Client) -> Any:
    return client.table(TABLE).select("*").in_("id", ids).order("id").execute()


def _update_open(ids: list[int], values: dict[str, str], client: Client) -> Any:
    return client.table(TABLE).update(values).in_("id", ids).in_("status", ["open", "replayed"]).execute()


def _batches(ids: list[int]) -> list[list[int]]:
    return [ids[start : start + BATCH] for start in range(0, len(ids), BATCH)]
