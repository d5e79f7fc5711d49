"""Simulated interviews: what the generator promises, and what `interviews simulate` does to a real stack."""

import gc
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import tracemalloc
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import sql

from events import InvalidEvent, parse_event
from tests.database import Database
from tests.stories import assert_rows_equal_their_stories
from tests.worker_process import PATIENCE_SECONDS, Workers, wait_until
from worker.cli.main import interviews
from worker.dead_letters import original_bytes
from worker.simulate import ENDINGS, LATE_BY, Simulated, simulated

INTERVIEWS = Path(sys.executable).parent / "interviews"
DONE, FAILED, WRONG_USAGE = 0, 1, 2
UNTIL = datetime(2026, 11, 23, tzinfo=UTC)
MANY: Final = 1_000  # interviews
CLOSE: Final = 0.03  # a share of their 12,000 events is as near as that: seven standard deviations

Finished = subprocess.CompletedProcess[str]
Event = dict[str, Any]


def made(rng: random.Random, sessions: int = MANY, **shares: float) -> list[Simulated]:
    return list(simulated(sessions, [uuid.uuid4(), uuid.uuid4()], rng, until=UNTIL, **shares))


def good(events: Iterable[Simulated]) -> list[Event]:
    return [json.loads(event.raw) for event in events if event.kind == "event"]


def stories(events: Iterable[Event]) -> dict[str, list[Event]]:
    """In the order given."""
    found: dict[str, list[Event]] = {}
    for event in events:
        found.setdefault(event["subject"], []).append(event)
    return found


def moment(event: Event) -> datetime:
    return datetime.fromisoformat(event["time"])


def reason(raw: bytes) -> str | None:
    """Why a worker must refuse it; None where only the database may."""
    try:
        parse_event(raw)
    except InvalidEvent as invalid:
        return invalid.reason
    return None


# ------------------------------------------------------------------------------------------------------ the generator


def test_every_good_event_keeps_the_contract_strictly(rng: random.Random) -> None:
    events = made(rng, shuffle=0.5, repeat=0.5, bad=0.3)

    for event in events:
        if event.kind != "bad":
            parse_event(event.raw, strict=True)


def test_interviews_are_as_long_as_real_ones_and_end_as_they_do(rng: random.Random) -> None:
    told = stories(good(made(rng)))

    assert len(told) == MANY
    endings = Counter[str]()
    for story in told.values():
        start, *rest = story
        answers = [event for event in rest if event["type"] == "interview.answered"]
        end = None if rest == answers else rest[-1]
        endings[end["type"].removeprefix("interview.") if end else "unfinished"] += 1
        assert start["type"] == "interview.started"
        assert rest == [*answers, *([end] if end else [])]
        assert 8 <= (questions := start["data"]["total_questions"]) <= 15
        assert [answer["data"]["questions_answered"] for answer in answers] == list(range(1, len(answers) + 1))
        assert len(answers) <= questions
        for before, answer in itertools.pairwise([start, *answers]):
            assert timedelta(minutes=1) <= moment(answer) - moment(before) <= timedelta(minutes=5)
        if end and end["type"] == "interview.finished":
            assert len(answers) == questions
            assert 0 <= end["data"]["score"] <= 100
            assert end["data"]["feedback"]["overall_score"] == end["data"]["score"]
        assert moment(story[-1]) < UNTIL
    for ending, share in ENDINGS.items():
        assert endings[ending] / MANY == pytest.approx(share / 100, abs=0.1)


def test_the_first_interview_began_not_long_before_the_last(rng: random.Random) -> None:
    begins = [moment(story[0]) for story in stories(good(made(rng, 100))).values()]

    assert begins == sorted(begins)
    assert begins[-1] - begins[0] < timedelta(hours=3)


def test_interviews_are_under_way_at_the_same_time(rng: random.Random) -> None:
    events = made(rng)
    subjects = [json.loads(event.raw)["subject"] for event in events]
    under_way, at_once = set[str](), list[int]()
    for event, subject in zip(events, subjects, strict=True):
        under_way.add(subject)
        at_once.append(len(under_way))
        if event.ends:
            under_way.remove(subject)

    middle = at_once[len(at_once) // 4 : 3 * len(at_once) // 4]
    assert min(middle) > 10
    assert max(middle) < 60
    neighbours = sum(one == other for one, other in itertools.pairwise(subjects))
    assert neighbours / len(subjects) < 0.2


def test_without_shuffle_all_arrive_in_the_order_of_their_times(rng: random.Random) -> None:
    times = [moment(event) for event in good(made(rng, shuffle=0.0, repeat=0.3, bad=0.3))]

    assert times == sorted(times)


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_the_share_to_shuffle_arrives_late_and_soon_enough(rng: random.Random, share: float) -> None:
    arrived = good(made(rng, shuffle=share))
    in_time = sorted(arrived, key=moment)
    place = {event["id"]: nth for nth, event in enumerate(in_time)}

    latest, late = -1, 0
    for nth, event in enumerate(arrived):
        late += place[event["id"]] < latest
        latest = max(latest, place[event["id"]])
        assert nth - place[event["id"]] <= LATE_BY[1]
    assert late / len(arrived) == pytest.approx(share, abs=CLOSE)
    assert any(story[0]["type"] != "interview.started" for story in stories(arrived).values())


@pytest.mark.parametrize("share", [0.05, 1.0])
def test_the_share_to_repeat_comes_twice(rng: random.Random, share: float) -> None:
    events = made(rng, repeat=share)

    times = Counter(event.raw for event in events)
    assert set(times.values()) == ({1, 2} if share < 1 else {2})
    assert sum(event.kind == "repeat" for event in events) / len(times) == pytest.approx(share, abs=CLOSE)
    assert {raw for raw in times if times[raw] == 2} == {event.raw for event in events if event.kind == "repeat"}


@pytest.mark.parametrize(("sessions", "share"), [(MANY, 0.05), (100, 0.6)])
def test_the_share_of_bad_ones_is_bad_in_every_way_an_engine_can_be(
    rng: random.Random, sessions: int, share: float
) -> None:
    events = made(rng, sessions, bad=share, shuffle=0.1)

    bad = [event.raw for event in events if event.kind == "bad"]
    assert len(bad) / len(events) == pytest.approx(share, abs=2 * CLOSE)
    assert {reason(raw) for raw in bad} == {"invalid_json", "invalid_event", "unsupported_type", "too_large", None}
    assert len(set(bad)) == len(bad)  # as many dead letters


def test_a_start_by_an_unknown_user_keeps_no_good_event_waiting(rng: random.Random) -> None:
    events = made(rng, 300, bad=0.3)

    starts = [json.loads(event.raw) for event in events if event.kind == "bad" and reason(event.raw) is None]
    assert {start["type"] for start in starts} == {"interview.started"}
    assert {start["subject"] for start in starts}.isdisjoint(stories(good(events)))


def test_no_bad_event_has_the_id_of_a_good_one(rng: random.Random) -> None:
    events = made(rng, 300, bad=0.3)

    ids = {event["id"] for event in good(events)}
    readable = [event.raw for event in events if event.kind == "bad" and reason(event.raw) != "invalid_json"]
    assert ids.isdisjoint(json.loads(raw)["id"] for raw in readable)


def test_the_shares_do_not_change_the_interviews(rng: random.Random) -> None:
    users, seed = [uuid.uuid4()], rng.getrandbits(32)
    plain, hurt = (
        simulated(50, users, random.Random(seed), until=UNTIL, **shares)
        for shares in ({}, {"shuffle": 0.9, "repeat": 0.5, "bad": 0.5})
    )

    assert sorted(good(hurt), key=moment) == good(plain)


def test_the_same_seed_makes_the_same_bytes_and_another_does_not(rng: random.Random) -> None:
    users, seed = [uuid.uuid4(), uuid.uuid4()], rng.getrandbits(32)

    def events(seed: int) -> list[Simulated]:
        return list(simulated(50, users, random.Random(seed), until=UNTIL, shuffle=0.2, repeat=0.2, bad=0.2))

    assert events(seed) == events(seed)
    assert {event.raw for event in events(seed)}.isdisjoint(event.raw for event in events(seed + 1))


def test_each_interview_ends_once(rng: random.Random) -> None:
    ends = [event for event in made(rng, 100, shuffle=0.5, repeat=0.5, bad=0.3) if event.ends]

    assert len({json.loads(event.raw)["subject"] for event in ends}) == len(ends) == 100
    assert {event.kind for event in ends} == {"event"}


def test_millions_of_interviews_need_no_memory(rng: random.Random) -> None:
    events = simulated(10_000_000, [uuid.uuid4()], rng, until=UNTIL, shuffle=0.5, repeat=0.5)
    for _ in itertools.islice(events, 3_000):  # some interviews are under way
        pass
    gc.collect()
    tracemalloc.start()
    try:
        told = sum(len(event.raw) for event in itertools.islice(events, 20_000))
        gc.collect()
        left, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert left < told / 4


# -------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(autouse=True)
def _no_letters_of_others(request: pytest.FixtureRequest) -> None:
    if "workers" in request.fixturenames:
        request.getfixturevalue("database").connection.execute("truncate public.interview_dead_letters")


def run(*arguments: object, **environment: str | None) -> Finished:
    """The command in our own environment, changed; None takes a variable away."""
    variables = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    return subprocess.run(
        [INTERVIEWS, "simulate", *map(str, arguments)],
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_SECONDS,
    )


def published(workers: Workers) -> list[bytes]:
    return [fields[b"event"] for _, fields in workers.client.xrange(workers.stream.key)]


def numbers(line: str) -> list[int]:
    """Of the line at the end: interviews, events, repeats, bad ones, the seed."""
    told = re.fullmatch(
        r"(\d+)(?: of \d+)? interviews, (\d+) events published, (\d+) of them twice, and (\d+) bad ones"
        r" \(--seed (\d+) --until \d{4}-\d\d-\d\d\)\n",
        line,
    )
    assert told, line
    return [int(number) for number in told.groups()]


def the_line(done: Finished, status: int) -> str:
    """The one line that tells why it did not do."""
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (status, "")
    return line


def test_the_good_ones_are_applied_and_the_bad_ones_are_dead_letters_with_their_reasons(
    workers: Workers, database: Database, rng: random.Random
) -> None:
    seed = rng.getrandbits(32)

    done = run("--sessions", 100, "--rate", 0, "--shuffle", 0.3, "--repeat", 0.2, "--bad", 0.1, "--seed", seed)

    assert (done.returncode, done.stderr) == (DONE, "")
    raw = published(workers)
    with workers.running(INTERVIEW_DEAD_SHARE_LIMIT="1") as worker:
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    users = {str(row["id"]) for row in database.all("select id from auth.users where email like 'sim-%%@example.com'")}
    reasons = {each: reason(each) for each in raw}
    bad = {each: why or "unknown_user" for each, why in reasons.items() if why or not known(each, users)}
    events = [json.loads(each) for each in raw if each not in bad]
    assert_rows_equal_their_stories(database, events)
    letters = database.all("select reason, event from public.interview_dead_letters")
    assert {shown(original_bytes(letter["event"])): letter["reason"] for letter in letters} == {
        shown(raw): why for raw, why in bad.items()
    }
    distinct = {event["id"] for event in events}
    assert numbers(done.stdout) == [100, len(distinct), len(events) - len(distinct), len(bad), seed]


def shown(raw: bytes) -> str | bytes:
    """What the database rejected it keeps as its own JSON, with the names in its own order."""
    try:
        return json.dumps(json.loads(raw), sort_keys=True)
    except ValueError:
        return raw


def known(raw: bytes, users: set[str]) -> bool:
    event = json.loads(raw)
    return event["type"] != "interview.started" or event["data"]["user_id"] in users


def test_a_load_at_a_rate_is_applied_while_it_comes(workers: Workers, database: Database, user: uuid.UUID) -> None:
    began = time.monotonic()
    with workers.running() as worker:
        done = run("--sessions", 30, "--rate", 400, "--user", user, DATABASE_URL=None)
        workers.wait_until_empty()
        assert workers.stop(worker) == 0

    assert (done.returncode, done.stderr) == (DONE, "")
    interviews, events, repeats, bad, _seed = numbers(done.stdout)
    assert (interviews, bad) == (30, 0)
    assert time.monotonic() - began > (events + repeats) / 400
    rows = database.all("select session_id from public.interview_sessions where user_id = %s", user)
    applied = database.one(
        "select count(*) as n from public.interview_events where applied_at is not null and session_id = any (%s)",
        [row["session_id"] for row in rows],
    )
    assert (len(rows), applied["n"]) == (30, events)
    assert database.one("select count(*) as n from public.interview_dead_letters")["n"] == 0


def test_with_more_than_half_bad_the_workers_hold(workers: Workers, user: uuid.UUID) -> None:
    with workers.running():
        run("--sessions", 40, "--rate", 0, "--bad", 0.7, "--user", user)

        wait_until(lambda: bool((hold := workers.hold()) and hold.remedy), "the workers hold")


def test_the_seed_and_the_day_that_it_tells_make_the_same_events_again(workers: Workers) -> None:
    first = run("--sessions", 20, "--rate", 0, "--bad", 0.2)
    events = published(workers)
    workers.client.delete(workers.stream.key)
    again = first.stdout.partition("(")[2].strip(")\n").split()

    second = run("--sessions", 20, "--rate", 0, "--bad", 0.2, *again)

    assert (second.returncode, second.stderr, second.stdout) == (DONE, "", first.stdout)
    assert published(workers) == events


def test_the_interviews_are_spread_over_the_users_given(workers: Workers) -> None:
    users = [str(uuid.uuid4()), str(uuid.uuid4())]

    run("--sessions", 100, "--rate", 0, "--user", users[0], "--user", users[1])

    starts = [event for event in map(json.loads, set(published(workers))) if event["type"] == "interview.started"]
    shares = Counter(start["data"]["user_id"] for start in starts)
    assert sorted(shares) == sorted(users)
    assert min(shares.values()) > 10


def test_a_slow_rate_is_kept(workers: Workers) -> None:
    began = time.monotonic()

    done = run("--sessions", 1, "--rate", 8, "--user", uuid.uuid4(), "--repeat", 0)

    _, events, *_ = numbers(done.stdout)
    assert events == len(published(workers))
    assert time.monotonic() - began > events / 8


@pytest.mark.parametrize("rate", [5, 0.001, 200])
def test_ctrl_c_ends_it_and_it_says_how_far_it_came(workers: Workers, rate: float) -> None:
    command = [str(INTERVIEWS), "simulate", "--sessions", "10000", "--rate", str(rate), "--user", str(uuid.uuid4())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: workers.stream.state().length >= min(rate, 10), "some are published")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_SECONDS)

    assert (process.returncode, err) == (FAILED, "interviews: stopped by Ctrl-C\n")
    assert " of 10000 interviews, " in out
    _, events, repeats, bad, _seed = numbers(out)
    assert events + repeats + bad == len(published(workers))


def test_an_error_of_redis_on_the_way_is_one_line_and_it_says_how_far_it_came(workers: Workers) -> None:
    command = [str(INTERVIEWS), "simulate", "--rate", "20", "--user", str(uuid.uuid4())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: workers.stream.state().length > 5, "some batches are published")
        workers.client.set(workers.stream.key, "no stream any more")
        out, err = process.communicate(timeout=PATIENCE_SECONDS)

    assert process.returncode == FAILED
    assert numbers(out)[1] > 0
    assert err.startswith("interviews: Redis ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--bad", "2"],
        ["--bad", "1"],  # no interviews at all
        ["--bad", "nan"],
        ["--shuffle", "-0.1"],
        ["--repeat", "1.1"],
        ["--rate", "-1"],
        ["--rate", "inf"],
        ["--sessions", "0"],
        ["--sessions", "many"],
        ["--sessions", "10000001"],
        ["--user", "ada"],
        ["--seed", "-1"],
        ["--until", "tomorrow"],
        ["--until", "1066-10-14"],
        ["more"],
    ],
    ids=" ".join,
)
def test_used_wrongly_it_says_so_in_one_line_and_publishes_nothing(workers: Workers, arguments: list[str]) -> None:
    done = CliRunner().invoke(interviews, ["simulate", *arguments], prog_name="interviews")

    assert (done.exit_code, done.stdout) == (WRONG_USAGE, "")
    (*usage, line) = done.stderr.splitlines()
    assert usage[0].startswith("Usage: interviews simulate")
    assert line.startswith("Error: ")
    assert published(workers) == []


@pytest.mark.parametrize("url", [None, ""])
def test_without_users_it_says_how_to_name_them(workers: Workers, url: str | None) -> None:
    line = the_line(run(DATABASE_URL=url), WRONG_USAGE)

    assert "--user UUID" in line
    assert "DATABASE_URL" in line
    assert published(workers) == []


@pytest.mark.parametrize(
    "url", ["postgres://ada:a-password@127.0.0.1:1/postgres", "a-password", "postgres://a-password@[::1/x"]
)
def test_a_wrong_database_url_is_one_line_without_its_password(workers: Workers, url: str) -> None:
    line = the_line(run(DATABASE_URL=url), FAILED)

    assert "DATABASE_URL" in line
    assert "a-password" not in line
    assert published(workers) == []


def test_without_psycopg_it_says_what_to_install(workers: Workers) -> None:
    without = "import sys; sys.modules['psycopg'] = None; from worker.cli import main; main()"

    done = subprocess.run(
        [sys.executable, "-c", without, "simulate"], capture_output=True, text=True, check=False, timeout=60
    )

    assert "interview-worker[embedded]" in the_line(done, FAILED)
    assert published(workers) == []


@pytest.fixture
def bare(workers: Workers, database: Database) -> Iterator[str]:
    """The URL of a database with nothing in it."""
    name = f"sim_{uuid.uuid4().hex}"
    database.connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    yield workers.environment["DATABASE_URL"].removesuffix("/postgres") + f"/{name}"
    database.connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def test_it_makes_no_users_in_a_real_supabase(workers: Workers, bare: str) -> None:
    with psycopg.connect(bare, autocommit=True) as real:
        real.execute("create schema auth")
        real.execute("create table auth.users (id uuid primary key, email text, confirmation_token text)")

        line = the_line(run(DATABASE_URL=bare), WRONG_USAGE)

        assert "--user UUID" in line
        assert real.execute("select count(*) from auth.users").fetchone() == (0,)
    assert published(workers) == []


def test_without_a_table_of_users_it_is_one_line(workers: Workers, bare: str) -> None:
    assert "UndefinedTable" in the_line(run(DATABASE_URL=bare), FAILED)
    assert published(workers) == []


def test_a_redis_that_is_away_is_one_line() -> None:
    line = the_line(run("--user", uuid.uuid4(), REDIS_URL="redis://:a-password@127.0.0.1:1/0"), FAILED)

    assert "REDIS_URL" in line
    assert "a-password" not in line
