"""Anything that may happen to a few sessions, in any order; after each step all is as the plain rules tell.

HYPOTHESIS_PROFILE=long looks ten times as far.
"""

import json
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, Literal, LiteralString

import psycopg
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.database import Database, Row, event
from tests.hypothesis_profiles import PROFILE
from tests.oracle import Letter, World, comparable, expected_row
from tests.test_convergence import DATA

Event = dict[str, Any]

# Few of each, so that sessions are claimed twice and times are tied; a person's call lies between past and future.
SESSIONS = 2
USERS = 3
TIMES = ["2001-01-01T10:00:00Z", "2001-01-01T12:00:01+02:00", "2999-01-01T10:00:00Z", "2999-01-01T10:00:01.5Z"]
BAD = [{"score": 101}, {"score": -0.5}, {"questions_answered": -1}]

sessions = st.integers(0, SESSIONS - 1)
users = st.integers(0, USERS - 1)
numbers = st.integers(0, 9)
anything = st.integers(0, 2**16 - 1)  # which of however many there are

drafts = st.sampled_from([*DATA, "started", "finished", "bad"]).flatmap(
    lambda kind: st.tuples(
        st.just("finished" if kind == "bad" else kind),
        sessions,
        users,
        st.sampled_from(TIMES),
        anything,  # the first bits of the id: they decide ties
        st.sampled_from(BAD) if kind == "bad" else DATA[kind],
    )
)
Draft = tuple[str, int, int, str, int, dict[str, Any]]

EDITS: dict[str, tuple[LiteralString, Row]] = {
    "questions_answered": ("questions_answered = 0", {"questions_answered": 0}),
    "duration_minutes": ("duration_minutes = 10", {"duration_minutes": 10}),
    "total_questions": ("total_questions = null", {"total_questions": None}),
    "interview_status": ("interview_status = 'in_progress'", {"interview_status": "in_progress", "completed_at": None}),
    "score": ("score = 1", {"score": 1}),
    "feedback": ("feedback = null", {"feedback": None}),
    "email": ("email = 'edited'", {"email": "edited"}),
    "resume_filename": ("resume_filename = null", {"resume_filename": None}),
    "job_description_filename": ("job_description_filename = 'edited'", {"job_description_filename": "edited"}),
}

# All there is of the sessions, in one round trip.
STATE = """
select (select coalesce(jsonb_object_agg(s.session_id, to_jsonb(s) - 'id'), '{}')
          from public.interview_sessions s where s.session_id = any (%(sessions)s)) as rows,
       (select coalesce(jsonb_object_agg(e.event_id, e.applied_at is not null), '{}')
          from public.interview_events e where e.session_id = any (%(sessions)s)) as ledger,
       (select coalesce(jsonb_agg(jsonb_build_array(d.event_id, d.reason, d.status, d.attempts)), '[]')
          from public.interview_dead_letters d
         where d.id > %(letter)s and d.session_id = any (%(sessions)s)) as letters,
       public.verify_interview_sessions(%(run)s, %(count)s) -> 'found' as found
"""

CALLS: dict[str, LiteralString] = {
    "started": "public.create_interview_session(%(user_id)s, %(email)s, %(subject)s, %(resume_filename)s,"
    " %(job_description_filename)s, %(total_questions)s)",
    "answered": "public.update_interview_progress(%(subject)s, %(questions_answered)s, %(duration_minutes)s)",
    "finished": "public.complete_interview(%(subject)s, %(score)s, %(feedback)s)",
    "cancelled": "public.cancel_interview(%(subject)s)",
}
REFUSALS = {"PT404": "missing", "PT409": "conflict", "23503": "unknown user"}


class Interviews(RuleBasedStateMachine):
    """Users 0 and 1 exist from the beginning, user 2 does not."""

    def __init__(self, database: Database) -> None:
        super().__init__()
        self.database = database
        self.world = World()
        self.published: list[Event] = []
        self.purged: set[str] = set()
        self.run = uuid.uuid4()
        self.sessions = [f"{self.run}-{number}" for number in range(SESSIONS)]
        self.users = [str(uuid.uuid4()) for _ in range(USERS)]
        letter = database.one("select coalesce(max(id), 0) as id from public.interview_dead_letters")["id"]
        self.parameters = {"sessions": self.sessions, "letter": letter, "run": str(self.run), "count": SESSIONS}

    def teardown(self) -> None:
        """Leave nothing behind that the next example would read past."""
        with self.database.connection.pipeline():
            for table in ("interview_sessions", "interview_events", "interview_dead_letters"):
                self.database.connection.execute(
                    f"delete from public.{table} where session_id = any (%s)", (self.sessions,)
                )
            self.database.connection.execute("delete from auth.users where id = any (%s::uuid[])", (self.users,))

    @initialize()
    def begin(self) -> None:
        for user in range(USERS - 1):
            self.create_user(user)

    # ----------------------------------------------------------------------------------------------------- events

    @rule(events=st.lists(drafts, min_size=1, max_size=4))
    def apply_new_events(self, events: list[Draft]) -> None:
        self.deliver([self.publish(draft) for draft in events])

    @rule(numbers=st.lists(anything, min_size=1, max_size=4))
    def apply_events_again(self, numbers: list[int]) -> None:
        self.deliver([self.again(number) for number in numbers])

    @rule(pack=st.lists(drafts | anything, min_size=2, max_size=8))
    def apply_new_events_and_some_again(self, pack: list[Draft | int]) -> None:
        self.deliver([self.publish(each) if isinstance(each, tuple) else self.again(each) for each in pack])

    def publish(self, draft: Draft) -> Event | None:
        kind, session, user, time, rank, data = draft
        if self.sessions[session] in self.purged and kind in ("started", "finished"):
            return None  # might tie with one that only the row remembers: see purge
        event_id = uuid.UUID(int=rank << 112 | len(self.published) << 96 | self.run.int >> 32)
        owner = {"user_id": self.users[user]} if kind == "started" else {}
        new = event(kind, self.sessions[session], time=time, event_id=event_id, **data | owner)
        self.published.append(new)
        return new

    def again(self, number: int) -> Event | None:
        return self.published[number % len(self.published)] if self.published else None

    def deliver(self, events: Sequence[Event | None]) -> None:
        pack = [each for each in events if each is not None]
        outcomes = self.database.apply(*pack)
        told = [self.world.apply(each) for each in pack]
        for at, each in enumerate(pack):
            # An early event and its start in one pack may be applied at once, or one after the other.
            allowed = {told[at]}
            if told[at] == "waiting" and self.world.ledger[each["id"]].applied:
                allowed.add("applied")
            assert outcomes[at] in allowed, (each, outcomes, told)

    # ----------------------------------------------------------------------------------------------- dead letters

    @rule(numbers=st.lists(anything, min_size=1, max_size=4), delivered=st.booleans())
    def replay_dead_letters(self, numbers: list[int], delivered: bool) -> None:
        """As `interviews dlq replay` does: mark first, then publish; a crash between the two is allowed."""
        events = [self.move(letter, "replayed") for letter in self.open_letters(numbers)]
        if delivered:
            self.deliver(events)

    @rule(number=anything)
    def discard_a_dead_letter(self, number: int) -> None:
        for letter in self.open_letters([number]):
            self.move(letter, "discarded")

    def open_letters(self, numbers: list[int]) -> list[Letter]:
        letters = [letter for letter in self.world.letters if letter.is_open]
        chosen = dict.fromkeys(number % len(letters) for number in numbers) if letters else {}
        return [letters[number] for number in chosen]

    def move(self, letter: Letter, status: Literal["replayed", "discarded"]) -> Event:
        """Change an open letter's status, here and there; answers its event as it is kept."""
        kept = self.database.one(
            "update public.interview_dead_letters set status = %s"
            " where event_id = %s and status in ('open', 'replayed') returning event",
            status,
            letter.event["id"],
        )
        letter.status = status
        again: Event = json.loads(kept["event"])
        assert {name: again[name] for name in ("id", "type", "subject", "data")} == {
            name: letter.event[name] for name in ("id", "type", "subject", "data")
        }
        return again

    # ------------------------------------------------------------------------------------------------------ people

    @rule(user=users)
    def create_user(self, user: int) -> None:
        if self.users[user] not in self.world.users:
            self.database.create_user(uuid.UUID(self.users[user]))
            self.world.users.add(self.users[user])

    @rule(user=users)
    def delete_user(self, user: int) -> None:
        self.database.connection.execute("delete from auth.users where id = %s", (self.users[user],))
        self.world.delete_user(self.users[user])

    @rule(session=sessions, user=st.none() | users, data=DATA["started"])
    def a_person_starts_a_session(self, session: int, user: int | None, data: Row) -> None:
        user_id = self.owner(self.sessions[session]) if user is None else self.users[user]
        self.call("started", user_id, self.sessions[session], data)

    @rule(session=sessions, questions_answered=numbers, duration_minutes=st.none() | numbers)
    def a_person_reports_progress(self, session: int, questions_answered: int, duration_minutes: int | None) -> None:
        self.call_as_owner(
            "answered",
            self.sessions[session],
            {"questions_answered": questions_answered, "duration_minutes": duration_minutes},
        )

    @rule(session=sessions, score=st.none() | numbers, feedback=st.none() | st.just({"by": "hand"}))
    def a_person_completes_a_session(self, session: int, score: int | None, feedback: Row | None) -> None:
        self.call_as_owner("finished", self.sessions[session], {"score": score, "feedback": feedback})

    @rule(session=sessions)
    def a_person_cancels_a_session(self, session: int) -> None:
        self.call_as_owner("cancelled", self.sessions[session], {})

    def call_as_owner(self, kind: str, session_id: str, data: Row) -> None:
        self.call(kind, self.owner(session_id), session_id, data)

    def owner(self, session_id: str) -> str:
        row = self.world.row(session_id)
        return self.users[0] if row is None else str(row["user_id"])

    def call(self, kind: str, user_id: str, session_id: str, data: Row) -> None:
        """Call an RPC as a signed-in user; it tells of an event that happens now."""
        names = dict.fromkeys(("resume_filename", "job_description_filename", "total_questions"))
        values = {key: json.dumps(value) if isinstance(value, dict) else value for key, value in data.items()}
        parameters = {"subject": session_id, "user_id": user_id} | names | values
        connection = self.database.connection
        answer = "done"
        now = None
        try:
            with connection.transaction():
                connection.execute("select set_config('request.jwt.claim.sub', %s, true)", (user_id,))
                connection.execute("set local role authenticated")
                now = connection.execute("select now()::text as now, " + CALLS[kind], parameters).fetchone()
        except psycopg.Error as refused:
            answer = REFUSALS.get(refused.sqlstate or "", repr(refused))
        time = now["now"] if now else TIMES[0]
        owner = {"user_id": user_id} if kind == "started" else {}
        assert self.world.call(event(kind, session_id, time=time, **data | owner)) == answer

    # --------------------------------------------------------------------------------------------- time and repair

    @rule(session=sessions)
    def time_passes_and_events_expire(self, session: int) -> None:
        self.time_passes(self.sessions[session])
        answer = self.database.one("select public.expire_waiting_interview_events('1 day') as count")
        assert answer["count"] == self.world.expire()

    @rule(session=sessions)
    def time_passes_and_the_ledger_is_purged(self, session: int) -> None:
        """Not where two starts or finishes are tied: the row does not remember which id was the decisive one."""
        self.time_passes(self.sessions[session])
        purgeable = self.world.purgeable()
        deciding = [
            (each["subject"], each["type"], datetime.fromisoformat(each["time"]))
            for each in self.published
            if each["subject"] in purgeable and each["type"] in ("interview.started", "interview.finished")
        ]
        if len(deciding) == len(set(deciding)):
            answer = self.database.one("select public.purge_interview_events('30 days') as count")
            assert answer["count"] == self.world.purge()
            self.purged.update(purgeable)

    def time_passes(self, session_id: str) -> None:
        self.database.connection.execute(
            "update public.interview_events set received_at = received_at - interval '31 days' where session_id = %s",
            (session_id,),
        )
        for kept in self.world.ledger_of(session_id):
            kept.old = True

    @rule(session=sessions)
    def rebuild(self, session: int) -> None:
        answer = "done"
        try:
            self.database.one("select public.rebuild_interview_session(%s, p_force => true)", self.sessions[session])
        except psycopg.Error as refused:
            answer = REFUSALS.get(refused.sqlstate or "", repr(refused))
        assert (answer == "done") == self.world.rebuild(self.sessions[session]), answer

    @rule(session=sessions, column=st.sampled_from(sorted(EDITS)))
    def a_row_is_edited_found_out_and_rebuilt(self, session: int, column: str) -> None:
        session_id = self.sessions[session]
        row = self.world.row(session_id)
        if row is None or not self.world.founded(session_id):
            return
        statement, edited = EDITS[column]
        self.database.connection.execute(
            "update public.interview_sessions set " + statement + " where session_id = %s", (session_id,)
        )
        found = self.state()["found"]
        assert findings(found, session_id) == self.world.audit(session_id, row | edited)
        self.rebuild(session)

    # ------------------------------------------------------------------------------------------ after each step

    def state(self) -> Row:
        (state,) = self.database.connection.execute(STATE, self.parameters)
        return state

    @invariant()
    def all_is_as_the_rules_tell(self) -> None:
        world, state = self.world, self.state()
        assert {key: comparable(row) for key, row in state["rows"].items()} == {
            session_id: expected_row(story) for session_id, story in world.stories.items()
        }
        assert state["ledger"] == {event_id: kept.applied for event_id, kept in world.ledger.items()}
        assert sorted(state["letters"]) == sorted(
            [letter.event["id"], letter.reason, letter.status, letter.attempts] for letter in world.letters
        )
        for session_id in self.sessions:
            assert findings(state["found"], session_id) == world.audit(session_id)
            assert "behind" not in findings(state["found"], session_id)
        self.no_event_is_lost_or_in_two_places(state)

    def no_event_is_lost_or_in_two_places(self, state: Row) -> None:
        ledger: dict[str, bool] = state["ledger"]
        unresolved = {event_id for event_id, _, status, _ in state["letters"] if status in ("open", "replayed")}
        discarded = {event_id for event_id, _, status, _ in state["letters"] if status == "discarded"}
        lost = {each["id"] for each in self.published} - set(ledger) - unresolved - discarded - self.world.gone
        assert lost == set()
        assert not {event_id for event_id in unresolved if ledger.get(event_id)}, "applied, and a dead letter"


def findings(found: list[Row], session_id: str) -> dict[str, list[str]]:
    return {each["kind"]: each["columns"] for each in found if each["session_id"] == session_id}


def test_whatever_happens_rows_ledger_and_dead_letters_are_as_the_rules_tell(database: Database) -> None:
    database.connection.execute("set synchronous_commit = off")  # no crash here: spare the disk
    while database.one("select public.expire_waiting_interview_events('1 day') as count")["count"]:
        pass  # what other tests left waiting

    class OnThisDatabase(Interviews):
        def __init__(self) -> None:
            super().__init__(database)

    run_state_machine_as_test(OnThisDatabase, settings=PROFILE)


# --------------------------------------------------------------------------- rare stories, told on every run


@pytest.fixture
def machine(database: Database) -> Iterator[Interviews]:
    """The machine by hand; in the end all is as the rules tell."""
    machine = Interviews(database)
    machine.begin()
    yield machine
    machine.all_is_as_the_rules_tell()
    machine.teardown()


def bury_an_orphan(machine: Interviews) -> None:
    """An answer that waited in vain: now the one dead letter."""
    machine.apply_new_events([("answered", 0, 0, TIMES[0], 0, {"questions_answered": 5})])
    machine.time_passes_and_events_expire(0)
    assert [letter.reason for letter in machine.world.letters] == ["orphaned"]


def test_an_orphan_replayed_before_a_person_starts_its_session_is_applied_by_expiry_and_resolved(
    machine: Interviews,
) -> None:
    bury_an_orphan(machine)
    machine.replay_dead_letters([0], delivered=True)
    machine.a_person_starts_a_session(0, 0, {"email": "a"})
    machine.all_is_as_the_rules_tell()

    machine.time_passes_and_events_expire(0)

    assert [letter.status for letter in machine.world.letters] == ["resolved"]


@pytest.mark.parametrize("status", ["open", "discarded"])
def test_an_orphan_that_comes_again_is_applied_and_only_an_open_letter_is_resolved(
    machine: Interviews, status: str
) -> None:
    bury_an_orphan(machine)
    if status == "discarded":
        machine.discard_a_dead_letter(0)
    machine.apply_events_again([0])
    machine.all_is_as_the_rules_tell()

    machine.apply_new_events([("started", 0, 0, TIMES[0], 0, {"email": "a"})])

    assert machine.world.ledger[machine.published[0]["id"]].applied
    assert [letter.status for letter in machine.world.letters] == ["resolved" if status == "open" else "discarded"]


def test_a_dead_start_is_applied_when_the_user_who_held_the_session_is_deleted(machine: Interviews) -> None:
    machine.apply_new_events([("started", 0, user, TIMES[0], user, {"email": "a"}) for user in (0, 1)])
    assert [letter.reason for letter in machine.world.letters] == ["session_conflict"]

    machine.delete_user(0)
    machine.replay_dead_letters([0], delivered=True)

    row = machine.world.row(machine.sessions[0])
    assert row is not None
    assert row["user_id"] == machine.users[1]


def test_an_event_that_waits_beside_a_session_that_a_person_ended_is_not_purged(machine: Interviews) -> None:
    machine.apply_new_events([("answered", 0, 0, TIMES[0], 0, {"questions_answered": 5})])
    machine.a_person_starts_a_session(0, 0, {"email": "a"})
    machine.a_person_cancels_a_session(0)

    machine.time_passes_and_the_ledger_is_purged(0)

    assert [kept.applied for kept in machine.world.ledger.values()] == [False]
