"""The database as tests see it: events in, rows out, no worker in between."""

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg

Row = dict[str, Any]


def event(
    kind: str,
    session_id: str,
    *,
    time: str = "2026-11-23T10:15:00Z",
    event_id: uuid.UUID | None = None,
    **data: Any,
) -> dict[str, Any]:
    """An event as it travels, `kind` being what follows "interview." in its type."""
    return {
        "specversion": "1.0",
        "id": str(event_id or uuid.uuid4()),
        "source": "tests",
        "type": f"interview.{kind}",
        "subject": session_id,
        "time": time,
        "data": data,
    }


@dataclass
class Database:
    """One connection in autocommit mode; each call is a transaction of its own."""

    connection: psycopg.Connection[Row]

    def all(self, query: LiteralString, *parameters: object) -> list[Row]:
        return self.connection.execute(query, parameters).fetchall()

    def one(self, query: LiteralString, *parameters: object) -> Row:
        (row,) = self.all(query, *parameters)
        return row

    def create_user(self, user_id: uuid.UUID | None = None) -> uuid.UUID:
        wanted = user_id or uuid.uuid4()
        self.connection.execute("insert into auth.users (id, email) values (%s, %s)", (wanted, f"{wanted}@example.com"))
        return wanted

    def apply(self, *events: Mapping[str, Any]) -> list[str]:
        """Apply one pack; answer the outcomes in order."""
        answers = self.one("select public.apply_interview_events(%s) as a", json.dumps(events))["a"]
        assert [answer["id"] for answer in answers] == [event.get("id") for event in events]
        return [answer["outcome"] for answer in answers]

    def record_dead(self, **letter: Any) -> None:
        """Record an event as a dead letter, as a worker does."""
        self.one("select public.record_dead_interview_events(%s)", json.dumps([letter]))

    def session(self, session_id: str) -> Row | None:
        """The session's row without its surrogate key, None where there is none."""
        rows = self.all(
            "select to_jsonb(s) - 'id' as s from public.interview_sessions s where session_id = %s", session_id
        )
        return rows[0]["s"] if rows else None

    def ledger(self, session_id: str) -> list[Row]:
        return self.all("select * from public.interview_events where session_id = %s", session_id)

    def dead_letters(self, session_id: str) -> list[Row]:
        return self.all("select * from public.interview_dead_letters where session_id = %s order by id", session_id)
