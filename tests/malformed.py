"""Malformed stream entries: each a valid event in which exactly one thing is wrong, and the reason it must die of.

The reasons come from the words and tests of the contract, RFC 8259 (what JSON is) and RFC 3339 (what a time is), not
from the code that finds them. What a reader of JSON may refuse (RFC 8259 section 9: depth, numbers) is `invalid_json`.
"""

import itertools
import json
import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from tests.database import event

Event = dict[str, Any]
Fields = dict[bytes, bytes]
Break = Callable[[Event, random.Random], bytes]

TOO_MUCH: Final = 300 * 1024  # bytes; 256 KiB are allowed
DEEP: Final = 100_000  # brackets
# One of so many entries is that heavy, is no event at all, is broken as a whole; the others are wrong in one field.
HEAVY_EVERY: Final = 100
FOREIGN_EVERY: Final = 21
BREAK_EVERY: Final = 4
HERE: Final = "-here-"  # where a piece of JSON text goes


@dataclass(frozen=True)
class Entry:
    """A stream entry; `reason` is None where it holds a good event, `kept` is what its dead letter must hold."""

    fields: Fields
    reason: str | None = None

    @property
    def kept(self) -> bytes:
        """The event, byte for byte; of an entry without one, all its fields."""
        if b"event" in self.fields:
            return self.fields[b"event"]
        return json.dumps({readable(name): readable(value) for name, value in self.fields.items()}).encode()


def readable(value: bytes) -> str:
    return value.decode(errors="backslashreplace")


# --------------------------------------------------------------------------------------------- what may be wrong
# Pieces of JSON text, because most of them cannot be said in Python.

WRONG_TYPES: Final = ["5", "true", "1e400", '["a"]', '{"a": "b"}']
NUL: Final = r'"a\u0000b"'
WRONG_TEXT: Final = [*WRONG_TYPES, NUL, r'"\u0000"']
WRONG_NAME: Final = [*WRONG_TEXT, "null", '""']
WRONG_COUNT: Final = [
    *["-1", "-2147483649", "2147483648", "9223372036854775808", "18446744073709551616", f"1{'0' * 400}"],
    *["1e400", "-1e400", "NaN", "Infinity", "-Infinity", "1.5", "5.0", "true", "false", '"5"', "[5]", '{"n": 5}'],
]
WRONG_UUID: Final = [
    *[*WRONG_TYPES, NUL, "null", '""', '"not a uuid"', '"5b0c3f0e-6a51-4a4e-9b7e-2f8f0b8a4d1"'],
    *['"5b0c3f0e-6a51-4a4e-9b7e-2f8f0b8a4d111"', '"5b0c3f0e-6a51-4a4e-9b7e-2f8f0b8a4d1g"'],
]
WRONG_TIME: Final = [
    *[*WRONG_TYPES, NUL, "null", '""', "1795428900", '"1795428900"', '"now"', '"2026-11-23"', '"2026-11-23T10:15Z"'],
    *['"2026-11-23T10:15:00"', '"2026-11-23 10:15:00Z"', '"2026-11-23T10:15:00Z "', '"2026-11-23T10:15:00 UTC"'],
    *['"0000-01-01T00:00:00Z"', '"99999-01-01T00:00:00Z"', '"2016-12-31T23:59:60Z"', '"2026-02-30T10:15:00Z"'],
    *['"2026-13-01T10:15:00Z"', '"2026-11-23T24:15:00Z"', '"2026-11-23T10:60:00Z"', '"2026-11-23T10:15:00+25:00"'],
]
WRONG_EMAIL: Final = [
    *[*WRONG_TEXT, "null", '""', '"ana"', '"@example.com"', '"ana@"', '"ana @example.com"', r'"ana\n@example.com"'],
    f'"{"a" * 310}@example.com"',
]
WRONG_SCORE: Final = [
    *["-1", "-0.01", "100.01", "101", "1e400", "NaN", "Infinity", "true", "false", '"80"', "[80]", '{"n": 80}', NUL],
]
WRONG_FEEDBACK: Final = [
    *["[]", '"good"', "1", "true", '[{"a": 1}]', NUL, r'{"a\u0000b": 1}', r'{"deep": [{"er": ["a\u0000b"]}]}'],
    *['{"a": NaN}', '{"a": [1, {"b": [1e400]}]}', '{"a": -Infinity}', f'{{"a": 1{"0" * 400}}}'],
    *['{"a":' * 150 + "1" + "}" * 150, f'{{"a": {"[" * 150}{"]" * 150}}}'],  # 100 levels are allowed
]
WRONG_ENVELOPE: Final = {
    "specversion": [*WRONG_TYPES, "null", '"0.3"', '"2.0"', "1.0"],
    "id": WRONG_UUID,
    "source": WRONG_NAME,
    "subject": [*WRONG_NAME, f'"{"x" * 201}"'],
    "time": WRONG_TIME,
    "type": [*WRONG_TYPES, "null", '""', '"started"', '"interview.paused"', '"INTERVIEW.STARTED"', NUL],
    "data": ["5", "true", "null", "[]", '"text"', '"{}"', "[{}]"],
    "datacontenttype": [*WRONG_TYPES, NUL, '""', '"text/xml"'],
    "traceparent": WRONG_TEXT,
    "tracestate": WRONG_TEXT,
}
WRONG_DATA: Final = {
    "started": {
        "user_id": WRONG_UUID,
        "email": WRONG_EMAIL,
        "resume_filename": WRONG_TEXT,
        "job_description_filename": WRONG_TEXT,
        "total_questions": WRONG_COUNT,
    },
    "answered": {
        "questions_answered": [*WRONG_COUNT, "null"],
        "duration_minutes": WRONG_COUNT,
        "total_questions": WRONG_COUNT,
    },
    "finished": {
        "score": WRONG_SCORE,
        "feedback": WRONG_FEEDBACK,
        "questions_answered": WRONG_COUNT,
        "duration_minutes": WRONG_COUNT,
        "total_questions": WRONG_COUNT,
    },
    "cancelled": {"reason": WRONG_TEXT, "questions_answered": WRONG_COUNT, "duration_minutes": WRONG_COUNT},
}
REQUIRED: Final = {
    "started": ["user_id", "email"],
    "answered": ["questions_answered"],
    "finished": list[str](),
    "cancelled": list[str](),
}
NO_JSON: Final = [
    *[r'"a\ud800b"', r'"a\udc00b"', r'{"\udbff": 1}', '"a\0b"', '"a\nb"', '"a\x1fb"', r'"\x41"', r'"\u12"', '"open'],
    *["01", "+1", ".5", "1.", "0x10", "nan", "'a'", "undefined", "None", "", "[1,]", '{"a" 1}', "{'a': 1}", "{1: 1}"],
    *["9" * 10_000, "[" * 1_000 + "]" * 1_000],
]


# ------------------------------------------------------------------------------------------------- whole events

FULL_DATA: Final[dict[str, Event]] = {
    "started": {
        "user_id": "11111111-1111-4111-8111-111111111111",
        "email": "ana@example.com",
        "resume_filename": "Lebenslauf ü.pdf",
        "job_description_filename": "job 👍.txt",
        "total_questions": 9,
    },
    "answered": {"questions_answered": 999, "duration_minutes": 999, "total_questions": 999},
    "finished": {
        "score": 87.5,
        "feedback": {"strong": ["SQL", None], "note": "Größe 👍", "n": 1.5},
        "questions_answered": 999,
        "duration_minutes": 999,
        "total_questions": 999,
    },
    "cancelled": {"reason": "line broke", "questions_answered": 999, "duration_minutes": 999},
}
ATTRIBUTES: Final = {
    "datacontenttype": "application/json",
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "tracestate": "vendor=1",
}


def whole(kind: str, session_id: str, rng: random.Random) -> Event:
    """A valid event with all that the contract knows. Were it applied, its session's row would tell."""
    event_id = uuid.UUID(int=rng.getrandbits(128), version=4)
    return event(kind, session_id, time="2026-11-24T10:15:00Z", event_id=event_id, **FULL_DATA[kind]) | ATTRIBUTES


def with_json(event: Event, path: str, text: str) -> bytes:
    """The event with a piece of JSON text at a dotted path."""
    *parents, last = path.split(".")
    changed = event | ({"data": event["data"] | {last: HERE}} if parents else {last: HERE})
    return json.dumps(changed, ensure_ascii=False).replace(f'"{HERE}"', text).encode()


def without(event: Event, path: str) -> bytes:
    """The event without the field at a dotted path."""
    *parents, last = path.split(".")
    place = event["data"] if parents else event
    rest = {name: value for name, value in place.items() if name != last}
    return as_json(event | {"data": rest} if parents else rest)


def as_json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


# ------------------------------------------------------------------------------------------- how to break a whole


def random_bytes(_: Event, rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(16, 500))


def truncated(event: Event, rng: random.Random) -> bytes:
    raw = as_json(event)
    return raw[: rng.randrange(1, len(raw))]


def not_utf_8(event: Event, rng: random.Random) -> bytes:
    raw = json.dumps(event).encode()  # in ASCII: no place in it makes these right
    place = rng.randrange(len(raw) + 1)
    return (
        raw[:place]
        + rng.choice([b"\xff", b"\xc3", b"\xe9", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80"])
        + raw[place:]
    )


def a_wrong_byte(event: Event, rng: random.Random) -> bytes:
    raw = as_json(event)
    place = rng.randrange(len(raw) + 1)
    return raw[:place] + rng.choice([b"\0", b"\x01", b"\x1b"]) + raw[place:]  # JSON has them nowhere


def twice_the_same_name(event: Event, _: random.Random) -> bytes:
    return as_json(event)[:-1] + b', "subject": 5}'  # the last one counts, as in Postgres and JavaScript


def encoded_twice(event: Event, _: random.Random) -> bytes:
    return as_json(as_json(event).decode())


def a_small_value(_: Event, rng: random.Random) -> bytes:
    return rng.choice([b"null", b"true", b"false", b"5", b"-0.5e3", b'"text"', b"[]", b"{}", b'""', b"[[[]]]", b"{ }"])


def a_number(_: Event, rng: random.Random) -> bytes:
    return str(rng.getrandbits(200)).encode()


def in_encoding(name: str, event: Event, _: random.Random) -> bytes:
    return json.dumps(event | {"source": "Größe"}, ensure_ascii=False).replace("👍", "").encode(name)


def around(before: bytes, after: bytes, event: Event, _: random.Random) -> bytes:
    return before + as_json(event) + after


def of(raw: bytes, _: Event, __: random.Random) -> bytes:
    return raw


def larger_by(padding: Callable[[Event, str], bytes], event: Event, rng: random.Random) -> bytes:
    return padding(event, "x" * (TOO_MUCH - rng.randrange(1_000)))


BREAKS: Final[list[tuple[str, Break]]] = [
    ("invalid_json", random_bytes),
    ("invalid_json", truncated),
    ("invalid_json", not_utf_8),
    ("invalid_json", a_wrong_byte),
    ("invalid_json", partial(in_encoding, "latin-1")),
    ("invalid_json", partial(in_encoding, "utf-16")),
    ("invalid_json", partial(in_encoding, "utf-16-be")),
    ("invalid_json", partial(in_encoding, "utf-32-le")),
    ("invalid_json", partial(in_encoding, "utf-8-sig")),
    ("invalid_json", partial(around, b"", b"}")),
    ("invalid_json", partial(around, b"", b"\0")),
    ("invalid_json", partial(around, b"", b" // a comment")),
    ("invalid_json", partial(around, b"{} ", b"")),
    ("invalid_json", partial(around, b"event=", b"")),
    ("invalid_json", partial(around, b"base64:", b"")),  # our own mark of what is no text
    ("invalid_json", partial(of, b"")),
    ("invalid_json", partial(of, b" \n\t")),
    ("invalid_json", lambda event, _: str(event).encode()),  # as Python prints it
    ("invalid_json", lambda event, _: as_json(event)[:-1] + b",}"),
    ("invalid_json", lambda event, _: as_json(event) * 2),
    ("invalid_event", encoded_twice),
    ("invalid_event", twice_the_same_name),
    ("invalid_event", a_small_value),
    ("invalid_event", a_number),
    ("invalid_event", partial(around, b"[", b"]")),
    ("invalid_event", partial(around, b'{"event": ', b"}")),
]
HEAVY_BREAKS: Final[list[tuple[str, Break]]] = [
    ("invalid_json", partial(of, b"[" * DEEP)),
    ("invalid_json", partial(of, b"[" * DEEP + b"]" * DEEP)),
    ("invalid_json", partial(of, b'{"a":' * (DEEP // 2))),
    ("invalid_json", lambda event, _: with_json(event, "data.unknown", "[" * DEEP + "]" * DEEP)),
    ("invalid_json", lambda event, _: with_json(event, "data.feedback", '{"a":' * 40_000 + "1" + "}" * 40_000)),
    ("too_large", partial(larger_by, lambda event, text: with_json(event, "data.feedback", f'{{"a": "{text}"}}'))),
    ("too_large", partial(larger_by, lambda event, text: with_json(event, "unknown", f'"{text}"'))),
    ("too_large", partial(larger_by, lambda event, text: as_json(event) + b" " * len(text))),
    ("too_large", partial(larger_by, lambda _, text: b"\xff" + text.encode())),
]
FOREIGN: Final[list[tuple[str, Callable[[bytes, random.Random], Fields]]]] = [
    ("invalid_event", lambda raw, _: {b"evnet": raw}),
    ("invalid_event", lambda raw, _: {b"EVENT": raw, b"event ": raw, b"": b""}),
    ("invalid_event", lambda raw, rng: {rng.randbytes(8): rng.randbytes(50), b"\0\xff": raw}),
    ("invalid_event", lambda raw, _: {b"type": b"interview.finished", b"data": raw, b"id": str(uuid.uuid4()).encode()}),
    ("unsupported_type", lambda raw, rng: {b"type": rng.randbytes(9), b"data": raw}),
]


def _field_breaks() -> Iterator[tuple[str, str, Break]]:
    """Everything wrong in every field: the kind of event, the reason, how to break it."""

    def at(path: str, text: str) -> Break:
        return lambda event, _: with_json(event, path, text)

    def lacking(path: str) -> Break:
        return lambda event, _: without(event, path)

    for kind, wrong_data in WRONG_DATA.items():
        for path, wrong in (WRONG_ENVELOPE | {f"data.{name}": wrong for name, wrong in wrong_data.items()}).items():
            reason = "unsupported_type" if path == "type" else "invalid_event"
            yield from ((kind, reason, at(path, text)) for text in wrong)
            yield from ((kind, "invalid_json", at(path, text)) for text in NO_JSON)
        required = ["id", "subject", "time", "type", "data", *(f"data.{name}" for name in REQUIRED[kind])]
        yield from ((kind, "invalid_event", lacking(path)) for path in required)


def malformed(count: int, sessions: list[str], rng: random.Random) -> list[Entry]:
    """So many malformed entries about these sessions: everything wrong in every field, and whole events broken."""
    shuffled = list(_field_breaks())
    rng.shuffle(shuffled)
    breaks, heavy_breaks = itertools.cycle(BREAKS), itertools.cycle(HEAVY_BREAKS)
    field_breaks, foreign = itertools.cycle(shuffled), itertools.cycle(FOREIGN)

    def fresh(kind: str | None = None) -> Event:
        return whole(kind or rng.choice(list(FULL_DATA)), rng.choice(sessions), rng)

    def one(number: int) -> Entry:
        if number % HEAVY_EVERY == 0:
            reason, break_whole = next(heavy_breaks)
            return Entry({b"event": break_whole(fresh("finished"), rng)}, reason)
        if number % FOREIGN_EVERY == 0:
            reason, fields_of = next(foreign)
            return Entry(fields_of(as_json(fresh()), rng), reason)
        if number % BREAK_EVERY == 0:
            reason, break_whole = next(breaks)
            return Entry({b"event": break_whole(fresh(), rng)} | some_more_fields(rng), reason)
        kind, reason, break_field = next(field_breaks)
        return Entry({b"event": break_field(fresh(kind), rng)}, reason)

    return [one(number) for number in range(count)]


def some_more_fields(rng: random.Random) -> Fields:
    """What an entry may hold besides its event: nobody reads it."""
    return rng.choice([{}, {}, {b"shard": b"7"}, {rng.randbytes(4): rng.randbytes(20), b"": b"event"}])


# ----------------------------------------------------------------------------------------- good, if unexpectedly so

UNKNOWN: Final = [
    *["null", "-1", "1e400", "9" * 4_000, '"text"', NUL, r'"😀"', "[" * 100 + "]" * 100, '{"score": -1, "id": 5}'],
]


def unexpected(event: Event, rng: random.Random) -> Entry:
    """A good event with what a tolerant reader ignores: unknown fields and attributes, another layout, more fields."""
    kind = event["type"].removeprefix("interview.")
    known_elsewhere = [name for names in WRONG_DATA.values() for name in names if name not in WRONG_DATA[kind]]
    event = event | rng.choice([{}, ATTRIBUTES, {"partner": rng.choice([1, None, {"a": [1]}])}])
    names = rng.sample(list(event), len(event))
    raw = with_json(
        {name: event[name] for name in names}, rng.choice([f"data.{rng.choice(known_elsewhere)}", "data.mood", "mood"]),
        rng.choice(UNKNOWN),
    )  # fmt: skip
    return Entry({b"event": rng.choice([raw, b" \r\n\t" + raw + b"\n"])} | some_more_fields(rng))
