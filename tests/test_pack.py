"""The pure parts between the stream and the database: raw events, dead letters as text, the wait between two tries."""

import json
import uuid
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from worker.dead_letters import BASE64_MARK, MAX_NAME, dead_letter, original_bytes, stored_text
from worker.retry import MAX_EXPONENT, Backoff
from worker.stream import raw_event

UNUSUAL_TEXT = st.text(st.characters(codec=None))  # with NUL and lone surrogates


# ---------------------------------------------------------------------------------------------------- raw events


@given(st.binary(), st.dictionaries(st.binary(), st.binary()))
def test_an_entrys_event_is_its_field_whatever_else_it_holds(raw: bytes, others: dict[bytes, bytes]) -> None:
    assert raw_event({**others, b"event": raw}) == raw


def test_an_empty_event_is_an_event() -> None:
    assert raw_event({b"event": b""}) == b""


@given(st.dictionaries(st.binary().filter(lambda name: name != b"event"), st.binary()))
def test_an_entry_without_an_event_becomes_all_its_fields_as_json(fields: dict[bytes, bytes]) -> None:
    told = json.loads(raw_event(fields))

    assert isinstance(told, dict)
    assert len(told) <= len(fields)


def test_foreign_fields_stay_readable() -> None:
    fields = {b"payload": b'{"id": 1}', b"\xff": "ü".encode()}

    assert json.loads(raw_event(fields)) == {"payload": '{"id": 1}', r"\xff": "ü"}


# -------------------------------------------------------------------------------------------------- dead letters


@given(st.binary() | st.text().map(str.encode))
@example(b"")
@example(b"\0")
@example(b'{"id": "\0"}')
@example(b"\xed\xa0\x80")  # a surrogate, which UTF-8 has not
@example(BASE64_MARK.encode())
@example(BASE64_MARK.encode() + b"AAAA")
@example(stored_text(b"\xff").encode())
def test_an_event_is_kept_byte_for_byte_as_text_that_postgres_can_hold(raw: bytes) -> None:
    stored = stored_text(raw)

    assert "\0" not in stored
    assert original_bytes(stored) == raw


@given(st.text().filter(lambda text: "\0" not in text and not text.startswith(BASE64_MARK)))
def test_an_event_that_is_text_is_kept_as_it_is(text: str) -> None:
    assert stored_text(text.encode()) == text


def test_different_events_are_never_the_same_letter() -> None:
    disguised = stored_text(b"\xff").encode()

    assert stored_text(disguised) != stored_text(b"\xff")


def test_a_letter_names_the_event_the_session_and_the_type() -> None:
    event_id = str(uuid.uuid4())
    raw = json.dumps({"id": event_id, "subject": "session_1", "type": "interview.paused"}).encode()

    assert dead_letter(raw, "unsupported_type", "why") == {
        "event": raw.decode(),
        "event_id": event_id,
        "session_id": "session_1",
        "type": "interview.paused",
        "reason": "unsupported_type",
        "detail": "why",
    }


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"\xff", b"null", b"[]", b"5", b"{}", b"[" * 100_000, b'{"id": 5, "subject": null, "type": ["x"]}'],
)
def test_a_letter_names_nothing_where_nothing_can_be_read(raw: bytes) -> None:
    letter = dead_letter(raw, "invalid_json", "why")

    assert (letter["event_id"], letter["session_id"], letter["type"]) == (None, None, None)
    assert original_bytes(letter["event"]) == raw


@given(st.dictionaries(st.sampled_from(["id", "subject", "type"]), UNUSUAL_TEXT))
def test_the_names_in_a_letter_can_be_stored_whatever_they_are(event: dict[str, Any]) -> None:
    letter = dead_letter(json.dumps(event).encode(), "invalid_event", "why")

    for name in (letter["event_id"], letter["session_id"], letter["type"]):
        assert name is None or "\0" not in name
        assert name is None or len(name) <= MAX_NAME
    assert json.dumps(letter, ensure_ascii=False).encode()  # no lone surrogate is left


# --------------------------------------------------------------------------------------------------------- waits

positive = st.floats(min_value=0.001, max_value=1000)
randomness = st.floats(min_value=0, max_value=1)


@given(positive, positive, st.integers(min_value=0), randomness)
def test_a_wait_is_at_least_zero_and_at_most_the_cap(base: float, cap: float, attempt: int, drawn: float) -> None:
    assert 0 <= Backoff(base, cap).seconds(attempt, drawn) <= cap


@given(positive, st.integers(min_value=0, max_value=MAX_EXPONENT - 1))
def test_the_longest_wait_doubles_with_each_attempt(base: float, attempt: int) -> None:
    backoff = Backoff(base, cap=float("inf"))

    assert backoff.seconds(attempt + 1, 1.0) == 2 * backoff.seconds(attempt, 1.0)


@given(st.integers(min_value=MAX_EXPONENT))
def test_the_exponent_is_clamped(attempt: int) -> None:
    backoff = Backoff(base=0.5, cap=float("inf"))

    assert backoff.seconds(attempt, 1.0) == backoff.seconds(MAX_EXPONENT, 1.0)


@given(randomness)
def test_the_jitter_is_full(drawn: float) -> None:
    assert Backoff(base=1.0, cap=8.0).seconds(10, drawn) == 8.0 * drawn
