"""The optional scripts: each may be run twice, does what it says, and nothing where its ground is missing."""

import json
import uuid
from collections.abc import Iterator

import psycopg
import pytest

from tests.database import Database, event
from worker.sql_files import sql_folder

SCRIPTS = sorted(path.name for path in (sql_folder() / "optional").glob("*.sql"))


def run(database: Database, name: str) -> None:
    for _ in range(2):
        database.connection.execute((sql_folder() / "optional" / name).read_bytes())


@pytest.fixture
def protected(database: Database) -> Iterator[Database]:
    run(database, "protect_scores.sql")
    yield database
    database.connection.execute("drop function public.refuse_scores_by_candidates() cascade")


@pytest.mark.parametrize("name", ["realtime.sql", "schedule_with_pg_cron.sql"])
def test_a_script_does_nothing_where_its_ground_is_missing(database: Database, name: str) -> None:
    notices: list[str] = []
    database.connection.add_notice_handler(lambda notice: notices.append(str(notice.message_primary)))
    run(database, name)
    assert [notice.endswith("nothing done") for notice in notices] == [True, True]


def test_realtime_publishes_the_sessions_and_nothing_else(database: Database) -> None:
    database.connection.execute("create publication supabase_realtime")
    try:
        run(database, "realtime.sql")
        published = database.all(
            "select schemaname, tablename from pg_publication_tables where pubname = 'supabase_realtime'"
        )
        assert published == [{"schemaname": "public", "tablename": "interview_sessions"}]
    finally:
        database.connection.execute("drop publication supabase_realtime")


def as_candidate(database: Database, user: uuid.UUID, statement: str, *parameters: object) -> None:
    with database.connection.transaction():
        database.connection.execute(
            "select set_config('request.jwt.claims', %s, true)", (json.dumps({"sub": str(user)}),)
        )
        database.connection.execute("set local role authenticated")
        database.connection.execute(statement, parameters)


@pytest.mark.parametrize(
    "statement",
    [
        "select public.complete_interview(%s, 100)",
        "select public.complete_interview(%s, null, '{\"a\": 1}')",
        "select public.complete_interview(%s)",
        "update public.interview_sessions set interview_status = 'completed' where session_id = %s",
        "update public.interview_sessions set score = 100 where session_id = %s",
        "update public.interview_sessions set feedback = '{\"a\": 1}' where session_id = %s",
        "insert into public.interview_sessions (user_id, email, session_id, score)"
        " select auth.uid(), 'a@example.com', 'new-' || %s, 100",
    ],
)
def test_a_candidate_may_not_complete_or_score_an_own_interview(
    protected: Database, user: uuid.UUID, statement: str
) -> None:
    session_id = f"session-{uuid.uuid4()}"
    protected.apply(event("started", session_id, user_id=str(user), email="a@example.com"))
    before = protected.session(session_id)
    with pytest.raises(psycopg.Error) as refused:
        as_candidate(protected, user, statement, session_id)
    assert refused.value.sqlstate == "PT403"
    assert protected.session(session_id) == before


def test_a_candidate_may_still_answer_and_cancel_and_the_service_scores(protected: Database, user: uuid.UUID) -> None:
    session_id = f"session-{uuid.uuid4()}"
    protected.apply(event("started", session_id, user_id=str(user), email="a@example.com"))
    as_candidate(protected, user, "select public.update_interview_progress(%s, 3, 4)", session_id)
    as_candidate(protected, user, "select public.cancel_interview(%s)", session_id)
    protected.apply(event("finished", session_id, score=77))
    row = protected.session(session_id)
    assert row is not None
    assert (row["interview_status"], row["questions_answered"], row["score"]) == ("completed", 3, 77)


def test_the_optional_scripts_are_these() -> None:
    assert SCRIPTS == ["protect_scores.sql", "realtime.sql", "schedule_with_pg_cron.sql"]
