"""What must have become of events: the rules of "What applied means" in plain Python, written without the SQL."""

import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal

Event = Mapping[str, Any]
Row = dict[str, Any]


def expected_row(events: Collection[Event]) -> Row | None:
    """The row of one session, of events by one user in any order and with repeats; None where none started it.

    The keys are those of Database.session(); the two times are datetimes, as `comparable` makes them.
    """
    story = sorted({event["id"]: event for event in events}.values(), key=_moment)
    starts, finishes, cancels = (_of(story, kind) for kind in ("started", "finished", "cancelled"))
    if not starts:
        return None
    first, start = starts[0], starts[0]["data"]
    last = finishes[-1] if finishes else None
    return {
        "session_id": first["subject"],
        "user_id": start["user_id"],
        "email": start["email"],
        "resume_filename": start.get("resume_filename"),
        "job_description_filename": start.get("job_description_filename"),
        "created_at": datetime.fromisoformat(first["time"]),
        "questions_answered": _greatest(story, "questions_answered", default=0),
        "duration_minutes": _greatest(story, "duration_minutes", default=0),
        "total_questions": _greatest(story, "total_questions", default=None),
        "interview_status": "completed" if finishes else "cancelled" if cancels else "in_progress",
        "score": last["data"].get("score") if last else None,
        "feedback": last["data"].get("feedback") if last else None,
        "completed_at": datetime.fromisoformat(last["time"]) if last else None,
    }


def comparable(row: Row | None) -> Row | None:
    """A row as Database.session() answers it, its times as datetimes: the database's zone does not matter."""
    if row is None:
        return None
    completed_at = row["completed_at"]
    return row | {
        "created_at": datetime.fromisoformat(row["created_at"]),
        "completed_at": None if completed_at is None else datetime.fromisoformat(completed_at),
    }


def _moment(event: Event) -> tuple[datetime, uuid.UUID]:
    """Sorts by time, tied times by id: the first start names the session, the last finish scores it."""
    return datetime.fromisoformat(event["time"]), uuid.UUID(event["id"])


def _of(story: Iterable[Event], kind: str) -> list[Event]:
    return [event for event in story if event["type"] == f"interview.{kind}"]


def _greatest(story: Iterable[Event], field: str, default: int | None) -> int | None:
    reported = (event["data"].get(field) for event in story)
    return max((number for number in reported if number is not None), default=default)


Outcome = Literal["applied", "duplicate", "waiting", "rejected"]
NAMES: Final = ("email", "resume_filename", "job_description_filename")
STATUSES: Final = ("in_progress", "cancelled", "completed")  # each wins over those before it


@dataclass
class Kept:
    """An event in the ledger; `old` once it has been there for long."""

    event: Event
    applied: bool = False
    old: bool = False


@dataclass
class Letter:
    """A dead letter. Of one event at most one is open or replayed."""

    event: Event
    reason: str
    status: Literal["open", "replayed", "resolved", "discarded"] = "open"
    attempts: int = 1

    @property
    def is_open(self) -> bool:
        return self.status in ("open", "replayed")


@dataclass
class World:
    """What must have become of some sessions, their ledger and dead letters, one event and one call at a time.

    A person's call is told as the event that it stands for, at the time of the call; it is in no ledger. A pack is
    told event by event: how events are packed must not matter.
    """

    users: set[str] = field(default_factory=set)
    stories: dict[str, list[Event]] = field(default_factory=dict)  # of sessions with a row: what the row tells
    ledger: dict[str, Kept] = field(default_factory=dict)
    letters: list[Letter] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)  # ids of events erased with their user, or purged

    def row(self, session_id: str) -> Row | None:
        return expected_row(self.stories.get(session_id, []))

    def ledger_of(self, session_id: str) -> list[Kept]:
        return [kept for kept in self.ledger.values() if kept.event["subject"] == session_id]

    def founded(self, session_id: str) -> bool:
        """Whether the ledger holds a start of the session."""
        return bool(_of((kept.event for kept in self.ledger_of(session_id)), "started"))

    def apply(self, event: Event) -> Outcome:
        """Deliver an event, for the first time or again."""
        known = event["id"] in self.ledger
        reason = None if known else self._refusal(event)
        if reason:
            self._bury(event, reason)
            return "rejected"
        self.ledger.setdefault(event["id"], Kept(event))
        self.gone.discard(event["id"])
        session_id = event["subject"]
        if session_id in self.stories or (not known and event["type"] == "interview.started"):
            self._bring_in(session_id)
        if self.ledger[event["id"]].applied:
            self._resolve(event)
        return "duplicate" if known else "applied" if self.ledger[event["id"]].applied else "waiting"

    def call(self, act: Event) -> Literal["done", "missing", "conflict", "unknown user"]:
        """A person starts, reports, completes or cancels a session, by an RPC."""
        session_id, data = act["subject"], act["data"]
        row = self.row(session_id)
        if act["type"] == "interview.started":
            if row is None and data["user_id"] not in self.users:
                return "unknown user"
            if row is not None and row["user_id"] != data["user_id"]:
                return "conflict"
        elif row is None:
            return "missing"
        self.stories.setdefault(session_id, []).append(act)
        return "done"

    def expire(self) -> int:
        """Old events that wait are dead, but where the session has a row by now; answers how many died."""
        late = [kept for kept in self.ledger.values() if kept.old and not kept.applied]
        orphans = [kept.event for kept in late if kept.event["subject"] not in self.stories]
        for session_id in {kept.event["subject"] for kept in late} & set(self.stories):
            self._bring_in(session_id)
        for event in orphans:
            del self.ledger[event["id"]]
            self._bury(event, "orphaned")
        return len(orphans)

    def purgeable(self) -> list[str]:
        """Sessions that ended, whose ledger is old and holds nothing that waits."""
        return [
            session_id
            for session_id in self.stories
            if (row := self.row(session_id)) is not None
            and row["interview_status"] != "in_progress"
            and (ledger := self.ledger_of(session_id))
            and all(kept.old and kept.applied for kept in ledger)
        ]

    def purge(self) -> int:
        """The rows stay, their ledger goes; answers how many events went."""
        return sum(self._forget(session_id) for session_id in self.purgeable())

    def rebuild(self, session_id: str) -> bool:
        """The row tells what its ledger says and no more, where the ledger holds the start."""
        if not self.founded(session_id):
            return False
        self.stories[session_id] = [kept.event for kept in self.ledger_of(session_id)]
        return True

    def delete_user(self, user_id: str) -> None:
        """The sessions go, each with its ledger; dead letters stay."""
        self.users.discard(user_id)
        for session_id in list(self.stories):
            if (row := self.row(session_id)) is not None and row["user_id"] == user_id:
                del self.stories[session_id]
                self._forget(session_id)

    def audit(self, session_id: str, row: Row | None = None) -> dict[str, list[str]]:
        """What an audit finds in the row, or in one that was edited: kind to columns, in alphabetical order."""
        row = row or self.row(session_id)
        if row is None:
            return {}
        ledger = self.ledger_of(session_id)
        found: dict[str, list[str]] = {} if all(kept.applied for kept in ledger) else {"waiting": []}
        told = expected_row([kept.event for kept in ledger])
        if told is None:
            return found | {"unfounded": []}
        for column in sorted(row):
            says_more = _says_more(column, row, told)
            if says_more is not None:
                found.setdefault("ahead" if says_more else "behind", []).append(column)
        return found

    def _refusal(self, event: Event) -> str | None:
        data = event["data"]
        if not 0 <= (data.get("score") or 0) <= 100 or (data.get("questions_answered") or 0) < 0:
            return "rejected"
        if event["type"] != "interview.started":
            return None
        row = self.row(event["subject"])
        if row is not None:
            return None if row["user_id"] == data["user_id"] else "session_conflict"
        return None if data["user_id"] in self.users else "unknown_user"

    def _bring_in(self, session_id: str) -> None:
        for kept in self.ledger_of(session_id):
            if not kept.applied:
                kept.applied = True
                self.stories.setdefault(session_id, []).append(kept.event)
                self._resolve(kept.event)

    def _bury(self, event: Event, reason: str) -> None:
        for letter in self._open_letters(event):
            letter.reason, letter.status, letter.attempts = reason, "open", letter.attempts + 1
            return
        self.letters.append(Letter(event, reason))

    def _resolve(self, event: Event) -> None:
        for letter in self._open_letters(event):
            letter.status = "resolved"

    def _open_letters(self, event: Event) -> list[Letter]:
        return [letter for letter in self.letters if letter.is_open and letter.event["id"] == event["id"]]

    def _forget(self, session_id: str) -> int:
        ids = [kept.event["id"] for kept in self.ledger_of(session_id)]
        for event_id in ids:
            del self.ledger[event_id]
        self.gone.update(ids)
        return len(ids)


def _says_more(column: str, row: Row, told: Row) -> bool | None:
    """Whether the row says more in this column than its ledger told, or less; None where they agree.

    Names belong to the start and scores to the finish: where those are others, so may these be.
    """
    owner = {"score": "completed_at", "feedback": "completed_at"} | dict.fromkeys(NAMES, "created_at")
    mine, theirs = row[column], told[column]
    if mine == theirs or (column in owner and row[owner[column]] != told[owner[column]]):
        return None
    if column == "interview_status":
        return STATUSES.index(mine) > STATUSES.index(theirs)
    if column == "created_at":
        return bool(mine < theirs)
    if column in owner or mine is None:
        return False
    return theirs is None or bool(mine > theirs)
