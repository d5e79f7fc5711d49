"""Who may do what: each role, each object of schema public, each command, by SQL and through PostgREST.

Supabase has granted everything to everyone or nothing to anyone, by the age of the project: all of it is tried in both.
"""

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, LiteralString

import httpx
import jwt
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row

import worker.embedded
from tests.database import Database, event
from worker.embedded import Stack, binaries
from worker.embedded.server import Server, free_port
from worker.sql_files import sql_files

ACTORS = ("owner", "other", "anon", "service_role")

# What each may do with the owner's data. "move" gives the owner's session to the other user; "create", an RPC, starts
# a session for the owner, "claim" starts the owner's session once more, for oneself (service_role: for the other user).
#
#   yes      done                                      404, 409  the RPC's own refusal (SQLSTATE PT404, PT409)
#   nothing  row level security leaves nothing there   never     whoever asks: such a view cannot be written
#   no       refused (SQLSTATE 42501)
ROLE_TABLE = """
                                               owner    other    anon     service_role
interview_sessions
    select                                     yes      nothing  no       yes
    insert                                     yes      no       no       yes
    update                                     yes      nothing  no       yes
    move                                       no       nothing  no       yes
    delete                                     no       no       no       yes
interview_events
    select                                     no       no       no       yes
    insert                                     no       no       no       yes
    update                                     no       no       no       yes
    delete                                     no       no       no       yes
interview_dead_letters
    select                                     no       no       no       yes
    insert                                     no       no       no       yes
    update                                     no       no       no       yes
    delete                                     no       no       no       yes
interview_dead_letter_actions
    select                                     no       no       no       yes
    insert                                     no       no       no       yes
    update                                     no       no       no       yes
    delete                                     no       no       no       no
interview_user_statistics
    select                                     yes      nothing  no       yes
    insert                                     never    never    never    never
    update                                     never    never    never    never
    delete                                     never    never    never    never
interview_completion_rate
    select                                     yes      nothing  no       yes
    insert                                     never    never    never    never
    update                                     never    never    never    never
    delete                                     never    never    never    never
interview_score_by_status
    select                                     yes      nothing  no       yes
    insert                                     never    never    never    never
    update                                     never    never    never    never
    delete                                     never    never    never    never
interview_daily_activity
    select                                     yes      nothing  no       yes
    insert                                     never    never    never    never
    update                                     never    never    never    never
    delete                                     never    never    never    never
create_interview_session
    execute                                    yes      no       no       yes
    claim                                      yes      409      no       409
update_interview_progress
    execute                                    yes      404      no       yes
complete_interview
    execute                                    yes      404      no       yes
cancel_interview
    execute                                    yes      404      no       yes
get_user_interview_history
    execute                                    yes      nothing  no       yes
apply_interview_events
    execute                                    no       no       no       yes
apply_interview_events_summary
    execute                                    no       no       no       yes
apply_interview_event_pack
    execute                                    no       no       no       yes
apply_or_halve_interview_events
    execute                                    no       no       no       yes
lock_interview_sessions
    execute                                    no       no       no       yes
record_dead_interview_events
    execute                                    no       no       no       yes
resolve_dead_interview_events
    execute                                    no       no       no       yes
expire_waiting_interview_events
    execute                                    no       no       no       yes
purge_interview_events
    execute                                    no       no       no       yes
get_interview_timeline
    execute                                    no       no       no       yes
fold_interview_ledger
    execute                                    no       no       no       yes
verify_interview_sessions
    execute                                    no       no       no       yes
rebuild_interview_session
    execute                                    no       no       no       yes
group_of_interview_dead_letter
    execute                                    no       no       no       yes
match_interview_dead_letters
    execute                                    no       no       no       yes
find_interview_dead_letters
    execute                                    no       no       no       yes
choose_interview_dead_letters
    execute                                    no       no       no       yes
group_interview_dead_letters
    execute                                    no       no       no       yes
count_interview_dead_letters
    execute                                    no       no       no       yes
received_interview_event
    execute                                    no       no       no       yes
note_interview_dead_letter_action
    execute                                    no       no       no       yes
move_interview_dead_letters
    execute                                    no       no       no       yes
replace_interview_dead_letter
    execute                                    no       no       no       yes
settle_interview_dead_letters
    execute                                    no       no       no       yes
set_interview_completed_at
    execute                                    no       no       no       no
keep_interview_session_id
    execute                                    no       no       no       no
delete_interview_events_of_deleted_sessions
    execute                                    no       no       no       no
"""

READING_FUNCTIONS = {
    "get_user_interview_history",
    "get_interview_timeline",
    "fold_interview_ledger",
    "verify_interview_sessions",
    "lock_interview_sessions",
    "group_of_interview_dead_letter",
    "match_interview_dead_letters",
    "find_interview_dead_letters",
    "choose_interview_dead_letters",
    "group_interview_dead_letters",
    "count_interview_dead_letters",
    "received_interview_event",
    "settle_interview_dead_letters",
}
TRIGGER_FUNCTIONS = {
    "set_interview_completed_at",
    "keep_interview_session_id",
    "delete_interview_events_of_deleted_sessions",
}
PRIVILEGES = ("select", "insert", "update", "delete", "execute")

Key = tuple[str, str]  # object, command


def parsed(table: str) -> dict[Key, dict[str, str]]:
    """The cells: {(object, command): {actor: word}}."""
    header, *lines = table.strip("\n").splitlines()
    assert tuple(header.split()) == ACTORS
    cells: dict[Key, dict[str, str]] = {}
    name = ""
    for line in lines:
        if line.startswith(" "):
            command, *words = line.split()
            cells[name, command] = dict(zip(ACTORS, words, strict=True))
        else:
            name = line
    return cells


CELLS = parsed(ROLE_TABLE)
EACH_CELL = pytest.mark.parametrize(
    ("key", "actor", "expected"),
    [
        pytest.param(key, actor, word, id=f"{actor}-{'-'.join(key)}")
        for key, words in CELLS.items()
        for actor, word in words.items()
    ],
)

# ------------------------------------------------------------------------------------- the owner's data, and requests

OWNER, OTHER = "0aaaaaaa-0000-4000-8000-000000000000", "0bbbbbbb-0000-4000-8000-000000000000"
LETTER = 777
STARTED, ANSWERED, UNKNOWN = (f"0eeeeeee-0000-4000-8000-{n:012}" for n in range(3))
EARLY, LONG_AGO = "2026-11-23T10:15:00Z", "2020-01-01T00:00:00Z"

# A session in progress whose row is behind its ledger, one that ended long ago, an event that waits, an open letter.
# The other user has nothing.
STORY: LiteralString = f"""
insert into auth.users (id, email) values ('{OWNER}', 'owner@example.com'), ('{OTHER}', 'other@example.com');
insert into public.interview_sessions (user_id, email, session_id, interview_status, score, created_at) values
  ('{OWNER}', 'owner@example.com', 'owned', 'in_progress', 50, '{EARLY}'),
  ('{OWNER}', 'owner@example.com', 'ended', 'cancelled', null, '{EARLY}');
insert into public.interview_events (event_id, session_id, type, occurred_at, payload, received_at, applied_at) values
  ('{STARTED}', 'owned', 'interview.started', '{EARLY}',
   '{{"user_id": "{OWNER}", "email": "owner@example.com"}}', '{LONG_AGO}', '{LONG_AGO}'),
  ('{ANSWERED}', 'owned', 'interview.answered', '{EARLY}',
   '{{"questions_answered": 3, "duration_minutes": 3}}', '{LONG_AGO}', '{LONG_AGO}'),
  (gen_random_uuid(), 'ended', 'interview.cancelled', '{EARLY}', '{{}}', '{LONG_AGO}', '{LONG_AGO}'),
  (gen_random_uuid(), 'early', 'interview.answered', '{EARLY}',
   '{{"questions_answered": 1, "duration_minutes": 1}}', '{LONG_AGO}', null);
insert into public.interview_dead_letters (id, event, event_id, session_id, type, reason, detail)
overriding system value values
  ({LETTER}, 'an event', '{ANSWERED}', 'owned', 'interview.answered', 'rejected', 'SQLSTATE 23514');
insert into public.interview_dead_letter_actions (id, actor, action, filter, letters) values
  ('{STARTED}', 'ada', 'discard', '{{}}', 1);
"""


@dataclass(frozen=True)
class Request:
    """One command on one object, as SQL or as HTTP; `where`, a column and a value, chooses the rows to select.

    Writing is blind, to all rows and with nothing returned: what it reads would need the right to select as well, and
    hide that a policy for writing is too wide.
    """

    verb: str
    name: str
    where: tuple[str, str] | None = None
    body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def writes(self) -> bool:
        return self.verb != "select" and self.name not in READING_FUNCTIONS

    @property
    def sql(self) -> sql.Composed:
        target = sql.Identifier("public", self.name)
        names = [sql.Identifier(name) for name in self.body]
        values = [sql.Literal(_literal(value)) for value in self.body.values()]
        match self.verb:
            case "select":
                assert self.where is not None
                name, value = sql.Identifier(self.where[0]), sql.Literal(self.where[1])
                return sql.SQL("select * from {} where {} = {}").format(target, name, value)
            case "insert":
                comma = sql.SQL(", ")
                return sql.SQL("insert into {} ({}) values ({})").format(target, comma.join(names), comma.join(values))
            case "update":
                return sql.SQL("update {} set {}").format(target, _pairs("=", names, values))
            case "delete":
                return sql.SQL("delete from {}").format(target)
            case _:
                return sql.SQL("select {}({})").format(target, _pairs("=>", names, values))

    def send(self, client: httpx.Client, token: str) -> httpx.Response:
        method = {"select": "GET", "update": "PATCH", "delete": "DELETE"}.get(self.verb, "POST")
        return client.request(
            method,
            f"/rpc/{self.name}" if self.verb == "execute" else f"/{self.name}",
            params={self.where[0]: f"eq.{self.where[1]}"} if self.where else {},
            json=dict(self.body) if method in {"POST", "PATCH"} else None,
            headers={"Authorization": f"Bearer {token}"},
        )


def _pairs(sign: LiteralString, names: list[sql.Identifier], values: list[sql.Literal]) -> sql.Composed:
    return sql.SQL(", ").join(
        sql.SQL("{} {} {}").format(name, sql.SQL(sign), value) for name, value in zip(names, values, strict=True)
    )


def _literal(value: object) -> object:
    """What the SQL editor would be given: an array of text as '{…}', other JSON as JSON."""
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return "{" + ",".join(value) + "}"
    return json.dumps(value) if isinstance(value, dict | list) else value


def on_table(
    name: str, where: tuple[str, str], insert: Mapping[str, Any], update: Mapping[str, Any]
) -> dict[Key, Request]:
    return {
        (name, "select"): Request("select", name, where),
        (name, "insert"): Request("insert", name, body=insert),
        (name, "update"): Request("update", name, body=update),
        (name, "delete"): Request("delete", name),
    }


def on_function(name: str, **arguments: Any) -> dict[Key, Request]:
    return {(name, "execute"): Request("execute", name, body=arguments)}


def requests(actor: str) -> dict[Key, Request]:
    """For each row of the table, the request that tries it."""
    names = {"p_email": "a@example.com", "p_resume_filename": None, "p_job_description_filename": None}
    claim = names | {"p_user_id": OWNER if actor == "owner" else OTHER, "p_session_id": "owned", "p_total_questions": 9}
    new_event = event("answered", "owned", questions_answered=7)
    letter = {"event": "{", "reason": "invalid_json", "detail": ""}
    logged = {"id": UNKNOWN, "actor": "ada", "action": "discard", "filter": {"reason": "rejected"}, "letters": 1}
    action = {"id": ANSWERED, "actor": "ada", "action": "discard", "filter": {}, "note": "a test"}
    return (
        on_table(
            "interview_sessions",
            ("session_id", "owned"),
            insert={"user_id": OWNER, "email": "a@example.com", "session_id": "new"},
            update={"questions_answered": 5},
        )
        | {("interview_sessions", "move"): Request("update", "interview_sessions", body={"user_id": OTHER})}
        | on_table(
            "interview_events",
            ("event_id", ANSWERED),
            insert={
                "event_id": UNKNOWN,
                "session_id": "owned",
                "type": "interview.answered",
                "occurred_at": EARLY,
                "payload": {},
            },
            update={"applied_at": None},
        )
        | on_table("interview_dead_letters", ("event_id", ANSWERED), insert=letter, update={"status": "discarded"})
        | on_table("interview_dead_letter_actions", ("actor", "ada"), logged, update={"letters": 2})
        | on_table("interview_user_statistics", ("user_id", OWNER), {"user_id": OWNER}, {"total_interviews": 0})
        | on_table("interview_completion_rate", ("total_sessions", "2"), {"total_sessions": 1}, {"total_sessions": 0})
        | on_table("interview_score_by_status", ("session_count", "1"), {"session_count": 1}, {"session_count": 0})
        | on_table("interview_daily_activity", ("started", "2"), {"started": 1}, {"started": 0})
        | on_function("create_interview_session", **names, p_user_id=OWNER, p_session_id="new")
        | {("create_interview_session", "claim"): Request("execute", "create_interview_session", body=claim)}
        | on_function("update_interview_progress", p_session_id="owned", p_questions_answered=5, p_duration_minutes=5)
        | on_function("complete_interview", p_session_id="owned", p_score=90, p_feedback={"strengths": []})
        | on_function("cancel_interview", p_session_id="owned")
        | on_function("get_user_interview_history", p_user_id=OWNER)
        | on_function("apply_interview_events", p_events=[new_event])
        | on_function("apply_interview_events_summary", p_events=[new_event])
        | on_function("apply_interview_event_pack", p_events=[new_event | {"subject": "not started"}])
        | on_function("apply_or_halve_interview_events", p_events=[new_event | {"subject": "not started"}], p_before=0)
        | on_function("lock_interview_sessions", p_session_ids=["owned"])
        | on_function("record_dead_interview_events", p_letters=[letter])
        | on_function("resolve_dead_interview_events", p_event_ids=[ANSWERED])
        | on_function("expire_waiting_interview_events", p_older_than="0")
        | on_function("purge_interview_events", p_older_than="0")
        | on_function("get_interview_timeline", p_session_id="owned")
        | on_function("fold_interview_ledger", p_session_ids=["owned"])
        | on_function("verify_interview_sessions", p_limit=10)
        | on_function("rebuild_interview_session", p_session_id="owned")
        | on_function("group_of_interview_dead_letter", p_reason="rejected", p_type=None, p_detail="7 left")
        | on_function("match_interview_dead_letters", p_filter={})
        | on_function("find_interview_dead_letters", p_filter={})
        | on_function("choose_interview_dead_letters", p_filter={})
        | on_function("group_interview_dead_letters", p_filter={})
        | on_function("count_interview_dead_letters")
        | on_function("received_interview_event", p_event=new_event)
        | on_function("note_interview_dead_letter_action", p_action=action, p_letters=1)
        | on_function("move_interview_dead_letters", p_action=action, p_move="discard", p_ids=[str(LETTER)])
        | on_function("replace_interview_dead_letter", p_action=action, p_id=LETTER, p_event=new_event)
        | on_function("settle_interview_dead_letters", p_ids=[str(LETTER)])
        | on_function("set_interview_completed_at")
        | on_function("keep_interview_session_id")
        | on_function("delete_interview_events_of_deleted_sessions")
    )


# ---------------------------------------------------------------------------------------------------- the two regimes

REGIMES: dict[str, LiteralString] = {
    "everything granted by default": """
        alter default privileges in schema public grant all on tables to anon, authenticated, service_role;
        alter default privileges in schema public grant all on functions to anon, authenticated, service_role;
        alter default privileges in schema public grant all on sequences to anon, authenticated, service_role""",
    "nothing granted by default": """
        alter default privileges in schema public revoke all on tables from anon, authenticated, service_role;
        alter default privileges in schema public revoke all on functions from anon, authenticated, service_role;
        alter default privileges in schema public revoke all on sequences from anon, authenticated, service_role;
        alter default privileges revoke execute on functions from public""",
}


@contextmanager
def fresh_database(stack: Stack, regime: str) -> Iterator[str]:
    """A database of its own in the stack's cluster: the shim, the regime, our SQL files; answers its name."""
    name = f"regime_{uuid.uuid4().hex}"
    shim = Path(worker.embedded.__file__).parent / "supabase_shim.sql"
    _as_superuser(stack, sql.SQL("create database {} template template0").format(sql.Identifier(name)))
    try:
        with psycopg.connect(make_conninfo(stack.database_url, dbname=name), autocommit=True) as connection:
            connection.execute(shim.read_bytes())
            connection.execute(REGIMES[regime])
            for file in sql_files():
                connection.execute(file.read_bytes())
        yield name
    finally:
        _as_superuser(stack, sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def _as_superuser(stack: Stack, command: sql.Composed) -> None:
    with psycopg.connect(stack.database_url, autocommit=True) as connection:
        connection.execute(command)


@contextmanager
def rest_api(stack: Stack, database_name: str, log: Path) -> Iterator[httpx.Client]:
    """A PostgREST like the stack's, with the same keys, before another database of the cluster."""
    port, admin_port = free_port(), free_port()
    env = stack.postgrest.env | {
        "PGRST_DB_URI": make_conninfo(stack.postgrest.env["PGRST_DB_URI"], dbname=database_name),
        "PGRST_SERVER_PORT": str(port),
        "PGRST_ADMIN_SERVER_PORT": str(admin_port),
    }
    server = Server(
        name="postgrest",
        argv=[str(binaries.postgrest())],
        log=log,
        ready=lambda: httpx.get(f"http://127.0.0.1:{admin_port}/ready").is_success,
        env=env,
    )
    server.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            yield client
    finally:
        server.stop()


@dataclass
class Project:
    """A Supabase project of one of the two ages."""

    stack: Stack
    database: Database
    api: httpx.Client

    def everything(self) -> dict[str, str]:
        """The rows of every table of schema public, as text."""
        tables = self.database.all(
            "select relname from pg_class where relnamespace = 'public'::regnamespace and relkind in ('r', 'p')"
            " order by relname"
        )
        contents = sql.SQL(", ").join(
            sql.SQL("(select string_agg(to_jsonb(t)::text, '; ' order by to_jsonb(t)::text) from {} t) as {}").format(
                sql.Identifier("public", table["relname"]), sql.Identifier(table["relname"])
            )
            for table in tables
        )
        row = self.database.connection.execute(sql.SQL("select {}").format(contents)).fetchone()
        assert row is not None
        return {name: text or "" for name, text in row.items()}

    def token(self, actor: str) -> str:
        user = user_of(actor)
        return self.stack.token("authenticated" if user else actor, user_id=user)

    def act_as(self, actor: str) -> None:
        """Do in SQL what PostgREST does at the start of each request; until the end of the transaction."""
        user = user_of(actor)
        role = "authenticated" if user else actor
        claims = {"role": role} | ({"sub": user} if user else {})
        connection = self.database.connection
        connection.execute(sql.SQL("set local role {}").format(sql.Identifier(role)))
        connection.execute("select set_config('request.jwt.claims', %s, true)", (json.dumps(claims),))

    def tell_story(self) -> None:
        self.database.connection.execute(STORY)

    def empty(self) -> None:
        self.database.connection.execute(
            "delete from auth.users; delete from public.interview_events; delete from public.interview_dead_letters;"
            " delete from public.interview_dead_letter_actions"
        )


def user_of(actor: str) -> str | None:
    return {"owner": OWNER, "other": OTHER}.get(actor)


@pytest.fixture(scope="module", params=REGIMES)
def project(
    request: pytest.FixtureRequest, stack: Stack, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Project]:
    log = tmp_path_factory.mktemp("security") / "postgrest.log"
    with fresh_database(stack, request.param) as name, rest_api(stack, name, log) as api:
        url = make_conninfo(stack.database_url, dbname=name)
        with psycopg.connect(url, autocommit=True, row_factory=dict_row) as connection:
            yield Project(stack, Database(connection), api)


@pytest.fixture
def scratch(project: Project) -> Iterator[Project]:
    """The project with the story, in a transaction that is rolled back."""
    with project.database.connection.transaction(force_rollback=True):
        project.tell_story()
        yield project


@pytest.fixture
def public(project: Project) -> Iterator[Project]:
    """The project with the story, committed, so that PostgREST sees it."""
    project.tell_story()
    yield project
    project.empty()


# ------------------------------------------------------------------------------------------------------ the role table


def judged(rows: int, *, changed: bool, request: Request) -> str:
    """The table's word for a request that was not refused."""
    if rows and changed == request.writes:
        return "yes"
    return "nothing" if not rows and not changed else f"{rows} rows, changed: {changed}"


@EACH_CELL
def test_each_role_may_do_in_sql_what_the_table_says(scratch: Project, key: Key, actor: str, expected: str) -> None:
    request, before = requests(actor)[key], scratch.everything()
    refusal, rows = "", 0
    try:
        with scratch.database.connection.transaction():
            scratch.act_as(actor)
            rows = scratch.database.connection.execute(request.sql).rowcount
    except psycopg.Error as error:
        refusal = error.sqlstate or "unknown"
    scratch.database.connection.execute("reset role")

    changed = scratch.everything() != before
    words = {"42501": "no", "55000": "never", "PT404": "404", "PT409": "409"}
    answer = words.get(refusal, refusal) if refusal else judged(rows, changed=changed, request=request)
    assert answer == expected
    assert not (refusal and changed)


@EACH_CELL
def test_each_role_may_do_through_postgrest_what_the_table_says(
    public: Project, key: Key, actor: str, expected: str
) -> None:
    request, before = requests(actor)[key], public.everything()

    response = request.send(public.api, public.token(actor))

    changed = public.everything() != before
    answer = response.json() if response.content else None
    if response.is_success:
        blind = request.verb in {"insert", "update", "delete"}
        rows = int(changed) if blind else len(answer) if isinstance(answer, list) else 1
        assert judged(rows, changed=changed, request=request) == expected
    else:
        assert answer is not None
        assert (response.status_code, answer["code"]) == http_refusal(request, actor, expected)
        assert not changed


def http_refusal(request: Request, actor: str, word: str) -> tuple[int, str]:
    """Status and code of a refusal: 401 asks to sign in, 403 says that it would not help."""
    if request.name in TRIGGER_FUNCTIONS:
        return 404, "PGRST202"  # PostgREST does not even show them
    no = (401 if actor == "anon" else 403, "42501")
    return {"no": no, "never": (500, "55000"), "404": (404, "PT404"), "409": (409, "PT409")}[word]


def test_the_table_names_every_object_of_schema_public_with_every_command(project: Project) -> None:
    relations = project.database.all(
        "select relname as name from pg_class where relnamespace = 'public'::regnamespace"
        " and relkind in ('r', 'p', 'v', 'm', 'f')"
    )
    functions = project.database.all("select proname as name from pg_proc where pronamespace = 'public'::regnamespace")
    expected = {(row["name"], verb) for row in relations for verb in ("select", "insert", "update", "delete")}
    expected |= {(row["name"], "execute") for row in functions}

    assert {key for key in CELLS if key[1] in PRIVILEGES} == expected
    assert all(set(requests(actor)) == set(CELLS) for actor in ACTORS)


def test_no_function_is_overloaded(project: Project) -> None:
    """An overload has grants of its own, and PostgREST answers 300 to calls that fit both."""
    assert (
        project.database.all(
            "select proname from pg_proc where pronamespace = 'public'::regnamespace group by 1 having count(*) > 1"
        )
        == []
    )


GRANTS: LiteralString = """
with held as (
  select c.relname as name, a.grantee, a.privilege_type
    from pg_class c, aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) a
   where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p', 'v', 'm', 'f')
  union all
  select c.relname, a.grantee, a.privilege_type
    from pg_class c, aclexplode(coalesce(c.relacl, acldefault('s', c.relowner))) a
   where c.relnamespace = 'public'::regnamespace and c.relkind = 'S'
  union all
  select c.relname, a.grantee, a.privilege_type
    from pg_class c join pg_attribute t on t.attrelid = c.oid, aclexplode(t.attacl) a
   where c.relnamespace = 'public'::regnamespace
  union all
  select p.proname, a.grantee, a.privilege_type
    from pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
   where p.pronamespace = 'public'::regnamespace
)
select distinct name, lower(privilege_type) as privilege
  from held
 where grantee = case when %(role)s = 'public' then 0 else to_regrole(%(role)s)::oid end
"""


@pytest.mark.parametrize("role", ["public", "anon", "authenticated", "service_role"])
def test_no_role_holds_a_privilege_that_the_table_does_not_give(project: Project, role: str) -> None:
    """Truncate above all, which row level security does not stop; and sequences."""
    actors = {"public": (), "anon": ("anon",), "authenticated": ("owner", "other"), "service_role": ("service_role",)}
    expected = {
        key
        for key, words in CELLS.items()
        for actor in actors[role]
        if key[1] in PRIVILEGES and words[actor] not in {"no", "never"}
    }

    held = project.database.connection.execute(GRANTS, {"role": role}).fetchall()

    assert {(row["name"], row["privilege"]) for row in held} == expected


def test_nobody_but_the_owner_of_the_schema_may_run_a_security_definer_function(project: Project) -> None:
    executable = project.database.all(
        "select p.proname, r.rolname from pg_proc p, pg_roles r where p.prosecdef"
        " and p.pronamespace = 'public'::regnamespace and not r.rolsuper"
        " and has_function_privilege(r.oid, p.oid, 'execute')"
    )

    assert executable == []


# ------------------------------------------------------------------------------------------------------ the seed's list

TRICKS: dict[str, Callable[[httpx.Client, dict[str, str]], httpx.Response]] = {
    "an upsert of the same session_id": lambda api, headers: api.post(
        "/interview_sessions?on_conflict=session_id",
        json={"user_id": OTHER, "email": "other@example.com", "session_id": "owned"},
        headers=headers | {"Prefer": "resolution=merge-duplicates"},
    ),
    "an update of all rows": lambda api, headers: api.patch(
        "/interview_sessions?user_id=not.is.null", json={"score": 0}, headers=headers
    ),
    "an update that takes the session over": lambda api, headers: api.patch(
        "/interview_sessions?session_id=eq.owned", json={"user_id": OTHER}, headers=headers
    ),
    "an insert with the same session_id": lambda api, headers: api.post(
        "/interview_sessions",
        json={"user_id": OTHER, "email": "other@example.com", "session_id": "owned"},
        headers=headers,
    ),
    "a start by RPC of an earlier time": lambda api, headers: api.post(
        "/rpc/create_interview_session",
        json={
            "p_user_id": OTHER,
            "p_email": "other@example.com",
            "p_session_id": "owned",
            "p_resume_filename": "x",
            "p_job_description_filename": "x",
            "p_created_at": LONG_AGO,
        },
        headers=headers,
    ),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_another_users_session_withstands(public: Project, trick: str) -> None:
    before = public.everything()

    response = TRICKS[trick](public.api, {"Authorization": f"Bearer {public.token('other')}"})

    assert public.everything() == before
    assert "owner@example.com" not in response.text


def test_figures_count_ones_own_sessions_only(public: Project) -> None:
    public.database.connection.execute(
        "insert into public.interview_sessions (user_id, email, session_id) values (%s, 'other@example.com', 'others')",
        (OTHER,),
    )

    def total(actor: str) -> int:
        request = Request("select", "interview_completion_rate")
        answer = request.send(public.api, public.token(actor)).json()
        assert isinstance(answer[0]["total_sessions"], int)
        return answer[0]["total_sessions"]

    assert {actor: total(actor) for actor in ("owner", "other", "service_role")} == {
        "owner": 2,
        "other": 1,
        "service_role": 3,
    }


def test_a_token_without_a_user_sees_nothing(public: Project) -> None:
    response = Request("select", "interview_sessions").send(public.api, public.stack.token("authenticated"))

    assert (response.status_code, response.json()) == (200, [])


@pytest.mark.parametrize("forgery", ["signed with another key", "expired", "not signed"])
def test_a_forged_or_expired_token_is_refused(public: Project, forgery: str) -> None:
    claims = {"role": "service_role", "exp": 4102444800}
    tokens = {
        "signed with another key": jwt.encode(claims, "f" * 48),
        "expired": jwt.encode(claims | {"exp": 1}, public.stack.postgrest.env["PGRST_JWT_SECRET"]),
        "not signed": jwt.encode(claims, "", algorithm="none"),
    }

    assert Request("select", "interview_sessions").send(public.api, tokens[forgery]).status_code == 401


def test_a_request_without_a_token_is_anons(public: Project) -> None:
    assert public.api.get("/interview_sessions").status_code == 401


# -------------------------------------------------------------------------------------------------------- deleted users

PERSONAL = {
    "id": "0cccccce-0000-4000-8000-000000000000",
    "email": "candidate@example.com",
    "file names": "candidates-cv.pdf",
    "feedback": "spoke of the candidates children",
    "reason": "the candidate fell ill",
}


def story_of_a_candidate(database: Database, session_id: str) -> None:
    """Applied events of every type, and a start that is refused."""
    user = database.create_user(uuid.UUID(PERSONAL["id"]))
    details: dict[str, Any] = {
        "user_id": str(user),
        "email": PERSONAL["email"],
        "resume_filename": PERSONAL["file names"],
        "job_description_filename": PERSONAL["file names"],
    }
    outcomes = database.apply(
        event("started", session_id, **details),
        event("answered", session_id, questions_answered=1),
        event("finished", session_id, score=1, feedback={"note": PERSONAL["feedback"]}),
        event("cancelled", session_id, reason=PERSONAL["reason"]),
        event("started", "owned", **details),
    )
    assert outcomes == ["applied", "applied", "applied", "applied", "rejected"]


def found_in(project: Project, needle: str) -> set[str]:
    return {table for table, text in project.everything().items() if needle in text}


def test_deleting_a_user_leaves_personal_data_in_dead_letters_only(scratch: Project) -> None:
    story_of_a_candidate(scratch.database, "candidates")
    before = {name: found_in(scratch, needle) for name, needle in PERSONAL.items()}
    everywhere = {"interview_sessions", "interview_events", "interview_dead_letters"}
    assert before == dict.fromkeys(("id", "email", "file names"), everywhere) | {
        "feedback": {"interview_sessions", "interview_events"},
        "reason": {"interview_events"},
    }

    scratch.database.connection.execute("delete from auth.users where id = %s", (PERSONAL["id"],))

    after = {name: found_in(scratch, needle) for name, needle in PERSONAL.items()}
    assert after == {name: tables & {"interview_dead_letters"} for name, tables in before.items()}
    assert scratch.database.session("candidates") is None
    assert scratch.database.ledger("candidates") == []
    assert len(scratch.database.ledger("owned")) == 2


def test_a_user_who_renames_a_session_leaves_no_ledger_behind(scratch: Project) -> None:
    story_of_a_candidate(scratch.database, "candidates")
    connection = scratch.database.connection
    rename = "update public.interview_sessions set session_id = 'renamed' where session_id = 'candidates'"
    try:
        with connection.transaction():
            connection.execute("set local role authenticated")
            claims = json.dumps({"sub": PERSONAL["id"]})
            connection.execute("select set_config('request.jwt.claims', %s, true)", (claims,))
            connection.execute(rename)
    except psycopg.errors.InsufficientPrivilege:
        pass  # better still
    connection.execute("reset role")

    connection.execute("delete from auth.users where id = %s", (PERSONAL["id"],))

    assert found_in(scratch, PERSONAL["email"]) <= {"interview_dead_letters"}


def test_what_the_audit_says_cannot_be_changed_nor_deleted(scratch: Project) -> None:
    """Only how far an action has come may be counted on."""
    columns = {"id", "began_at", "actor", "action", "filter", "note"}
    changeable = scratch.database.all(
        "select attname from pg_attribute where attrelid = 'public.interview_dead_letter_actions'::regclass"
        " and attnum > 0 and has_column_privilege('service_role', attrelid, attnum, 'update')"
    )
    assert {row["attname"] for row in changeable} == {"ended_at", "letters", "outcomes"}
    assert columns.isdisjoint(row["attname"] for row in changeable)


ACTIONS_OF_OPERATORS: LiteralString = """
select public.move_interview_dead_letters(
         jsonb_build_object('id', gen_random_uuid(), 'actor', 'ada', 'action', move, 'note', 'a test',
                            'filter', jsonb_build_object('user_id', d.event::jsonb -> 'data' ->> 'user_id')),
         move, array[d.id])
  from public.interview_dead_letters d, unnest(array['discard', 'restore', 'replay']) move
 where d.session_id = 'owned' and d.reason = 'session_conflict'
"""
EDIT: LiteralString = """
select public.replace_interview_dead_letter(
         jsonb_build_object('id', gen_random_uuid(), 'actor', 'ada', 'action', 'edit', 'note', 'a test',
                            'filter', jsonb_build_object('ids', jsonb_build_array(d.id))),
         d.id, d.event::jsonb || '{"subject": "another session"}')
  from public.interview_dead_letters d
 where d.session_id = 'owned' and d.reason = 'session_conflict'
"""


def test_the_audit_of_dead_letters_holds_ids_and_no_other_personal_data(scratch: Project) -> None:
    story_of_a_candidate(scratch.database, "candidates")
    for actions in (ACTIONS_OF_OPERATORS, EDIT):
        scratch.database.connection.execute(actions)
    letters = scratch.database.all("select letters from public.interview_dead_letter_actions where note = 'a test'")
    assert [row["letters"] for row in letters] == [1] * 4

    scratch.database.connection.execute("delete from auth.users where id = %s", (PERSONAL["id"],))

    found = {name for name, needle in PERSONAL.items() if "interview_dead_letter_actions" in found_in(scratch, needle)}
    assert found == {"id"}


def test_who_acted_on_dead_letters_and_why_stands_as_it_was_first_told(scratch: Project) -> None:
    first = {"id": UNKNOWN, "actor": "ada", "action": "replay", "filter": {"status": "open"}, "note": "mended"}
    other = {"id": UNKNOWN, "actor": "bob", "action": "discard", "filter": {}, "note": "not I"}
    note = "select public.note_interview_dead_letter_action(%s, %s, %s)"

    for action, letters, outcomes in [
        (first, 3, None),
        (other, 2, None),
        (other, -9, {"applied": 1}),
        (other, 4, None),
    ]:
        scratch.database.all(note, json.dumps(action), letters, outcomes and json.dumps(outcomes))

    row = scratch.database.one("select * from public.interview_dead_letter_actions where id = %s", UNKNOWN)
    assert {name: str(row[name]) if name == "id" else row[name] for name in first} == first
    assert (row["letters"], row["outcomes"]) == (4, {"applied": 1})  # never below none
