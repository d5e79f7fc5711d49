"""Applying a pack: validate, apply in one call, dead-letter the guilty, take the entries out of the stream."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Final, NamedTuple

import redis

from events import Event, InvalidEvent, parse_event
from worker import metrics, tracing
from worker.apply.pack import Pack
from worker.database import Answer, Database
from worker.dead_letters import dead_letter
from worker.dead_share import DeadShare
from worker.errors import PackGivenBack, RefusedCall
from worker.hold import Hold
from worker.logs import get_logger
from worker.stream import PACK_BYTES, Entry

MAX_ATTEMPTS_ALONE: Final = 5  # an entry for which none of these came to an end is poison

log = get_logger(__name__)


class Valid(NamedTuple):
    """An event that keeps the contract, and the entry it came in."""

    entry: Entry
    event: Event


class Dead(NamedTuple):
    """An entry that cannot be applied, and why."""

    entry: Entry
    reason: str
    detail: str


class Applier:
    """Applies packs; what it leaves in the stream comes again."""

    def __init__(self, database: Database, hold: Hold, dead_share: DeadShare) -> None:
        self._database = database
        self._hold = hold
        self._dead_share = dead_share

    def apply(self, pack: Pack) -> Counter[str]:
        """Apply a pack and take its entries out of the stream; return how many events had which outcome.

        Raises PackGivenBack when the pack is left to another worker, redis.RedisError when it was applied but could not
        be taken out (it will come again, and be found applied).
        """
        return self._finish(pack, *_validate(pack.entries))

    def apply_alone(self, pack: Pack) -> Counter[str]:
        """As apply, for a pack of one suspect; after MAX_ATTEMPTS_ALONE that did not end, it is poison.

        An attempt counts from here until the request to Supabase leaves: a process that is killed while it waits for an
        answer says nothing about the event. Raises redis.RedisError also where the attempt cannot be counted.
        """
        attempt = pack.begin_attempt()
        if attempt.count() > MAX_ATTEMPTS_ALONE:
            detail = f"{MAX_ATTEMPTS_ALONE} attempts to apply it alone did not end"
            return self._finish(pack, [], [Dead(pack.entries[0], "poison", detail)])
        try:
            return self._finish(pack, *_validate(pack.entries))
        except (PackGivenBack, redis.RedisError):
            raise
        except Exception:
            attempt.count()  # a fault of ours that this event brings out
            raise

    def _finish(self, pack: Pack, valid: Sequence[Valid], dead: Sequence[Dead]) -> Counter[str]:
        began = time.monotonic()
        with tracing.pack_span(len(pack.entries), (each.event.traceparent for each in valid)):
            outcomes = self._apply_events(pack, valid)
            for chunk in _chunks(dead):
                outcomes += self._dead_letter(pack, chunk)
            pack.acknowledge(then=lambda pipeline: self._dead_share.count(pipeline, outcomes))
            metrics.count_pack(len(pack.entries))
            self._dead_share.close_where_too_many(outcomes)
        log.debug("pack.applied", seconds=round(time.monotonic() - began, 4), **outcomes)
        return outcomes

    def _apply_events(self, pack: Pack, events: Sequence[Valid]) -> Counter[str]:
        pack.refresh()
        events = [each for each in events if each.entry.id not in pack.lost] if pack.lost else events
        if not events:
            return Counter()
        parsed = [each.event for each in events]
        try:
            result = self._hold.run(
                lambda: self._database.apply_pack(parsed, before_request=pack.leave), waiting=pack.wait
            )
        except RefusedCall as refused:
            if len(events) == 1:
                return self._dead_letter(pack, [Dead(events[0].entry, "rejected", refused.detail)])
            half = len(events) // 2
            return self._apply_events(pack, events[:half]) + self._apply_events(pack, events[half:])
        metrics.count_lag(_times_of_applied(parsed, result.others))
        return _log_and_count(result.others, applied=result.applied)

    def _dead_letter(self, pack: Pack, dead: Sequence[Dead]) -> Counter[str]:
        pack.refresh()
        letters = [dead_letter(each.entry.event, each.reason, each.detail) for each in dead]
        try:
            answers = self._hold.run(
                lambda: self._database.record_dead_events(letters, before_request=pack.leave), waiting=pack.wait
            )
        except RefusedCall:
            if len(dead) == 1:
                raise  # the entry stays claimed, and comes again
            half = len(dead) // 2
            return self._dead_letter(pack, dead[:half]) + self._dead_letter(pack, dead[half:])
        return _log_and_count(answers)


def _validate(entries: Sequence[Entry]) -> tuple[list[Valid], list[Dead]]:
    valid: list[Valid] = []
    dead: list[Dead] = []
    for entry in entries:
        try:
            valid.append(Valid(entry, parse_event(entry.event)))
        except InvalidEvent as invalid:
            dead.append(Dead(entry, invalid.reason, invalid.detail))
    return valid, dead


def _chunks(dead: Sequence[Dead]) -> Iterator[list[Dead]]:
    """Parts of PACK_BYTES at most, or of one entry: a letter holds its event several times over while it is sent."""
    chunk: list[Dead] = []
    size = 0
    for each in dead:
        if chunk and size + len(each.entry.event) > PACK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(each)
        size += len(each.entry.event)
    if chunk:
        yield chunk


def _times_of_applied(events: Sequence[Event], others: Sequence[Answer]) -> Iterator[datetime]:
    """The times of the events that were applied; one that came twice is once among `others`."""
    not_applied = Counter(answer["id"] for answer in others)
    for event in events:
        event_id = str(event.id)
        if not_applied[event_id]:
            not_applied[event_id] -= 1
        else:
            yield event.time


def _log_and_count(answers: Sequence[Answer], *, applied: int = 0) -> Counter[str]:
    """How many events had which outcome (see worker.outcomes); log those that are dead."""
    outcomes: Counter[str] = Counter(applied=applied) if applied else Counter()
    for answer in answers:
        if answer["outcome"] == "rejected":
            log.warning("event.dead_lettered", event_id=answer["id"], reason=answer["reason"], detail=answer["detail"])
            outcomes["again" if answer.get("again") else str(answer["reason"])] += 1
        else:
            outcomes[answer["outcome"]] += 1
    metrics.count_outcomes(outcomes)
    return outcomes
