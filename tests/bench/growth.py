"""What grows: ledgers by the million, generated in SQL; sessions that a pack touches; feedback."""

import random
import statistics
import string
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from events.contract import new_event_id
from tests.database import Database, event
from tests.stories import crowd

CHUNK_SESSIONS: Final = 50_000  # in one transaction
PACK: Final = 500

_GENERATE: Final = """
    with people as (
      insert into auth.users (email) values ('grown@example.com') returning id
    ), sessions as (
      insert into public.interview_sessions
        (user_id, email, session_id, interview_status, questions_answered, score, created_at, completed_at)
      select people.id, 'grown@example.com', 'grown-' || n, 'completed', 8, n %% 101,
             now() - make_interval(secs => n), now() - make_interval(secs => n)
        from people, generate_series(%(first)s::bigint, %(last)s::bigint) n
      returning session_id, user_id, created_at
    )
    insert into public.interview_events (event_id, session_id, type, occurred_at, payload, received_at, applied_at)
    select gen_random_uuid(), s.session_id, k.type, s.created_at + make_interval(mins => k.n),
           case k.type
             when 'interview.started' then jsonb_build_object('user_id', s.user_id, 'email', 'grown@example.com')
             when 'interview.finished' then '{"score": 80, "feedback": {"overall_score": 80}}'
             else jsonb_build_object('questions_answered', k.n, 'duration_minutes', 3 * k.n)
           end,
           s.created_at, s.created_at
      from sessions s
     cross join (
       select n, case n when 0 then 'interview.started' when %(size)s - 1 then 'interview.finished'
                 else 'interview.answered' end as type
         from generate_series(0, %(size)s - 1) n) k
"""


def grow(database: Database, *, ledger_rows: int, events_per_session: int = 10) -> None:
    """Add completed sessions until the ledger has about this many rows."""
    present = database.one("select count(*) as n from public.interview_events")["n"]
    first = database.one("select count(*) as n from public.interview_sessions")["n"]
    last = first + max(0, ledger_rows - present) // events_per_session
    while first < last:
        until = min(first + CHUNK_SESSIONS, last)
        database.connection.execute(_GENERATE, {"first": first + 1, "last": until, "size": events_per_session})
        first = until
    database.connection.execute("vacuum analyze public.interview_events, public.interview_sessions")


def pack_cost(database: Database, *, ordered_ids: bool, packs: int = 50) -> tuple[float, float]:
    """To apply a pack of new interviews in one call: the median milliseconds, and bytes of WAL per event."""
    user, rng = database.create_user(), random.Random(1 + time.time_ns())
    made = [crowd(user, rng, events=PACK) for _ in range(packs)]
    if ordered_ids:
        made = [[each | {"id": str(new_event_id())} for each in pack] for pack in made]
    database.connection.execute("checkpoint")  # each page that is written for the first time after it costs most
    before = _wal_bytes(database)
    milliseconds = _median_milliseconds(database, made)
    return milliseconds, (_wal_bytes(database) - before) / (PACK * packs)


def _wal_bytes(database: Database) -> int:
    return int(database.one("select pg_current_wal_lsn() - '0/0' as bytes")["bytes"])


def spread_milliseconds(database: Database, *, sessions: int, packs: int = 50) -> float:
    """The median time to apply a pack of answers to so many sessions, that have started."""
    user = str(database.create_user())
    names = [f"spread-{uuid.uuid4()}" for _ in range(sessions)]
    database.apply(*(event("started", name, user_id=user, email="spread@example.com") for name in names))
    return _median_milliseconds(
        database,
        (
            [event("answered", names[n % sessions], questions_answered=pack * PACK + n) for n in range(PACK)]
            for pack in range(packs)
        ),
    )


def results(database: Database, rng: random.Random, *, feedback_kibibytes: int, count: int) -> list[dict[str, Any]]:
    """The finishes of interviews that have started, each with feedback of this size, in words."""
    user = str(database.create_user())
    names = [f"result-{uuid.uuid4()}" for _ in range(count)]
    for start in range(0, count, PACK):
        named = names[start : start + PACK]
        database.apply(*(event("started", name, user_id=user, email="result@example.com") for name in named))
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randrange(2, 10))) for _ in range(2_000)]
    return [
        event(
            "finished", name, score=rng.randrange(101), feedback={"notes": _text(words, rng, feedback_kibibytes << 10)}
        )
        for name in names
    ]


def _text(words: list[str], rng: random.Random, size: int) -> str:
    return " ".join(rng.choices(words, k=size // 2))[:size]


def _median_milliseconds(database: Database, packs: Iterable[Sequence[Mapping[str, Any]]]) -> float:
    times = []
    for events in packs:
        began = time.perf_counter()
        database.apply(*events)
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)
