"""The contract: four interview events in CloudEvents 1.0 envelopes, as JSON.

An engine makes events with `Started.new(session_id, ...)` and its three siblings, which are strict: an unknown
field is an error at once. A consumer reads them with `parse_event(raw)`, which is tolerant: unknown attributes
and unknown data fields are ignored, so that an engine may be deployed first. Changes only add.

Source: DESIGN section 3; https://github.com/cloudevents/spec (structured mode).
"""

import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal, Self, TypeVar
from uuid import UUID

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    JsonValue,
    TypeAdapter,
    ValidationError,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError, SchemaValidator, core_schema

from events.errors import InvalidEvent

MAX_EVENT_BYTES: Final = 256 * 1024
MAX_INTEGER: Final = 2**31 - 1  # Postgres' integer
MAX_NUMBER: Final = sys.float_info.max
MAX_DEPTH: Final = 100  # levels of nesting in feedback
MAX_PROBLEMS: Final = 5  # named in one error

_SURROGATE = re.compile("[\ud800-\udfff]")
# In the words of Rust's regex: without a look at each character in Python, which took as long as all the rest.
_RFC_3339: Final = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})$"
_NO_NUL: Final = r"^[^\x00]*$"
_EMAIL: Final = r"^[^@\s\x00\x1c-\x1f]+@[^\s\x00\x1c-\x1f]+$"  # with all that Python calls white space


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("contract", message)


def _matching(pattern: str, message: str) -> CoreSchema:
    """Text that matches; else the error says `message`."""
    return core_schema.custom_error_schema(
        core_schema.str_schema(strict=True, pattern=pattern),
        custom_error_type="contract",
        custom_error_message=message,
    )


@dataclass(frozen=True)
class _Matches:
    """Text that matches a pattern. In Python a lone surrogate is possible, too, which JSON text cannot hold."""

    pattern: str
    message: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        text = handler(source)
        matches = core_schema.chain_schema([text, _matching(self.pattern, self.message)])
        without_surrogates = core_schema.no_info_after_validator_function(_no_surrogate, text)
        return core_schema.json_or_python_schema(
            json_schema=matches, python_schema=core_schema.chain_schema([without_surrogates, matches])
        )


def _no_surrogate(value: str) -> str:
    if not value.isascii() and _SURROGATE.search(value):
        raise _wrong("must not contain lone surrogates")
    return value


def _text(value: str) -> str:
    if "\0" in value:
        raise _wrong("must not contain NUL characters")
    return _no_surrogate(value)


def _storable(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse, at any depth, what JSON cannot say, Postgres cannot hold, or another reader cannot read."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for each in level:
            match each:
                case dict():
                    below += each.keys()
                    below += each.values()
                case list():
                    below += each
                case str():
                    _text(each)
                case int() | float() if not abs(each) <= MAX_NUMBER:  # NaN compares as false
                    raise _wrong("must not contain NaN, infinite or larger numbers than a double holds")
        if not below:
            return value
        level = below
    raise _wrong(f"must not be nested deeper than {MAX_DEPTH} levels")


_PLAIN: Final = _Matches(_NO_NUL, "must not contain NUL characters")

Text = Annotated[str, Field(strict=True), _PLAIN]
Email = Annotated[str, Field(strict=True, max_length=320), _Matches(_EMAIL, "must be an e-mail address")]
SessionId = Annotated[str, Field(strict=True, min_length=1, max_length=200), _PLAIN]
Source = Annotated[str, Field(strict=True, min_length=1), _PLAIN]
Count = Annotated[int, Field(strict=True, ge=0, le=MAX_INTEGER)]
Score = Annotated[float, Field(strict=True, ge=0, le=100, allow_inf_nan=False)]
JsonObject = Annotated[dict[str, JsonValue], AfterValidator(_storable)]


class _Rfc3339:
    """A moment in UTC: RFC 3339 text, or in Python an aware datetime.

    Not what pydantic would also take for a time: a number, a date, a time without seconds. In UTC, because Postgres
    takes no offset of 16 hours and more.
    """

    @staticmethod
    def __get_pydantic_core_schema__(source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        aware = core_schema.datetime_schema(tz_constraint="aware")
        text = core_schema.chain_schema([_matching(_RFC_3339, NOT_RFC_3339), aware])
        in_python = core_schema.no_info_before_validator_function(_datetime_or_text, aware)
        return core_schema.no_info_after_validator_function(
            _in_utc, core_schema.json_or_python_schema(json_schema=text, python_schema=in_python)
        )

    @staticmethod
    def __get_pydantic_json_schema__(schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "format": "date-time"}


NOT_RFC_3339: Final = "must be RFC 3339 with an offset, as 2026-11-23T10:15:00Z"
_is_rfc_3339 = SchemaValidator(_matching(_RFC_3339, NOT_RFC_3339)).validate_python


def _datetime_or_text(value: object) -> object:
    return value if isinstance(value, datetime) else _is_rfc_3339(value)


def _in_utc(value: datetime) -> datetime:
    """The same moment in UTC, where it is within the years 1 to 9999 there."""
    try:
        return value.astimezone(UTC)
    except OverflowError:
        raise ValueError("must be within the years 1 to 9999 in UTC") from None


Time = Annotated[datetime, _Rfc3339]


def new_event_id() -> UUID:
    """A UUID of version 7 (RFC 9562): in order of time, so that the ledger's index grows at one end.

    With random ones Postgres writes twice the WAL for an event.
    """
    milliseconds, noise = time.time_ns() // 1_000_000, int.from_bytes(os.urandom(10))
    version_7, variant = 0x7 << 76, 0b10 << 62
    return UUID(int=milliseconds << 80 | version_7 | noise >> 68 << 64 | variant | noise & (1 << 62) - 1)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StartedData(_Model):
    """Whose interview it is, and on what."""

    user_id: UUID
    email: Email
    resume_filename: Text | None = None
    job_description_filename: Text | None = None
    total_questions: Count | None = None


class AnsweredData(_Model):
    """Progress; both numbers are cumulative."""

    questions_answered: Count
    duration_minutes: Count | None = None
    total_questions: Count | None = None


class FinishedData(_Model):
    """The result; score from 0 to 100."""

    score: Score | None = None
    feedback: JsonObject | None = None
    questions_answered: Count | None = None
    duration_minutes: Count | None = None
    total_questions: Count | None = None


class CancelledData(_Model):
    """Why it was broken off, and how far it had come."""

    reason: Text | None = None
    questions_answered: Count | None = None
    duration_minutes: Count | None = None


class _Envelope(_Model):
    """CloudEvents' attributes; `subject` is the session's id."""

    specversion: Literal["1.0"] = "1.0"
    id: UUID
    source: Source = "interview-engine"
    subject: SessionId
    time: Time
    datacontenttype: Literal["application/json"] | None = None
    traceparent: Text | None = None
    tracestate: Text | None = None

    @classmethod
    def new(
        cls,
        session_id: str,
        *,
        id: UUID | None = None,  # noqa: A002 - CloudEvents' own name
        time: datetime | None = None,
        source: str = "interview-engine",
        traceparent: str | None = None,
        **data: Any,
    ) -> Self:
        """Make an event: `data` as in the type's model, `time` now and `id` a new_event_id unless given.

        Raises InvalidEvent, naming the fields that are wrong and never repeating their values.
        """
        return _validated(
            lambda: cls.model_validate(
                {
                    "id": id or new_event_id(),
                    "source": source,
                    "subject": session_id,
                    "time": time or datetime.now(UTC),
                    "traceparent": traceparent,
                    "data": data,
                }
            )
        )

    def to_json(self) -> bytes:
        """The event as it travels; attributes without a value are left out. Raises InvalidEvent over the limit."""
        raw = self.model_dump_json(exclude_none=True).encode()
        _check_size(raw)
        return raw


class Started(_Envelope):
    """An interview began."""

    type: Literal["interview.started"] = "interview.started"
    data: StartedData


class Answered(_Envelope):
    """A question was answered."""

    type: Literal["interview.answered"] = "interview.answered"
    data: AnsweredData


class Finished(_Envelope):
    """An interview was finished, or its result was revised."""

    type: Literal["interview.finished"] = "interview.finished"
    data: FinishedData


class Cancelled(_Envelope):
    """An interview was broken off."""

    type: Literal["interview.cancelled"] = "interview.cancelled"
    data: CancelledData


Event = Started | Answered | Finished | Cancelled
EVENT_TYPES: Final = tuple(
    str(model.model_fields["type"].default) for model in (Started, Answered, Finished, Cancelled)
)

EventT = TypeVar("EventT", bound=_Envelope)
_event: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="type")])
_validate_json: Final = _event.validator.validate_json  # without TypeAdapter's own way to it


def parse_event(raw: bytes | str, *, strict: bool = False) -> Event:
    """Read one event from JSON text; `strict` as a publisher, refusing unknown fields.

    Raises InvalidEvent with one of the reasons `invalid_json`, `invalid_event`, `unsupported_type`, `too_large`
    and a detail that names the fields and never repeats their values.
    """
    _check_size(raw)
    try:
        event: Event = _validate_json(raw, extra="forbid" if strict else "ignore")
    except ValidationError as error:
        explained = _explained(error)
    else:
        return event
    try:
        raise explained  # out here, because the cause would repeat the values
    finally:
        del explained  # or its traceback holds itself, and with it the whole pack


def json_schema() -> dict[str, Any]:
    """The contract as JSON Schema, for engines in other languages."""
    return _event.json_schema()


def _check_size(raw: bytes | str) -> None:
    size = len(raw) if isinstance(raw, bytes) else len(raw.encode(errors="surrogatepass"))
    if size > MAX_EVENT_BYTES:
        raise InvalidEvent("too_large", f"{size} bytes, {MAX_EVENT_BYTES} at most")


def _validated(make: Callable[[], EventT]) -> EventT:
    """Call a pydantic validation and tell its errors in our words."""
    try:
        return make()
    except ValidationError as error:
        explained = _explained(error)
    try:
        raise explained  # out here, because the cause would repeat the values
    finally:
        del explained  # or its traceback holds itself, and with it the whole pack


def _explained(error: ValidationError) -> InvalidEvent:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    first = problems[0]
    if first["type"] == "json_invalid":
        return InvalidEvent("invalid_json", first["msg"].removeprefix("Invalid JSON: "))
    if first["type"] == "union_tag_invalid":
        return InvalidEvent("unsupported_type", f"type: must be one of {', '.join(EVENT_TYPES)}")
    if first["type"] == "union_tag_not_found":
        return InvalidEvent("invalid_event", "type: Field required")
    return InvalidEvent(
        "invalid_event", "; ".join(f"{_field(p['loc'])}: {_message(p)}" for p in problems[:MAX_PROBLEMS])
    )


def _message(problem: ErrorDetails) -> str:
    """Pydantic's message; that of a UUID would quote a part of it."""
    return "must be a UUID" if problem["type"] == "uuid_parsing" else problem["msg"]


def _field(location: tuple[int | str, ...]) -> str:
    """The field's path without the union's tag, and without the keys inside feedback, which are the candidate's."""
    path = [str(part) for part in location if part not in EVENT_TYPES]
    return ".".join(path[: path.index("feedback") + 1] if "feedback" in path else path) or "event"
