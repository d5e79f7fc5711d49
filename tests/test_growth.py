"""As the tables grow, applying and auditing still go by index: no table is read from end to end."""

import random
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.rows import dict_row

from tests.bench.growth import grow
from tests.database import Database, event
from tests.stories import crowd
from worker.embedded import Stack

LEDGER_ROWS = 200_000
SESSIONS = 100_000  # so many that the planner would regret to read them all
TABLES = ["interview_sessions", "interview_events", "interview_dead_letters"]


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """A database of its own, so that other tests need not live beside the crowd."""
    folder = Path(tmp_path_factory.mktemp("grown")) / "stack"
    with (
        Stack(folder, temporary=True) as stack,
        psycopg.connect(stack.database_url, autocommit=True, row_factory=dict_row) as connection,
    ):
        database = Database(connection)
        grow(database, ledger_rows=LEDGER_ROWS, events_per_session=LEDGER_ROWS // SESSIONS)
        connection.execute("""
            insert into public.interview_dead_letters (event, event_id, session_id, type, reason, detail)
            select 'grown-' || n, gen_random_uuid(), 'grown-' || n, 'interview.answered', 'rejected', ''
              from generate_series(1, 20000) n
        """)
        connection.execute("vacuum analyze public.interview_dead_letters")
        yield database


def scans(database: Database) -> dict[str, tuple[int, int]]:
    """How often each table was read from end to end, and by an index."""
    database.connection.execute("select pg_stat_force_next_flush()")
    rows = database.all("select relname, seq_scan, idx_scan from pg_stat_user_tables where relname = any (%s)", TABLES)
    return {row["relname"]: (row["seq_scan"], row["idx_scan"]) for row in rows}


def packs(database: Database) -> list[list[dict[str, object]]]:
    """New interviews, late events of old ones, early events, repeats, and some that are rejected."""
    rng = random.Random(1)
    fresh = crowd(database.create_user(), rng, events=1000)
    late = [event("answered", f"grown-{n}", questions_answered=9) for n in rng.sample(range(1, SESSIONS), 200)]
    early = [event("answered", f"early-{n}", questions_answered=1) for n in range(100)]
    bad = [event("answered", f"grown-{n}", questions_answered=-1) for n in range(1, 5)]
    shuffled = [*fresh, *fresh[:100], *late, *early, *bad]
    rng.shuffle(shuffled)
    return [shuffled[start : start + 200] for start in range(0, len(shuffled), 200)]


def test_applying_reads_no_table_from_end_to_end(grown: Database) -> None:
    prepared = packs(grown)
    before = scans(grown)
    for pack in prepared:
        grown.apply(*pack)
    after = scans(grown)
    assert {table: after[table][0] - before[table][0] for table in TABLES} == dict.fromkeys(TABLES, 0)
    assert all(after[table][1] > before[table][1] for table in TABLES)


def test_an_audit_of_a_page_reads_no_table_from_end_to_end(grown: Database) -> None:
    before = scans(grown)
    page = grown.one("select public.verify_interview_sessions('', 500) as v")["v"]
    after = scans(grown)
    assert page["checked"] == 500
    assert {table: after[table][0] - before[table][0] for table in TABLES} == dict.fromkeys(TABLES, 0)


@pytest.mark.parametrize(
    "call",
    [
        "select public.expire_waiting_interview_events('30 days')",
        "select count(*) from public.get_interview_timeline('grown-7')",
        "select public.update_interview_progress('grown-7', 9, 9)",
        "select count(*) from public.get_user_interview_history('00000000-0000-0000-0000-000000000000')",
    ],
)
def test_a_small_call_reads_no_table_from_end_to_end(grown: Database, call: str) -> None:
    before = scans(grown)
    grown.all(call)
    after = scans(grown)
    assert {table: after[table][0] - before[table][0] for table in TABLES} == dict.fromkeys(TABLES, 0)
