"""What operators do with dead letters: find, group, replay, edit, discard, restore; each action is a row of the audit.

The command line calls this, and so can a page. Each call raises what worker.database raises; what publishes raises
redis.RedisError, too.
"""

import time
import uuid
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from events import InvalidEvent, parse_event
from worker.database import DEADLOCK_RETRIES, Answer, Database, Deadlocked
from worker.dead_letters import original_bytes
from worker.errors import WorkerError
from worker.stream import EventStream

Status = Literal["open", "replayed", "resolved", "discarded"]
Letter = dict[str, Any]  # a row of interview_dead_letters

TABLE: Final = "interview_dead_letters"
BATCH: Final = 500  # letters moved in one transaction
PAGE: Final = 100  # letters read whole in one answer: their ids travel in the URL
LADDER: Final = (1, 10, 100)  # letters replayed before more are; then all
POLL_SECONDS: Final = 0.25


@dataclass(frozen=True)
class Filter:
    """Which letters are meant: all fields that are set must fit. Times are ISO 8601, of the last failure."""

    status: Status | None = "open"
    reason: str | None = None
    type: str | None = None
    session_id: str | None = None
    user_id: str | None = None  # anywhere in the event
    since: str | None = None
    until: str | None = None
    text: str | None = None  # in the detail, in either case
    group: str | None = None  # see DeadLetters.groups
    ids: tuple[int, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """What is set; no ids mean no letter."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Action:
    """One row of the audit: who does what to which letters, and why."""

    action: Literal["replay", "discard", "restore", "edit"]
    actor: str
    filter: Filter
    note: str | None = None
    id: uuid.UUID = field(default_factory=uuid.uuid4)

    def to_json(self) -> dict[str, Any]:
        """As the SQL takes it."""
        told = {"id": str(self.id), "actor": self.actor, "action": self.action, "note": self.note}
        return told | {"filter": self.filter.to_json()}


@dataclass(frozen=True)
class Chosen:
    """What a filter means now: ids in ascending order, and when the oldest first failed (ISO 8601)."""

    ids: list[int]
    oldest: str | None


@dataclass
class Replay:
    """How a replay stands: letters published so far, and what became of those that have ended."""

    asked: int
    published: int = 0
    applied: int = 0
    failed: list[int] = field(default_factory=list)  # their ids
    discarded: int = 0  # by somebody else, meanwhile
    unmoved: list[int] = field(default_factory=list)  # ids of those that were not open any more
    stopped: str | None = None  # why it did not go on
    under_way: set[int] = field(default_factory=set)

    @property
    def ended(self) -> int:
        """Letters of which the outcome is known."""
        return self.applied + len(self.failed) + self.discarded

    @property
    def left(self) -> int:
        """Letters that are as they were, because it stopped."""
        return self.asked - self.published - len(self.unmoved)

    def outcomes(self) -> dict[str, int]:
        """For the audit."""
        told = {"applied": self.applied, "failed": len(self.failed), "discarded": self.discarded}
        return {name: count for name, count in (told | {"under_way": len(self.under_way)}).items() if count}


class DeadLetters:
    """The dead letters of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def find(self, wanted: Filter, *, limit: int, before: int | None = None) -> list[Letter]:
        """A page of letters without their events, the latest first; `before` is the last id of the page before."""
        parameters = {"p_filter": wanted.to_json(), "p_limit": limit, "p_before": before}
        letters: list[Letter] = self._rpc("find_interview_dead_letters", parameters)
        return letters

    def groups(self, wanted: Filter, *, limit: int) -> list[dict[str, Any]]:
        """Letters by reason, type and detail (ids and numbers in it aside): the largest group first."""
        parameters = {"p_filter": wanted.to_json(), "p_limit": limit}
        groups: list[dict[str, Any]] = self._rpc("group_interview_dead_letters", parameters)
        return groups

    def counts(self) -> dict[Status, dict[str, int]]:
        """How many letters are "open" and how many "replayed", by reason, the most first."""
        counts = self._rpc("count_interview_dead_letters", {})
        unfinished: tuple[Status, ...] = ("open", "replayed")
        return {status: dict(Counter(counts.get(status, {})).most_common()) for status in unfinished}

    def choose(self, wanted: Filter) -> Chosen:
        """The letters that a filter means."""
        return Chosen(**self._rpc("choose_interview_dead_letters", {"p_filter": wanted.to_json()}))

    def get(self, ids: Sequence[int]) -> list[Letter]:
        """Whole letters by id, in ascending order; unknown ids are missing."""
        return [letter for batch in _batches(sorted(ids), PAGE) for letter in self._select(batch)]

    def events(self, ids: Sequence[int]) -> Iterator[tuple[int, bytes]]:
        """Id and event, as it was received, of each letter; read in pages."""
        for batch in _batches(sorted(ids), PAGE):
            for letter in self._select(batch):
                yield letter["id"], original_bytes(letter["event"])

    def audit(self, *, limit: int) -> list[dict[str, Any]]:
        """The latest actions, the last first."""
        actions: list[dict[str, Any]] = self._database.call(
            lambda client: (
                client.table("interview_dead_letter_actions")
                .select("*")
                .order("began_at", desc=True)
                .limit(limit)
                .execute()
            )
        ).data
        return actions

    def discard(self, action: Action, ids: Sequence[int]) -> list[int]:
        """Close open letters without applying them; answer those that were."""
        return [letter["id"] for batch in _batches(ids) for letter in self._move(action, "discard", batch)]

    def restore(self, action: Action, ids: Sequence[int]) -> list[int]:
        """Open discarded letters again; answer those that were."""
        return [letter["id"] for batch in _batches(ids) for letter in self._move(action, "restore", batch)]

    def edit(self, action: Action, letter_id: int, event: bytes) -> Answer:
        """Apply an event in the stead of a letter, which is closed as replaced; nothing changes where it is rejected.

        Raises WorkerError where it breaks the contract, RefusedCall where the database rejects it.
        """
        try:
            valid = parse_event(event, strict=True)
        except InvalidEvent as invalid:
            raise WorkerError(f"{invalid.reason}: {invalid.detail}") from invalid
        body = valid.model_dump(mode="json", exclude_none=True)
        parameters = {"p_action": action.to_json(), "p_id": letter_id, "p_event": body}
        answer: Answer = self._rpc("replace_interview_dead_letter", parameters)
        return answer

    def replay(
        self,
        action: Action,
        ids: Sequence[int],
        stream: EventStream,
        *,
        rate: float,
        ladder: Sequence[int] = LADDER,
        fail_limit: float = 0.5,
        wait_seconds: float = 60.0,
    ) -> Generator[Replay, None, None]:
        """Publish letters again, `rate` a second, and yield how it stands, several times a second.

        It climbs a ladder: after its first letter, its first eleven and so on it waits for their outcomes, and it
        stops where more than the share `fail_limit` of those that ended failed again. At the end it waits up to
        `wait_seconds` for the last outcomes. Leave it at any yield: what was not published is as before. A letter
        whose publishing a crash cut off says "replayed" and can be replayed once more.
        """
        replay = Replay(asked=len(ids))
        yield replay
        if not ids:
            return
        try:
            for rung in _rungs(list(ids), ladder):
                yield from self._replay_rung(action, rung, stream, replay, rate)
                yield from self._settle(replay, wait_seconds)
                if replay.left:
                    replay.stopped = _why_not_on(replay, fail_limit)
                if replay.stopped:
                    break
        finally:
            self._rpc("note_interview_dead_letter_action", {
                "p_action": action.to_json(), "p_letters": 0, "p_outcomes": replay.outcomes(),
            })  # fmt: skip
        yield replay

    def _replay_rung(
        self, action: Action, ids: Sequence[int], stream: EventStream, replay: Replay, rate: float
    ) -> Iterator[Replay]:
        """Publish the letters of one rung, in small batches that keep the rate."""
        for batch in _batches(ids, max(1, min(BATCH, int(rate * POLL_SECONDS)))):
            began = time.monotonic()
            moved = self._move(action, "replay", batch)
            try:
                stream.add([original_bytes(letter["event"]) for letter in moved])
            except BaseException:  # an interrupt, too: nobody else knows that these are not in the stream
                self._move(action, "reopen", [letter["id"] for letter in moved])
                raise
            replay.published += len(moved)
            replay.under_way |= {letter["id"] for letter in moved}
            replay.unmoved += sorted(set(batch) - {letter["id"] for letter in moved})
            self._look(replay)
            yield replay
            while (ahead := began + len(batch) / rate - time.monotonic()) > 0:
                time.sleep(min(ahead, POLL_SECONDS))
                self._look(replay)
                yield replay

    def _settle(self, replay: Replay, wait_seconds: float) -> Iterator[Replay]:
        """Wait until the outcome of all that was published is known, or the time is up."""
        deadline = time.monotonic() + wait_seconds
        while replay.under_way and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            self._look(replay)
            yield replay

    def _look(self, replay: Replay) -> None:
        """Ask what became of those under way."""
        if not replay.under_way:
            return
        ended = self._rpc("settle_interview_dead_letters", {"p_ids": list(replay.under_way)})
        replay.applied += len(ended.get("resolved", []))
        replay.failed += ended.get("open", [])
        replay.discarded += len(ended.get("discarded", []))
        replay.under_way -= {letter for letters in ended.values() for letter in letters}

    def _move(self, action: Action, move: str, ids: Sequence[int]) -> list[Letter]:
        parameters = {"p_action": action.to_json(), "p_move": move, "p_ids": list(ids)}
        moved: list[Letter] = self._rpc("move_interview_dead_letters", parameters)
        return moved

    def _select(self, ids: Sequence[int]) -> list[Letter]:
        letters: list[Letter] = self._database.call(
            lambda client: client.table(TABLE).select("*").in_("id", list(ids)).order("id").execute()
        ).data
        return letters

    def _rpc(self, name: str, parameters: Mapping[str, Any]) -> Any:
        """Call a function; where workers touch the same letters and Postgres chooses us to give way, once more."""
        for _ in range(DEADLOCK_RETRIES):
            try:
                return self._call(name, parameters)
            except Deadlocked:
                continue
        return self._call(name, parameters)

    def _call(self, name: str, parameters: Mapping[str, Any]) -> Any:
        return self._database.call(lambda client: client.rpc(name, dict(parameters)).execute()).data


def _why_not_on(replay: Replay, fail_limit: float) -> str | None:
    if len(replay.failed) > fail_limit * max(1, replay.ended):
        return f"{len(replay.failed)} of {replay.ended} failed again"
    if replay.under_way:
        return f"still under way: {len(replay.under_way)}, see 'interviews status'"
    return None


def _rungs(ids: Sequence[int], ladder: Sequence[int]) -> Iterator[Sequence[int]]:
    """The ids in parts: as many as each rung of the ladder says, then all others."""
    start = 0
    for size in ladder:
        if start < len(ids):
            yield ids[start : start + size]
        start += size
    if start < len(ids):
        yield ids[start:]


def _batches(ids: Sequence[int], size: int = BATCH) -> Iterator[Sequence[int]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]
