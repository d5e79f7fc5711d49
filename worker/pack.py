"""A pack: the events of one Celery message, as they came, with the stream entries they came from."""

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Annotated, Final, Self

from pydantic import Field, TypeAdapter
from typing_extensions import TypedDict  # pydantic reads it, and before Python 3.12 not typing's

from events.publisher import FIELD


class Encoded(TypedDict):
    base64: str


class Readable(TypedDict):
    """A pack as workers of before send it."""

    ids: list[str]
    events: list[str | Encoded]
    alone: bool


# A pack as Celery carries it: in base64 a zlib stream, of one line of JSON, [ids, sizes in bytes, alone], and the
# events. Compressed, because what follows copies it a dozen times, and so a pack of usual events fits into the pipe
# (64 KiB) to a process of the pool.
Message = str | Readable
ZLIB_LEVEL: Final = 1  # a third of the default's CPU time, and hardly larger
_HEAD: Final = TypeAdapter(tuple[list[str], list[Annotated[int, Field(ge=0)]], bool])


@dataclass(frozen=True)
class Pack:
    """Entry ids and raw events, side by side; `alone` marks an entry that was delivered too often already."""

    entry_ids: tuple[str, ...]
    events: tuple[bytes, ...]
    alone: bool = False

    def to_message(self) -> str:
        """As JSON can carry it."""
        head = json.dumps([self.entry_ids, [len(raw) for raw in self.events], self.alone]).encode()
        return base64.b64encode(zlib.compress(b"".join((head, b"\n", *self.events)), ZLIB_LEVEL)).decode()

    @classmethod
    def from_message(cls, message: Message) -> Self:
        """The reverse of to_message. Raises ValueError for what is none of its results."""
        return cls._from_compact(message) if isinstance(message, str) else cls._from_readable(message)

    @classmethod
    def _from_compact(cls, message: str) -> Self:
        try:
            head, _, events = zlib.decompress(base64.b64decode(message, validate=True)).partition(b"\n")
        except zlib.error as error:
            raise ValueError(f"a pack is a zlib stream: {error}") from error
        ids, sizes, alone = _HEAD.validate_json(head)
        if len(ids) != len(sizes) or sum(sizes) != len(events):
            raise ValueError("a pack has one id and one size for each event")
        ends = list(accumulate(sizes))
        return cls(tuple(ids), tuple(events[end - size : end] for end, size in zip(ends, sizes, strict=True)), alone)

    @classmethod
    def _from_readable(cls, message: Readable) -> Self:
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


def _decoded(event: str | Encoded) -> bytes:
    return event.encode() if isinstance(event, str) else base64.b64decode(event["base64"], validate=True)
