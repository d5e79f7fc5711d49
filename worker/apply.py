"""Applying a pack: validate, apply in one call, dead-letter the guilty, take the entries out of the stream."""

import time
from collections import Counter
from typing import Final, NamedTuple

from events import Event, InvalidEvent, parse_event
from worker import metrics, tracing
from worker.database import Answer, Database, Letter
from worker.dead_letters import dead_letter
from worker.dead_share import DeadShare
from worker.errors import RefusedCall
from worker.hold import Hold
from worker.logs import get_logger
from worker.pack import Pack
from worker.stream import EventStream

MAX_ATTEMPTS_ALONE: Final = 2  # an entry that ends neither of these is poison

log = get_logger(__name__)


class ValidEvent(NamedTuple):
    """An event that keeps the contract, and as it came."""

    raw: bytes
    event: Event


class Applier:
    """Applies packs; what it leaves in the stream comes again."""

    def __init__(self, database: Database, stream: EventStream, hold: Hold, dead_share: DeadShare) -> None:
        self._database = database
        self._stream = stream
        self._hold = hold
        self._dead_share = dead_share

    def apply(self, pack: Pack) -> Counter[str]:
        """Apply a pack and take its entries out of the stream; answer how many events had which outcome.

        Raises PackGivenBack when the pack is left to another worker, redis.RedisError when it was applied but
        could not be taken out (it will come again, and be found applied).
        """
        self._hold.run(self._dead_share.check)
        began = time.monotonic()
        if pack.alone and self._stream.count_attempt(pack.entry_ids[0]) > MAX_ATTEMPTS_ALONE:
            valid, letters = list[ValidEvent](), [_poison(pack.events[0])]
        else:
            valid, letters = _validate(pack)
        with tracing.pack_span(len(pack.events), (each.event.traceparent for each in valid)):
            outcomes = self._apply_events(valid) + self._dead_letter(letters)
            metrics.count_pack(len(pack.events))
            self._dead_share.count(outcomes)
            self._stream.done(pack.entry_ids, attempted=pack.alone)
        log.debug("pack.applied", seconds=round(time.monotonic() - began, 4), **outcomes)
        return outcomes

    def _apply_events(self, events: list[ValidEvent]) -> Counter[str]:
        if not events:
            return Counter()
        try:
            answers = self._hold.run(lambda: self._database.apply_events([each.event for each in events]))
        except RefusedCall as refused:
            if len(events) == 1:
                return self._dead_letter([dead_letter(events[0].raw, "rejected", refused.detail)])
            half = len(events) // 2
            return self._apply_events(events[:half]) + self._apply_events(events[half:])
        metrics.count_lag(
            each.event.time for each, answer in zip(events, answers, strict=True) if answer["outcome"] == "applied"
        )
        return _told(answers)

    def _dead_letter(self, letters: list[Letter]) -> Counter[str]:
        if not letters:
            return Counter()
        try:
            answers = self._hold.run(lambda: self._database.record_dead_events(letters))
        except RefusedCall:
            if len(letters) == 1:
                raise  # the entry stays claimed, and comes again
            half = len(letters) // 2
            return self._dead_letter(letters[:half]) + self._dead_letter(letters[half:])
        return _told(answers)


def _validate(pack: Pack) -> tuple[list[ValidEvent], list[Letter]]:
    valid: list[ValidEvent] = []
    letters: list[Letter] = []
    for raw in pack.events:
        try:
            valid.append(ValidEvent(raw, parse_event(raw)))
        except InvalidEvent as invalid:
            letters.append(dead_letter(raw, invalid.reason, invalid.detail))
    return valid, letters


def _poison(raw: bytes) -> Letter:
    return dead_letter(raw, "poison", f"{MAX_ATTEMPTS_ALONE} attempts to apply it alone did not end")


def _told(answers: list[Answer]) -> Counter[str]:
    """How many events had which outcome (see worker.outcomes), counted; those that are dead are told."""
    outcomes: Counter[str] = Counter()
    for answer in answers:
        if answer["outcome"] == "rejected":
            log.warning("event.dead_lettered", event_id=answer["id"], reason=answer["reason"], detail=answer["detail"])
            outcomes["again" if answer.get("again") else str(answer["reason"])] += 1
        else:
            outcomes[answer["outcome"]] += 1
    metrics.count_outcomes(outcomes)
    return outcomes
