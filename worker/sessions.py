"""Sessions and their ledger, for an operator: the timeline of one, the audit of all, the repair of one."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal, TypedDict

from supabase import Client

from worker.database import Database

PAGE: Final = 1000  # sessions compared in one call


class Finding(TypedDict):
    """A row that does not equal its ledger; the kinds are explained at verify_interview_sessions in the SQL."""

    session_id: str
    kind: Literal["behind", "ahead", "waiting", "unfounded"]
    columns: list[str]


def changes(events: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, tuple[Any, Any]]]:
    """What each event of one session's timeline changed in its row: before and after, by column.

    The rules of the seed's RPCs, folded in the order of the events' own time, in which each rule is at its plainest.
    """
    row: dict[str, Any] = {}
    for event in events:
        now = row | _said(event, row)
        yield {name: (row.get(name), value) for name, value in now.items() if value != row.get(name)}
        row = now


def _said(event: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    data, kind = event["payload"], event["type"].removeprefix("interview.")
    said = {
        name: max(data[name], row.get(name) or 0)
        for name in ("questions_answered", "duration_minutes", "total_questions")
        if data.get(name) is not None
    }
    match kind:
        case "started" if "user_id" not in row:  # an earlier start stands
            names = ("user_id", "email", "resume_filename", "job_description_filename")
            said |= {name: data[name] for name in names if data.get(name) is not None}
            said |= {"interview_status": row.get("interview_status", "in_progress"), "created_at": event["occurred_at"]}
        case "finished":  # a later one replaces all of an earlier one
            said |= {"interview_status": "completed", "completed_at": event["occurred_at"]}
            said |= {"score": data.get("score"), "feedback": data.get("feedback")}
        case "cancelled" if row.get("interview_status") != "completed":
            said |= {"interview_status": "cancelled"}
    return said


class Sessions:
    """The operator's view of interview_sessions and interview_events. Raises what worker.database raises."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def count(self) -> int:
        """How many sessions there are."""
        return self._database.count("interview_sessions")

    def verify(self) -> Iterator[tuple[int, list[Finding]]]:
        """Compare every row with its ledger; yields, page by page, how many were compared and what was found."""
        after: str | None = ""
        while after is not None:
            page = self._database.call(partial(_verify, after)).data
            yield page["checked"], page["found"]
            after = page["last"]

    def get(self, session_id: str) -> dict[str, Any] | None:
        """The session's row, None where there is none."""
        rows: list[dict[str, Any]] = self._database.call(
            lambda client: client.table("interview_sessions").select("*").eq("session_id", session_id).execute()
        ).data
        return rows[0] if rows else None

    def timeline(self, session_id: str) -> list[dict[str, Any]]:
        """The session's events in the order in which they happened."""
        events: list[dict[str, Any]] = self._database.call(
            lambda client: client.rpc("get_interview_timeline", {"p_session_id": session_id}).execute()
        ).data
        return events

    def rebuild(self, session_id: str, *, force: bool) -> dict[str, Any]:
        """Restore the row from its ledger, which must hold its start; answer it.

        Raises RefusedCall, and changes nothing, where the row says more than the ledger, unless forced.
        """
        row: dict[str, Any] = self._database.call(
            lambda client: client.rpc(
                "rebuild_interview_session", {"p_session_id": session_id, "p_force": force}
            ).execute()
        ).data
        return row


def _verify(after: str, client: Client) -> Any:
    return client.rpc("verify_interview_sessions", {"p_after": after, "p_limit": PAGE}).execute()
