"""A pack: the events of one Celery message, as they came, with the stream entries they came from."""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from typing_extensions import TypedDict  # pydantic reads it, and before Python 3.12 not typing's

from events.publisher import FIELD


class Encoded(TypedDict):
    base64: str


class Message(TypedDict):
    """A pack as Celery carries it, in JSON."""

    ids: list[str]
    events: list[str | Encoded]
    alone: bool


@dataclass(frozen=True)
class Pack:
    """Entry ids and raw events, side by side; `alone` marks an entry that was delivered too often already."""

    entry_ids: tuple[str, ...]
    events: tuple[bytes, ...]
    alone: bool = False

    def to_message(self) -> Message:
        """As JSON can carry it: bytes that are not UTF-8 travel in base64."""
        return Message(ids=list(self.entry_ids), events=[_encoded(raw) for raw in self.events], alone=self.alone)

    @classmethod
    def from_message(cls, message: Message) -> Self:
        """The reverse of to_message. Raises ValueError for what is none of its results."""
        if len(message["ids"]) != len(message["events"]):
            raise ValueError("a pack has one id for each event")
        return cls(tuple(message["ids"]), tuple(map(_decoded, message["events"])), message["alone"])


def raw_event(fields: Mapping[bytes, bytes]) -> bytes:
    """The event in a stream entry; of an entry that has none, all its fields as JSON, to be dead-lettered."""
    raw = fields.get(FIELD.encode())
    if raw is not None:
        return raw
    return json.dumps({_readable(name): _readable(value) for name, value in fields.items()}).encode()


def _readable(value: bytes) -> str:
    return value.decode(errors="backslashreplace")


def _encoded(raw: bytes) -> str | Encoded:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(raw).decode()}


def _decoded(event: str | Encoded) -> bytes:
    return event.encode() if isinstance(event, str) else base64.b64decode(event["base64"], validate=True)
