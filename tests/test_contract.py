"""The contract: what a publisher may send, what a consumer accepts, and what an error may say about it."""

import copy
import functools
import json
import operator
import time
import traceback
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events import (
    EVENT_TYPES,
    MAX_EVENT_BYTES,
    Answered,
    Cancelled,
    Event,
    Finished,
    InvalidEvent,
    Started,
    json_schema,
    parse_event,
)
from events.contract import new_event_id

JsonObject = dict[str, Any]
MAX_COUNT = 2**31 - 1
MARK = "☠"  # one character that stands in no message: a leak of a part is found too
MISSING = object()

FULL_DATA: dict[str, JsonObject] = {
    "interview.started": {
        "user_id": "11111111-1111-4111-8111-111111111111",
        "email": "ana@example.com",
        "resume_filename": "Lebenslauf ü.pdf",
        "job_description_filename": "job.txt",
        "total_questions": 9,
    },
    "interview.answered": {"questions_answered": 5, "duration_minutes": 15, "total_questions": 9},
    "interview.finished": {
        "score": 87.5,
        "feedback": {"strong": ["SQL", None], "weak": {"tests": None}, "note": "Größe 👍", "n": 1.5},
        "questions_answered": 9,
        "duration_minutes": 40,
        "total_questions": 9,
    },
    "interview.cancelled": {"reason": "line broke", "questions_answered": 2, "duration_minutes": 4},
}
LEAST_DATA: dict[str, JsonObject] = {
    "interview.started": {"user_id": "11111111-1111-4111-8111-111111111111", "email": "ana@example.com"},
    "interview.answered": {"questions_answered": 0},
    "interview.finished": {},
    "interview.cancelled": {},
}


def envelope(kind: str = "finished", **data: Any) -> JsonObject:
    """A valid event as it travels, with all its data, but for what is given."""
    full = f"interview.{kind}"
    return {
        "specversion": "1.0",
        "id": "5b0c3f0e-6a51-4a4e-9b7e-2f8f0b8a4d11",
        "source": "interview-engine",
        "subject": "session_api_123456",
        "time": "2026-11-23T10:15:00Z",
        "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "type": full,
        "data": copy.deepcopy(FULL_DATA[full]) | data,
    }


def changed(event: JsonObject, path: str, value: object) -> JsonObject:
    """The event with another value at a dotted path, or without that field."""
    result = copy.deepcopy(event)
    *parents, last = path.split(".")
    place = result
    for part in parents:
        place = place[part]
    if value is MISSING:
        del place[last]
    else:
        place[last] = value
    return result


def refusal(raw: bytes | str, *, strict: bool = False) -> InvalidEvent:
    with pytest.raises(InvalidEvent) as caught:
        parse_event(raw, strict=strict)
    return caught.value


def refusal_of_new(make: Callable[[], Event]) -> InvalidEvent:
    with pytest.raises(InvalidEvent) as caught:
        make()
    return caught.value


def of_size(size: int) -> bytes:
    """A valid event of so many bytes."""
    padding = size - len(json.dumps(envelope(feedback={"text": ""})))
    return json.dumps(envelope(feedback={"text": "x" * padding})).encode()


# ------------------------------------------------------------------------------------------------- what is valid


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("data", [FULL_DATA, LEAST_DATA], ids=["all fields", "least fields"])
@pytest.mark.parametrize("kind", EVENT_TYPES)
def test_a_valid_event_comes_out_as_it_went_in(kind: str, data: dict[str, JsonObject], strict: bool) -> None:
    original = envelope(kind.removeprefix("interview.")) | {"data": data[kind]}

    event = parse_event(json.dumps(original), strict=strict)

    assert json.loads(event.to_json()) == original
    assert parse_event(event.to_json(), strict=True) == event


@pytest.mark.parametrize("kind", EVENT_TYPES)
def test_an_event_made_by_an_engine_is_read_back_equal(kind: str) -> None:
    models: dict[str, type[Started | Answered | Finished | Cancelled]] = {
        "interview.started": Started,
        "interview.answered": Answered,
        "interview.finished": Finished,
        "interview.cancelled": Cancelled,
    }
    made = models[kind].new("session_1", traceparent="00-ab-cd-01", **FULL_DATA[kind])

    assert made.type == kind
    assert parse_event(made.to_json(), strict=True) == made
    assert json.loads(made.to_json())["data"] == FULL_DATA[kind]


def test_a_new_event_has_a_fresh_id_and_the_present_time_with_an_offset() -> None:
    before = datetime.now(UTC)
    one, two = (Answered.new("session_1", questions_answered=1) for _ in range(2))

    assert one.id != two.id
    assert before <= one.time <= two.time <= datetime.now(UTC)


def test_ids_made_one_after_the_other_are_in_order_of_time() -> None:
    before = time.time_ns() // 1_000_000
    ids = [new_event_id() for _ in range(10_000)]
    after = time.time_ns() // 1_000_000

    assert {each.version for each in ids} == {7}
    assert {each.variant for each in ids} == {uuid.RFC_4122}
    milliseconds = [each.int >> 80 for each in ids]
    assert milliseconds == sorted(milliseconds)
    assert before <= milliseconds[0] <= milliseconds[-1] <= after


def test_ids_differ_in_every_bit_that_is_left_to_chance() -> None:
    chance = (1 << 80) - 1 & ~(0xF << 76 | 0b11 << 62)  # what is neither time nor version nor variant
    drawn = [new_event_id().int & chance for _ in range(1_000)]

    assert len(set(drawn)) == len(drawn)
    assert functools.reduce(operator.or_, drawn) & ~functools.reduce(operator.and_, drawn) == chance


def test_a_new_event_keeps_the_id_the_time_and_the_source_that_it_is_given() -> None:
    event_id, time = uuid.uuid4(), datetime(2026, 11, 23, 12, 15, tzinfo=timezone(timedelta(hours=2)))

    made = Answered.new("session_1", id=event_id, time=time, source="engine-2", questions_answered=1)

    assert (made.id, made.time, made.source) == (event_id, time, "engine-2")


def test_nulls_inside_feedback_survive_while_fields_without_a_value_are_left_out() -> None:
    feedback = {"a": None, "b": [None, {"c": None}]}

    travelling = json.loads(Finished.new("session_1", feedback=feedback).to_json())

    assert travelling["data"] == {"feedback": feedback}
    assert "traceparent" not in travelling


def test_a_null_says_the_same_as_an_absent_field() -> None:
    with_null = json.dumps(envelope() | {"data": {"score": None, "feedback": None}, "traceparent": None})

    assert json.loads(parse_event(with_null).to_json())["data"] == {}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("subject", "x"),
        ("subject", "é" * 200),
        ("data.score", 0),
        ("data.score", 100),
        ("data.score", 99.99),
        ("data.questions_answered", 0),
        ("data.questions_answered", MAX_COUNT),
        ("data.duration_minutes", MAX_COUNT),
        ("data.total_questions", MAX_COUNT),
        ("time", "2026-11-23T10:15:00.123456+05:30"),
        ("time", "2026-11-23t10:15:00z"),
        ("datacontenttype", "application/json"),
    ],
)
def test_the_limits_themselves_are_allowed(path: str, value: object) -> None:
    assert parse_event(json.dumps(changed(envelope(), path, value)), strict=True).type == "interview.finished"


def test_an_event_of_the_greatest_size_is_read_and_one_byte_more_is_too_large() -> None:
    assert parse_event(of_size(MAX_EVENT_BYTES)).type == "interview.finished"

    assert refusal(of_size(MAX_EVENT_BYTES + 1)).reason == "too_large"


def test_the_size_is_counted_in_bytes_also_where_the_event_comes_as_text() -> None:
    text = json.dumps(envelope(feedback={"text": "é" * (MAX_EVENT_BYTES // 2)}), ensure_ascii=False)

    assert len(text) < MAX_EVENT_BYTES
    assert refusal(text).reason == "too_large"


def test_a_publisher_finds_an_event_too_large_when_it_encodes_it() -> None:
    made = Finished.new("session_1", feedback={"text": "x" * MAX_EVENT_BYTES})

    assert refusal_of_new(lambda: parse_event(made.to_json())).reason == "too_large"


# ------------------------------------------------------------------------------ strict publisher, tolerant consumer


@pytest.mark.parametrize("kind", ["started", "answered", "finished", "cancelled"])
@pytest.mark.parametrize("path", ["partner", "data.mood"])
def test_an_unknown_field_is_refused_by_the_publisher_and_ignored_by_the_consumer(kind: str, path: str) -> None:
    raw = json.dumps(changed(envelope(kind), path, {"anything": [1]}))

    assert parse_event(raw) == parse_event(json.dumps(envelope(kind)))
    refused = refusal(raw, strict=True)
    assert (refused.reason, refused.detail.split(":")[0]) == ("invalid_event", path)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Started.new("s", mood=1, **LEAST_DATA["interview.started"]),
        lambda: Answered.new("s", mood=1, questions_answered=1),
        lambda: Finished.new("s", mood=1),
        lambda: Cancelled.new("s", mood=1),
    ],
    ids=["started", "answered", "finished", "cancelled"],
)
def test_an_engine_cannot_make_an_event_with_an_unknown_field(make: Callable[[], Event]) -> None:
    assert refusal_of_new(make).detail == "data.mood: Extra inputs are not permitted"


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        *[(kind, path) for kind in ("started", "cancelled") for path in ("id", "subject", "time", "data", "type")],
        ("started", "data.user_id"),
        ("started", "data.email"),
        ("answered", "data.questions_answered"),
    ],
)
@pytest.mark.parametrize("value", [MISSING, None], ids=["missing", "null"])
def test_a_field_that_must_be_there_is_named(kind: str, path: str, value: object) -> None:
    refused = refusal(json.dumps(changed(envelope(kind), path, value)))

    assert refused.detail.startswith(f"{path}: ")
    assert refused.reason == ("unsupported_type" if (path, value) == ("type", None) else "invalid_event")


COUNTS = [
    ("answered", "data.questions_answered"),
    ("answered", "data.duration_minutes"),
    ("answered", "data.total_questions"),
    ("started", "data.total_questions"),
    ("finished", "data.questions_answered"),
    ("finished", "data.duration_minutes"),
    ("finished", "data.total_questions"),
    ("cancelled", "data.questions_answered"),
    ("cancelled", "data.duration_minutes"),
]
TEXTS = [
    ("started", "subject"),
    ("started", "source"),
    ("started", "traceparent"),
    ("started", "tracestate"),
    ("started", "data.email"),
    ("started", "data.resume_filename"),
    ("started", "data.job_description_filename"),
    ("cancelled", "data.reason"),
]


@pytest.mark.parametrize("value", [-1, MAX_COUNT + 1, 10**30, 1.5, 5.0, True, "5", [5], {"n": 5}])
@pytest.mark.parametrize(("kind", "path"), COUNTS)
def test_a_count_is_a_whole_number_that_postgres_can_hold(kind: str, path: str, value: object) -> None:
    refused = refusal(json.dumps(changed(envelope(kind), path, value)))

    assert (refused.reason, refused.detail.split(":")[0]) == ("invalid_event", path)


@pytest.mark.parametrize("value", ["a\0b", "\0", 5, True, ["a"], {"a": "b"}])
@pytest.mark.parametrize(("kind", "path"), TEXTS)
def test_a_text_is_a_string_without_nul(kind: str, path: str, value: object) -> None:
    refused = refusal(json.dumps(changed(envelope(kind), path, value)))

    assert (refused.reason, refused.detail.split(":")[0]) == ("invalid_event", path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("specversion", "0.3"),
        ("specversion", 1.0),
        ("datacontenttype", "text/xml"),
        ("source", ""),
        ("subject", ""),
        ("subject", "x" * 201),
        ("id", "not a uuid"),
        ("id", ""),
        ("id", 5),
        ("id", "5b0c3f0e-6a51-4a4e-9b7e-2f8f0b8a4d1"),
        ("time", 1795428900),
        ("time", "1795428900"),
        ("time", "2026-11-23"),
        ("time", "2026-11-23T10:15:00"),
        ("time", "2026-11-23 10:15:00Z"),
        ("time", "2026-11-23T10:15Z"),
        ("time", "2026-02-30T10:15:00Z"),
        ("time", "2026-13-01T10:15:00Z"),
        ("time", "2026-11-23T25:15:00Z"),
        ("time", "2026-11-23T10:15:00+25:00"),
        ("time", "2026-11-23T10:15:00Z\n"),
        ("time", "२०२६-11-23T10:15:00Z"),
        ("time", ""),
        ("data", []),
        ("data", "text"),
        ("data.score", -0.01),
        ("data.score", 100.01),
        ("data.score", True),
        ("data.score", "80"),
        ("data.feedback", []),
        ("data.feedback", "good"),
        ("data.feedback", 1),
        ("data.feedback", {"a\0b": 1}),
        ("data.feedback", {"deep": [{"er": ["a\0b"]}]}),
    ],
)
def test_what_breaks_the_contract_is_refused_and_its_field_named(path: str, value: object) -> None:
    refused = refusal(json.dumps(changed(envelope(), path, value)))

    assert (refused.reason, refused.detail.split(":")[0]) == ("invalid_event", path)
    assert str(refused) == f"{refused.reason}: {refused.detail}"
    assert "\n" not in str(refused)


@pytest.mark.parametrize("value", ["", "ana", "@example.com", "ana@", "ana @example.com", f"{'a' * 320}@example.com"])
def test_an_email_has_two_sides_no_space_and_an_end(value: str) -> None:
    assert refusal(json.dumps(envelope("started", email=value))).detail.startswith("data.email: ")


@pytest.mark.parametrize("value", ["not a uuid", "", 5, None, ["x"]])
def test_a_user_id_is_a_uuid(value: object) -> None:
    assert refusal(json.dumps(envelope("started", user_id=value))).detail.startswith("data.user_id: ")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
@pytest.mark.parametrize(
    ("path", "place"),
    [("data.score", "{}"), ("data.feedback", '{{"a": {}}}'), ("data.feedback", '{{"a": [1, {{"b": [{}]}}]}}')],
)
def test_a_number_that_json_cannot_say_is_refused_at_any_depth(number: str, path: str, place: str) -> None:
    raw = json.dumps(changed(envelope(), path, "HERE")).replace('"HERE"', place.format(number))

    refused = refusal(raw)

    assert (refused.reason, refused.detail.split(":")[0]) == ("invalid_event", path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_engine_cannot_make_an_event_with_a_number_that_json_cannot_say(value: float) -> None:
    assert refusal_of_new(lambda: Finished.new("s", score=value)).detail.startswith("data.score: ")
    assert refusal_of_new(lambda: Finished.new("s", feedback={"a": [value]})).detail.startswith("data.feedback: ")


@pytest.mark.parametrize("value", [datetime(2026, 11, 23, tzinfo=UTC), {1, 2}, (1, 2), b"bytes", object()])
def test_feedback_holds_only_what_json_holds(value: object) -> None:
    assert refusal_of_new(lambda: Finished.new("s", feedback={"a": value})).detail.startswith("data.feedback: ")


def test_feedback_that_holds_itself_is_refused() -> None:
    feedback: JsonObject = {}
    feedback["self"] = [feedback]

    assert refusal_of_new(lambda: Finished.new("s", feedback=feedback)).detail.startswith("data.feedback: ")


def test_an_engine_cannot_make_an_event_at_a_time_without_an_offset() -> None:
    naive = datetime(2026, 11, 23, 10, 15)  # noqa: DTZ001 - the point of the test

    assert refusal_of_new(lambda: Answered.new("s", time=naive, questions_answered=1)).detail.startswith("time: ")


@pytest.mark.parametrize(("kind", "path"), [*TEXTS, ("started", "id"), ("finished", "data.feedback")])
def test_a_lone_surrogate_is_no_json(kind: str, path: str) -> None:
    value: object = {"a": ["HERE"]} if path == "data.feedback" else "HERE"
    raw = json.dumps(changed(envelope(kind), path, value)).replace("HERE", r"a\ud800")

    assert refusal(raw).reason == "invalid_json"


def test_text_with_a_lone_surrogate_is_refused_as_bytes_and_as_a_string() -> None:
    text = json.dumps(envelope(), ensure_ascii=False).replace("SQL", "\ud800")

    assert refusal(text).reason == "invalid_event"
    assert refusal(text.encode(errors="surrogatepass")).reason == "invalid_json"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Answered.new("\ud800", questions_answered=1),
        lambda: Answered.new("s", source="\ud800", questions_answered=1),
        lambda: Started.new("s", user_id=uuid.uuid4(), email="\udcff@example.com"),
        lambda: Finished.new("s", feedback={"a": ["\ud800"]}),
        lambda: Finished.new("s", feedback={"\ud800": 1}),
        pytest.param(lambda: Answered.new("s", traceparent="\ud800", questions_answered=1)),
        pytest.param(
            lambda: Started.new("s", user_id=uuid.uuid4(), email="a@example.com", resume_filename="cv\udcff.pdf"),
        ),
        pytest.param(lambda: Cancelled.new("s", reason="\ud800")),
    ],
)
def test_an_engine_cannot_make_an_event_with_a_lone_surrogate(make: Callable[[], Event]) -> None:
    assert refusal_of_new(make).reason == "invalid_event"


def nested(depth: int) -> JsonObject:
    feedback: JsonObject = {}
    for _ in range(depth):
        feedback = {"a": feedback}
    return feedback


def made_or_refused(feedback: JsonObject) -> bytes | InvalidEvent:
    try:
        return Finished.new("s", feedback=feedback).to_json()
    except InvalidEvent as refused:
        return refused


@pytest.mark.parametrize(
    "feedback",
    [
        pytest.param(nested(150), id="150 deep"),
        pytest.param(nested(230), id="230 deep"),
        pytest.param({"n": 10**4000}, id="4001 digits"),
        pytest.param({"n": 10**5000}, id="5001 digits"),
    ],
)
def test_what_an_engine_can_make_a_consumer_can_read(feedback: JsonObject) -> None:
    made = made_or_refused(feedback)

    if isinstance(made, InvalidEvent):  # found at once, where the engine's developer sees it
        assert made.detail.startswith("data.feedback: ")
    else:
        assert json.loads(parse_event(made).to_json())["data"]["feedback"] == feedback


@pytest.mark.parametrize(
    "raw",
    [b"", b" ", b"{", b"not json", b'{"id": 1,}', b"\xff\xfe", b"\xef\xbb\xbf{}", b"{} {}", b"[" * 100_000, b"\0"],
)
def test_what_is_not_json_is_invalid_json(raw: bytes) -> None:
    assert refusal(raw).reason == "invalid_json"


@pytest.mark.parametrize("raw", [b"null", b"5", b'"text"', b"[]", b"true", b"{}", b"NaN"])
def test_json_that_is_no_event_is_an_invalid_event(raw: bytes) -> None:
    assert refusal(raw).reason == "invalid_event"


@pytest.mark.parametrize(
    "kind", ["interview.paused", "started", "", "INTERVIEW.STARTED", 5, None, ["interview.started"]]
)
def test_an_unknown_type_is_unsupported_and_the_known_ones_are_named(kind: object) -> None:
    refused = refusal(json.dumps(envelope() | {"type": kind}))

    assert refused.reason == "unsupported_type"
    assert all(known in refused.detail for known in EVENT_TYPES)


def test_an_error_names_several_fields_but_not_without_end() -> None:
    wrong = envelope(questions_answered=-1, duration_minutes=-1, total_questions=-1) | {
        "id": 1,
        "time": 1,
        "subject": 1,
    }

    named = [part.split(":")[0] for part in refusal(json.dumps(wrong)).detail.split("; ")]

    assert len(named) == len(set(named)) == 5


def test_the_schema_for_other_languages_knows_the_four_types_and_their_limits() -> None:
    schema = json_schema()

    assert set(schema["discriminator"]["mapping"]) == set(EVENT_TYPES)
    (count, _null) = schema["$defs"]["AnsweredData"]["properties"]["duration_minutes"]["anyOf"]
    assert (count["minimum"], count["maximum"]) == (0, MAX_COUNT)


# ----------------------------------------------------------------------------------- what an error must never repeat

VALUE_PATHS = [
    *[("started", path) for path in ("id", "subject", "time", "source", "type", "specversion", "datacontenttype")],
    *[("started", path) for path in ("traceparent", "tracestate", "data.user_id")],
    *TEXTS,
    *COUNTS,
    ("finished", "data.score"),
    ("finished", "data.feedback"),
]

# Wrong in every field: texts for their NUL, the others for their type.
marked = st.text(max_size=5).map(lambda text: f"{MARK}{text}\0{MARK}")
wrong_values = (
    marked | st.lists(marked, min_size=1, max_size=3) | st.dictionaries(marked, marked, min_size=1, max_size=3)
)


def everything_told(error: InvalidEvent) -> str:
    return "".join([str(error), repr(error), error.detail, *traceback.format_exception(error)])


@settings(deadline=None)
@given(st.sampled_from(VALUE_PATHS), wrong_values, st.booleans())
def test_an_error_never_repeats_a_value(where: tuple[str, str], value: object, strict: bool) -> None:
    kind, path = where

    refused = refusal(json.dumps(changed(envelope(kind), path, value), ensure_ascii=False), strict=strict)

    assert MARK not in everything_told(refused)
    assert refused.__cause__ is None


@settings(deadline=None)
@given(st.lists(st.text(max_size=5), min_size=1, max_size=4), marked, st.booleans())
def test_an_error_never_repeats_a_key_or_a_value_deep_in_feedback(path: list[str], value: str, strict: bool) -> None:
    feedback: Any = value
    for key in path:
        feedback = {MARK + key: [feedback]}
    event = envelope(feedback=feedback)

    refused = refusal(json.dumps(event), strict=strict)
    refused_too = refusal_of_new(lambda: Finished.new("s", feedback=feedback))

    assert MARK not in everything_told(refused) + everything_told(refused_too)


@settings(deadline=None)
@given(st.integers(min_value=1))
def test_an_error_never_repeats_the_text_of_broken_json(cut: int) -> None:
    raw = json.dumps(envelope(feedback={MARK: [MARK] * 20}) | {"subject": MARK}, ensure_ascii=False).encode()

    refused = refusal(raw[: -1 - cut % (len(raw) - 1)])

    assert refused.reason == "invalid_json"
    assert MARK not in everything_told(refused)


@pytest.mark.parametrize("value", [MARK, [MARK], {MARK: MARK}])
def test_an_unknown_field_is_named_without_its_value(value: object) -> None:
    for path in ("partner", "data.mood"):
        assert MARK not in everything_told(refusal(json.dumps(changed(envelope(), path, value)), strict=True))
    assert MARK not in everything_told(refusal_of_new(lambda: Finished.new("s", mood=value)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Answered.new(f"{MARK}\0", questions_answered=1),
        lambda: Answered.new("s", questions_answered=MARK),
        lambda: Answered.new("s", time=MARK, questions_answered=1),  # type: ignore[arg-type]  # misuse is the point
        lambda: Answered.new("s", id=MARK, questions_answered=1),  # type: ignore[arg-type]
        lambda: Started.new("s", user_id=MARK, email=MARK, resume_filename=f"{MARK}\0"),
        lambda: Cancelled.new("s", reason=f"{MARK}\0"),
        lambda: Finished.new("s", feedback={MARK: object()}),
    ],
)
def test_an_engine_that_makes_a_wrong_event_is_told_the_field_and_not_the_value(make: Callable[[], Event]) -> None:
    assert MARK not in everything_told(refusal_of_new(make))


# ---------------------------------------------------------------------------------------------- whatever may come

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(), max_size=10), inner, max_size=4)
    ),
    max_leaves=10,
)
almost_events = st.builds(
    lambda kind, some, more: envelope(kind) | some | {"data": more},
    st.sampled_from(["started", "answered", "finished", "cancelled"]),
    st.dictionaries(st.sampled_from(list(envelope())), json_values, max_size=2),
    st.dictionaries(st.sampled_from([field for data in FULL_DATA.values() for field in data]), json_values, max_size=3),
)


def read_or_refused(raw: bytes | str) -> Event | InvalidEvent:
    try:
        return parse_event(raw)
    except InvalidEvent as refused:
        return refused


def only_invalid_event_is_raised(raw: bytes | str) -> None:
    """And what is read can be written, and read again."""
    event = read_or_refused(raw)
    if isinstance(event, InvalidEvent):
        assert event.reason in {"invalid_json", "invalid_event", "unsupported_type"}
        assert event.detail
    else:
        assert parse_event(event.to_json(), strict=True) == event


@settings(deadline=None)
@given(st.binary() | st.text(st.characters(codec=None)))
def test_arbitrary_bytes_and_texts_raise_nothing_but_invalid_event(raw: bytes | str) -> None:
    only_invalid_event_is_raised(raw)


@settings(deadline=None)
@given(json_values | almost_events, st.booleans())
def test_arbitrary_json_raises_nothing_but_invalid_event(value: object, ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)

    only_invalid_event_is_raised(text)
    only_invalid_event_is_raised(text.encode(errors="surrogatepass"))
