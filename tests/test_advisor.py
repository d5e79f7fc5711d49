"""The rules of Supabase's advisor (splinter's lints 0001 to 0029), asserted of our schema from the catalogue.

Each rule is restated here for schema public alone, where it is simpler strictly: a table without row level security
counts even where nobody may read it.
"""

from collections.abc import Iterator
from typing import LiteralString

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row

from tests.database import Database, event
from tests.test_security import REGIMES, fresh_database
from worker.embedded import Stack

# Not for schema public, or not to be read from the catalogue of a fresh database.
NOT_OURS = {
    "0012": "anonymous sign-ins: a setting of Supabase Auth; splinter has no SQL for it",
    "0019": "queues of pgmq: we have none",
    "0020": "bloat: of a table in use; autovacuum and the fillfactor see to it",
    "0025": "public buckets: we have no storage",
}

RULES: dict[str, LiteralString] = {
    "0001 foreign key without an index": """
        select f.conname as finding
          from pg_constraint f
         where f.contype = 'f'
           and f.connamespace = 'public'::regnamespace
           and not exists (
                 select from pg_index i
                  where i.indrelid = f.conrelid and i.indisvalid and i.indpred is null
                    and (i.indkey::smallint[])[0:cardinality(f.conkey) - 1] = f.conkey)""",
    "0002 auth.users exposed": """
        select distinct v.relname as finding
          from pg_class v
          join pg_rewrite r on r.ev_class = v.oid
          join pg_depend d on d.classid = 'pg_rewrite'::regclass and d.objid = r.oid
         where v.relnamespace = 'public'::regnamespace
           and d.refclassid = 'pg_class'::regclass
           and d.refobjid = 'auth.users'::regclass""",
    "0003 policy evaluated for each row": """
        select p.policyname as finding
          from pg_policies p, concat_ws(' ', p.qual, p.with_check) as expression
         where p.schemaname = 'public'
           and regexp_replace(expression, 'select (auth\\.\\w+\\(\\)|current_setting\\()', '', 'gi')
               ~* 'auth\\.\\w+\\(|current_setting\\('""",
    "0004 no primary key": """
        select t.relname as finding
          from pg_class t
         where t.relnamespace = 'public'::regnamespace
           and t.relkind in ('r', 'p')
           and not exists (select from pg_index i where i.indrelid = t.oid and i.indisprimary)""",
    "0005 unused index": """
        select s.indexrelname as finding
          from pg_stat_user_indexes s
          join pg_index i using (indexrelid)
         where s.schemaname = 'public' and s.idx_scan = 0 and not i.indisunique""",
    "0006 several permissive policies": """
        select concat_ws(' ', p.tablename, role, command) as finding
          from pg_policies p,
               unnest(array['anon', 'authenticated']::name[]) as role,
               unnest(case p.cmd when 'ALL' then '{SELECT,INSERT,UPDATE,DELETE}' else array[p.cmd] end) as command
         where p.schemaname = 'public' and p.permissive = 'PERMISSIVE' and p.roles && array['public', role]
         group by p.tablename, role, command
        having count(*) > 1""",
    "0007 policy, but row level security is off": """
        select distinct t.relname as finding
          from pg_class t
          join pg_policy p on p.polrelid = t.oid
         where t.relnamespace = 'public'::regnamespace and not t.relrowsecurity""",
    "0008 row level security, but no policy": """
        select t.relname as finding
          from pg_class t
         where t.relnamespace = 'public'::regnamespace
           and t.relrowsecurity
           and not exists (select from pg_policy p where p.polrelid = t.oid)""",
    "0009 duplicate index": """
        select string_agg(i.indexname, ', ' order by i.indexname) as finding
          from pg_indexes i
         where i.schemaname = 'public'
         group by i.tablename, regexp_replace(i.indexdef, '^create (unique )?index \\S+', '', 'i')
        having count(*) > 1""",
    "0010 view with its creator's rights": """
        select v.relname as finding
          from pg_class v
         where v.relnamespace = 'public'::regnamespace
           and v.relkind = 'v'
           and not exists (
                 select from pg_options_to_table(v.reloptions) o
                  where o.option_name = 'security_invoker' and o.option_value::boolean)""",
    "0011 function without a search_path": """
        select f.proname as finding
          from pg_proc f
         where f.pronamespace = 'public'::regnamespace
           and not 'search_path=""' = any (coalesce(f.proconfig, '{}'))""",
    "0013 row level security is off": """
        select t.relname as finding
          from pg_class t
         where t.relnamespace = 'public'::regnamespace and t.relkind in ('r', 'p') and not t.relrowsecurity""",
    "0014 extension in public": """
        select e.extname as finding from pg_extension e where e.extnamespace = 'public'::regnamespace""",
    "0015 policy trusts user_metadata": """
        select p.policyname as finding
          from pg_policies p
         where p.schemaname = 'public' and concat_ws(' ', p.qual, p.with_check) ~ 'user_metadata'""",
    "0016 materialized view in the API": """
        select c.relname as finding from pg_class c
         where c.relnamespace = 'public'::regnamespace and c.relkind = 'm'""",
    "0017 foreign table in the API": """
        select c.relname as finding from pg_class c
         where c.relnamespace = 'public'::regnamespace and c.relkind = 'f'""",
    "0018 column that pg_upgrade refuses": """
        select concat_ws('.', t.relname, a.attname) as finding
          from pg_attribute a
          join pg_class t on t.oid = a.attrelid
         where t.relnamespace = 'public'::regnamespace
           and a.atttypid in ('regcollation'::regtype, 'regconfig'::regtype, 'regdictionary'::regtype,
                              'regnamespace'::regtype, 'regoper'::regtype, 'regoperator'::regtype,
                              'regproc'::regtype, 'regprocedure'::regtype)""",
    "0021 foreign key to a unique column of auth": """
        select f.conname as finding
          from pg_constraint f
          join pg_class t on t.oid = f.confrelid
          join pg_index i on i.indexrelid = f.conindid
         where f.contype = 'f'
           and f.connamespace = 'public'::regnamespace
           and t.relnamespace = 'auth'::regnamespace
           and not i.indisprimary""",
    "0022 outdated extension": """
        select e.name as finding from pg_available_extensions e where e.installed_version <> e.default_version""",
    "0023 sensitive column without row level security": """
        select concat_ws('.', t.relname, a.attname) as finding
          from pg_class t
          join pg_attribute a on a.attrelid = t.oid
         where t.relnamespace = 'public'::regnamespace
           and t.relkind in ('r', 'p')
           and not t.relrowsecurity
           and a.attname ~ '(^|_)(session_id|token|secret|password|otp|jwt)($|_)'""",
    "0024 policy that is always true": """
        select p.policyname as finding
          from pg_policies p
         where p.schemaname = 'public'
           and p.permissive = 'PERMISSIVE'
           and p.cmd <> 'SELECT'
           and p.roles && '{public,anon,authenticated}'
           and (p.qual ~* '^[( ]*(true|1 = 1)[ )]*$'
                or p.with_check ~* '^[( ]*(true|1 = 1)[ )]*$'
                or p.qual is null and p.with_check is null)""",
    "0026 anon sees it in GraphQL": """
        select c.relname as finding
          from pg_class c
         where c.relnamespace = 'public'::regnamespace
           and c.relkind in ('r', 'p', 'v', 'm', 'f')
           and has_any_column_privilege('anon', c.oid, 'select')""",
    "0027 signed-in users see it in GraphQL": """
        select c.relname as finding
          from pg_class c
         where c.relnamespace = 'public'::regnamespace
           and c.relkind in ('r', 'p', 'v', 'm', 'f')
           and has_any_column_privilege('authenticated', c.oid, 'select')""",
    "0028 anon may run a security definer function": """
        select f.proname as finding
          from pg_proc f
         where f.pronamespace = 'public'::regnamespace
           and f.prosecdef and has_function_privilege('anon', f.oid, 'execute')""",
    "0029 signed-in users may run a security definer function": """
        select f.proname as finding
          from pg_proc f
         where f.pronamespace = 'public'::regnamespace
           and f.prosecdef and has_function_privilege('authenticated', f.oid, 'execute')""",
}

# What the advisor says of our schema as it is, and why we live with it.
ACCEPTED: dict[str, set[str]] = {
    # That users read their sessions and figures is what these are for; the advisor speaks only where pg_graphql is on.
    "0027 signed-in users see it in GraphQL": {
        "interview_sessions",
        "interview_user_statistics",
        "interview_completion_rate",
        "interview_score_by_status",
        "interview_daily_activity",
    },
}

# For each rule, what breaks it, and what it then finds.
VIOLATIONS: dict[str, tuple[LiteralString, str]] = {
    "0001 foreign key without an index": (
        "alter table public.interview_dead_letters add constraint naive_fkey"
        " foreign key (replaced_by) references public.interview_events (event_id)",
        "naive_fkey",
    ),
    "0002 auth.users exposed": ("create view public.naive as select email from auth.users", "naive"),
    "0003 policy evaluated for each row": (
        "create policy naive on public.interview_events for select to authenticated"
        " using (session_id = auth.uid()::text or (select auth.uid()) is null)",
        "naive",
    ),
    "0004 no primary key": ("create table public.naive (id integer unique)", "naive"),
    "0005 unused index": ("create index naive on public.interview_sessions (email)", "naive"),
    "0006 several permissive policies": (
        "create policy naive on public.interview_sessions for all to authenticated using (user_id = id)",
        "interview_sessions authenticated UPDATE",
    ),
    "0007 policy, but row level security is off": (
        "alter table public.interview_sessions disable row level security",
        "interview_sessions",
    ),
    "0008 row level security, but no policy": (
        "create table public.naive (); alter table public.naive enable row level security",
        "naive",
    ),
    "0009 duplicate index": (
        "create index naive on public.interview_sessions (session_id)",
        "interview_sessions_session_id_key, naive",
    ),
    "0010 view with its creator's rights": (
        "alter view public.interview_user_statistics set (security_invoker = off)",
        "interview_user_statistics",
    ),
    "0011 function without a search_path": (
        "alter function public.cancel_interview(text, text) reset search_path",
        "cancel_interview",
    ),
    "0013 row level security is off": ("create table public.naive (id integer primary key)", "naive"),
    "0014 extension in public": (
        "set local allow_system_table_mods = on;"
        " update pg_extension set extnamespace = 'public'::regnamespace where extname = 'plpgsql'",
        "plpgsql",
    ),
    "0015 policy trusts user_metadata": (
        "create policy naive on public.interview_events for select to authenticated"
        " using (current_setting('request.jwt.claims')::jsonb -> 'user_metadata' ->> 'admin' = 'yes')",
        "naive",
    ),
    "0016 materialized view in the API": ("create materialized view public.naive as select 1", "naive"),
    "0017 foreign table in the API": (
        "create foreign data wrapper naive; create server naive foreign data wrapper naive;"
        " create foreign table public.naive () server naive",
        "naive",
    ),
    "0018 column that pg_upgrade refuses": ("create table public.naive (f regproc)", "naive.f"),
    "0021 foreign key to a unique column of auth": (
        "alter table auth.users add constraint users_email_key unique (email);"
        " alter table public.interview_sessions add constraint naive foreign key (email) references auth.users (email)",
        "naive",
    ),
    "0022 outdated extension": (
        "set local allow_system_table_mods = on; update pg_extension set extversion = '0' where extname = 'plpgsql'",
        "plpgsql",
    ),
    "0023 sensitive column without row level security": (
        "alter table public.interview_events disable row level security",
        "interview_events.session_id",
    ),
    "0024 policy that is always true": (
        "create policy naive on public.interview_events for insert to authenticated with check (true)",
        "naive",
    ),
    "0026 anon sees it in GraphQL": (
        "grant select (day) on public.interview_daily_activity to anon",
        "interview_daily_activity",
    ),
    "0027 signed-in users see it in GraphQL": (
        "grant select on public.interview_dead_letters to authenticated",
        "interview_dead_letters",
    ),
    "0028 anon may run a security definer function": (
        "grant execute on function public.delete_interview_events_of_deleted_sessions() to public",
        "delete_interview_events_of_deleted_sessions",
    ),
    "0029 signed-in users may run a security definer function": (
        "alter function public.cancel_interview(text, text) security definer",
        "cancel_interview",
    ),
}


@pytest.fixture(scope="module", params=REGIMES)
def fresh(request: pytest.FixtureRequest, stack: Stack) -> Iterator[Database]:
    """A database with nothing but our SQL."""
    with fresh_database(stack, request.param) as name, connected(stack, name) as connection:
        yield Database(connection)


def connected(stack: Stack, name: str) -> psycopg.Connection[dict[str, object]]:
    return psycopg.connect(make_conninfo(stack.database_url, dbname=name), autocommit=True, row_factory=dict_row)


def findings(database: Database, rule: str) -> set[str]:
    found = database.all(RULES[rule])
    return {row["finding"] for row in found}


def test_every_lint_of_the_advisor_is_asserted_or_has_its_reason() -> None:
    assert sorted({rule[:4] for rule in RULES} | set(NOT_OURS)) == [f"{n:04}" for n in range(1, 30)]
    assert set(VIOLATIONS) == set(RULES)


@pytest.mark.parametrize("rule", [rule for rule in RULES if not rule.startswith("0005")])
def test_the_advisor_finds_nothing_that_we_did_not_accept(fresh: Database, rule: str) -> None:
    assert findings(fresh, rule) == ACCEPTED.get(rule, set())


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_finds_its_violation(fresh: Database, rule: str) -> None:
    violation, finding = VIOLATIONS[rule]
    assert finding not in findings(fresh, rule)

    with fresh.connection.transaction(force_rollback=True):
        fresh.connection.execute(violation)
        assert finding in findings(fresh, rule)


# ------------------------------------------------------------------------------------------------------ unused indexes

TABLES_IN_USE: LiteralString = """
insert into auth.users (id) select gen_random_uuid() from generate_series(1, 1000);
insert into public.interview_sessions (user_id, email, session_id, interview_status, created_at)
select id, 'a@example.com', 'session-' || n || '-' || id, 'completed', now() - n * interval '1 day'
  from auth.users, generate_series(1, 5) n;
insert into public.interview_events (event_id, session_id, type, occurred_at, payload, received_at, applied_at)
select gen_random_uuid(), s.session_id, 'interview.answered', s.created_at, '{"questions_answered": 1}', s.created_at,
       s.created_at
  from public.interview_sessions s, generate_series(1, 20)
 order by s.created_at;
insert into public.interview_dead_letters (event, event_id, reason, detail)
select 'event ' || n, gen_random_uuid(), 'rejected', '' from generate_series(1, 5000) n;
"""


def test_every_index_is_used_once_the_tables_have_grown(stack: Stack) -> None:
    """Rule 0005: what nobody reads is paid for at each write."""
    with fresh_database(stack, "nothing granted by default") as name, connected(stack, name) as connection:
        database = Database(connection)
        connection.execute(TABLES_IN_USE)
        connection.execute("vacuum analyze")
        connection.execute("select pg_stat_reset()")

        work(database)

        database.all("select pg_stat_force_next_flush()")
        assert findings(database, "0005 unused index") == set()


def work(database: Database) -> None:
    """What workers, operators and front ends do, once."""
    user = database.all("select id from auth.users limit 1")[0]["id"]
    database.all("select * from public.get_user_interview_history(%s)", user)
    assert database.apply(event("answered", "new", questions_answered=1)) == ["waiting"]
    start = event("started", "new", user_id=str(user), email="a@example.com")
    assert database.apply(start) == ["applied"]
    database.all("select * from public.get_interview_timeline('new')")
    database.all("select public.expire_waiting_interview_events('1 day')")
    database.all("select public.purge_interview_events('4 days 12 hours')")
