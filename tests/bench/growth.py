"""A database that has lived: sessions and their ledgers by the million, generated in SQL."""

import random
import statistics
import time
from typing import Final

from tests.database import Database
from tests.stories import crowd

CHUNK_SESSIONS: Final = 50_000  # in one transaction
PACK: Final = 200

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


def pack_milliseconds(database: Database, *, packs: int = 50) -> float:
    """The median time to apply a pack of new interviews, 200 events in one call."""
    user, rng = database.create_user(), random.Random(1 + time.time_ns())
    times = []
    for _ in range(packs):
        events = crowd(user, rng, events=PACK)
        began = time.perf_counter()
        database.apply(*events)
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)
