"""What a session's row must be: the rules of "What applied means" in plain Python, written without the SQL."""

import uuid
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime
from typing import Any

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
