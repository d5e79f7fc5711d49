"""Interviews that never were, as an engine would publish them: many at once, late, twice and broken at wish.

Pure: no clock and no Redis, all randomness passed in. A little more than the interviews under way is in memory,
however many there are.
"""

import itertools
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from heapq import heappop, heappush
from random import Random
from typing import Any, Final, Literal, NamedTuple

from events import MAX_EVENT_BYTES, Answered, Cancelled, Event, Finished, Started

QUESTIONS: Final = (8, 15)  # fewest and most in an interview
ANSWER_SECONDS: Final = (60, 300)  # shortest and longest time for an answer
VERDICT_SECONDS: Final = (20, 120)  # from the last answer to the score, or to the cancel
ENDINGS: Final = {"finished": 75, "cancelled": 15, "unfinished": 10}  # in a hundred
BEGIN_EVERY: Final = timedelta(seconds=75)  # on average; so some 25 interviews are under way at once
LONGEST: Final = timedelta(seconds=QUESTIONS[1] * ANSWER_SECONDS[1] + VERDICT_SECONDS[1])
LATE_BY: Final = (2, 100)  # events that overtake a late one: up to some four of each interview under way

Kind = Literal["event", "repeat", "bad"]


class Simulated(NamedTuple):
    """An event as it is to be published, and what it is; `ends` where nothing happens in its interview after it."""

    raw: bytes
    kind: Kind
    ends: bool = False


def simulated(
    sessions: int,
    users: Sequence[uuid.UUID],
    rng: Random,
    *,
    until: datetime,
    shuffle: float = 0.0,
    repeat: float = 0.0,
    bad: float = 0.0,
) -> Iterator[Simulated]:
    """The events of so many interviews of these users in the order of their arrival; the last has ended at `until`.

    `shuffle` and `repeat` are the shares of events that come late, and that come twice; `bad`, below 1, is the share
    of malformed ones in all, not counting the repeats. They are added: the interviews are the same whatever the
    shares are.
    """
    telling, ordering, spoiling = (Random(rng.getrandbits(64)) for _ in range(3))  # noqa: S311 - no secrets
    begin = until - sessions * BEGIN_EVERY - LONGEST
    stories = (
        _interview(telling.choice(users), telling, begin + (nth + telling.random()) * BEGIN_EVERY)
        for nth in range(sessions)
    )

    def on_their_way() -> Iterator[tuple[int, Simulated]]:
        for event, ends in _in_order_of_time(stories):
            raw = event.to_json()
            yield ordering.randint(*LATE_BY) if ordering.random() < shuffle else 0, Simulated(raw, "event", ends)
            if ordering.random() < repeat:
                yield ordering.randint(*LATE_BY), Simulated(raw, "repeat")
            while spoiling.random() < bad:
                yield 0, Simulated(_spoilt(event, spoiling), "bad")

    return _in_order_of_arrival(on_their_way())


def email_of(user: uuid.UUID) -> str:
    """A simulated candidate's address."""
    return f"sim-{user.hex[:12]}@example.com"


def _interview(user: uuid.UUID, rng: Random, begin: datetime) -> list[Event]:
    """One interview in the order in which it happens."""
    session_id = f"sim-{_uuid(rng)}"
    questions = rng.randint(*QUESTIONS)
    (ending,) = rng.choices(list(ENDINGS), weights=list(ENDINGS.values()))
    answers = questions if ending == "finished" else rng.randrange(questions)
    story: list[Event] = [
        Started.new(
            session_id,
            id=_uuid(rng),
            time=begin,
            user_id=user,
            email=email_of(user),
            resume_filename=f"resume-{user.hex[:6]}.pdf",
            job_description_filename=rng.choice(["backend-engineer.pdf", "data-analyst.pdf", "support-lead.pdf"]),
            total_questions=questions,
        )
    ]
    now = begin
    for nth in range(1, answers + 1):
        now += timedelta(seconds=rng.uniform(*ANSWER_SECONDS))
        minutes = _minutes(now - begin)
        story.append(
            Answered.new(session_id, id=_uuid(rng), time=now, questions_answered=nth, duration_minutes=minutes)
        )
    now += timedelta(seconds=rng.uniform(*VERDICT_SECONDS))
    progress: dict[str, Any] = {"questions_answered": answers, "duration_minutes": _minutes(now - begin)}
    if ending == "finished":
        score = round(rng.triangular(20, 100, 75), 1)
        feedback = {"overall_score": score, "strengths": rng.sample(["clarity", "depth", "calm", "examples"], 2)}
        story.append(Finished.new(session_id, id=_uuid(rng), time=now, score=score, feedback=feedback, **progress))
    elif ending == "cancelled":
        reason = rng.choice(["connection lost", "called away", "postponed"])
        story.append(Cancelled.new(session_id, id=_uuid(rng), time=now, reason=reason, **progress))
    return story


def _minutes(duration: timedelta) -> int:
    return duration // timedelta(minutes=1)


def _uuid(rng: Random) -> uuid.UUID:
    return uuid.UUID(int=rng.getrandbits(128), version=4)


def _in_order_of_time(stories: Iterable[list[Event]]) -> Iterator[tuple[Event, bool]]:
    """The events of stories that come in the order of their beginnings, and whether each is its story's last."""
    ahead: list[tuple[datetime, int, Event, bool]] = []
    number = itertools.count()  # tied times in the order of the stories
    for story in stories:
        while ahead and ahead[0][0] <= story[0].time:
            yield heappop(ahead)[2:]
        for event in story:
            heappush(ahead, (event.time, next(number), event, event is story[-1]))
    while ahead:
        yield heappop(ahead)[2:]


def _in_order_of_arrival(on_their_way: Iterable[tuple[int, Simulated]]) -> Iterator[Simulated]:
    """Each event after so many others as its delay says."""
    late: list[tuple[int, int, Simulated]] = []
    for place, (delay, event) in enumerate(on_their_way):
        heappush(late, (place + delay, place, event))
        while late and late[0][0] <= place:
            yield heappop(late)[2]
    while late:
        yield heappop(late)[2]


# What may be wrong with an event. Each has an id of its own: the good event is not to resolve its dead letter.


def _truncated(event: Event, rng: Random) -> bytes:
    raw = event.to_json()
    return raw[: rng.randrange(len(raw) // 2, len(raw))]


def _not_text(event: Event, rng: Random) -> bytes:
    raw = event.to_json()
    place = rng.randrange(len(raw))
    return raw[:place] + b"\xff" + raw[place:]


def _wrong_field(event: Event, rng: Random) -> bytes:
    wrong = {
        "id": f"{event.id}-1",
        "subject": "",
        "time": f"{event.time:%d.%m.%Y %H:%M}",
        "data": {"questions_answered": -1},
    }
    name = rng.choice(list(wrong))
    return _with(event, **{name: wrong[name]})


def _unknown_type(event: Event, rng: Random) -> bytes:
    return _with(event, type=rng.choice(["interview.paused", "interview.resumed"]))


def _too_large(event: Event, _: Random) -> bytes:
    return _with(event, type="interview.finished", data={"feedback": {"transcript": "word " * (MAX_EVENT_BYTES // 5)}})


def _unknown_user(event: Event, rng: Random) -> bytes:
    """A start of another session, so that no good event waits for it."""
    nobody = _uuid(rng)
    return Started.new(
        f"sim-{_uuid(rng)}", id=event.id, time=event.time, user_id=nobody, email=email_of(nobody)
    ).to_json()


def _with(event: Event, **changes: object) -> bytes:
    return json.dumps(event.model_dump(mode="json", exclude_none=True) | changes).encode()


_SPOILERS: Final[dict[Callable[[Event, Random], bytes], int]] = {  # how often each is chosen, of twenty times
    _truncated: 4,
    _not_text: 2,
    _wrong_field: 6,
    _unknown_type: 4,
    _too_large: 1,  # 256 KiB each, in Redis and in the dead letters
    _unknown_user: 3,
}


def _spoilt(event: Event, rng: Random) -> bytes:
    (spoil,) = rng.choices(list(_SPOILERS), weights=list(_SPOILERS.values()))
    return spoil(event.model_copy(update={"id": _uuid(rng)}), rng)
