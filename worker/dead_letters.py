"""How an event becomes a dead letter, and becomes an event again; worker.dlq has what operators do with them."""

import base64
import json
from typing import Any, Final

from worker.database import Letter

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
BASE64_MARK: Final = "base64:"
MAX_NAME: Final = 200  # characters kept of an id, a session or a type that breaks the contract


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
