"""What Prometheus reads is what happened, and metrics never hurt the work."""

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import jsonschema
import psutil
import pytest
import yaml
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Leaks
from tests.database import Database, event
from tests.stories import assert_rows_equal_their_stories, crowd, encoded
from tests.worker_process import Workers, wait_until
from worker import metrics
from worker.cli.main import interviews
from worker.dead_letters import REASONS
from worker.embedded import Stack
from worker.embedded.server import free_port
from worker.metrics import HELP, RPCS, STATUSES

ROOT = Path(__file__).parent.parent
ALERTS_TEXT = (ROOT / "deploy/prometheus/alerts.yml").read_text()
DASHBOARD_TEXT = (ROOT / "deploy/grafana/dashboards/interviews.json").read_text()
ALERTS: Any = yaml.safe_load(ALERTS_TEXT)
DASHBOARD: Any = json.loads(DASHBOARD_TEXT)
HISTOGRAMS = {"interview_event_lag_seconds", "interview_pack_events", "interview_rpc_seconds"}
SAMPLES = (HELP.keys() - HISTOGRAMS) | {f"{name}_{part}" for name in HISTOGRAMS for part in ("bucket", "sum", "count")}


class Scrape(NamedTuple):
    """One answer of the endpoint: `told(name, label=...)` is a number, None where there is none."""

    text: str
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]
    helps: dict[str, str]

    def told(self, name: str, **labels: str) -> float | None:
        assert name in SAMPLES
        return self.samples.get((name, frozenset(labels.items())))


def ask(port: int, accept: str = "text/plain") -> str:
    answer = httpx.get(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept}, timeout=10)
    assert answer.status_code == 200
    return answer.text


def scrape(port: int) -> Scrape:
    return read(ask(port))


def read(text: str) -> Scrape:
    families = list(text_string_to_metric_families(text))
    samples = {(each.name, frozenset(each.labels.items())): each.value for one in families for each in one.samples}
    return Scrape(text, samples, {each.name: each.documentation for each in families})


def openmetrics_families(text: str) -> set[str]:
    """The metrics' names, by a parser that takes nothing which breaks the standard: two of one name, for example."""
    assert text.endswith("# EOF\n")
    return {each.name for each in openmetrics.text_string_to_metric_families(text)}  # type: ignore[no-untyped-call]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a worker is told to make its temporary folder."""
    made = tmp_path / "tmp"
    made.mkdir()
    return made


@pytest.fixture(autouse=True)
def _no_letters_of_others(request: pytest.FixtureRequest) -> None:
    if "database" in request.fixturenames:
        database: Database = request.getfixturevalue("database")
        database.connection.execute("truncate public.interview_dead_letters")


def drawn(rng: random.Random) -> uuid.UUID:
    return uuid.UUID(int=rng.getrandbits(128), version=4)


# ------------------------------------------------------------------------------------------------- a real worker's


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_the_numbers_are_what_happened(
    workers: Workers,
    database: Database,
    user: uuid.UUID,
    rng: random.Random,
    port: int,
    folder: Path,
    leaks: Leaks,
    pool: str,
) -> None:
    events = crowd(user, rng, events=1_000)
    starts, others = (
        [each for each in events if (each["type"] == "interview.started") is first] for first in (True, False)
    )
    early = [event("answered", f"early-{drawn(rng)}", event_id=drawn(rng), questions_answered=1) for _ in range(7)]
    nobody = [
        event("started", f"nobody-{drawn(rng)}", event_id=drawn(rng), user_id=str(drawn(rng)), email="e@example.com")
        for _ in range(3)
    ]
    bad = [b"{%d" % n for n in range(4)] + encoded([event("paused", "a", event_id=drawn(rng)) for _ in range(2)])
    repeats = rng.sample(encoded(others), 100)
    mixture = [*encoded([*others, *early, *nobody]), *bad, *repeats]
    rng.shuffle(mixture)

    with workers.running(
        INTERVIEW_METRICS_PORT=str(port), INTERVIEW_POOL=pool, INTERVIEW_DEAD_SHARE_LIMIT="1", TMPDIR=str(folder)
    ) as worker:
        for batch in (encoded(starts), mixture, bad[:1]):  # each is done before the next: what happens is sure
            workers.stream.add(batch)
            workers.wait_until_empty()
        now = scrape(port)
        waiting = database.one("select count(*) as n from public.interview_events where applied_at is null")["n"]
        wait_until(lambda: scrape(port).told("interview_dead_letters_open") == 9, "the open dead letters are told")
        then = scrape(port)
        strict = openmetrics_families(ask(port, "application/openmetrics-text; version=1.0.0"))  # as Prometheus asks
        assert list(folder.glob("interview-metrics-*"))
        assert workers.stop(worker) == 0

    assert now.told("interview_events_applied_total") == len(events)
    assert now.told("interview_events_duplicate_total") == len(repeats)
    assert now.told("interview_events_waiting_total") == len(early)
    assert now.told("interview_events_dead_again_total") == 1
    died = {"invalid_json": 4, "unsupported_type": 2, "unknown_user": 3}
    assert {each: now.told("interview_events_dead_lettered_total", reason=each) for each in REASONS} == {
        each: died.get(each, 0) for each in REASONS
    }
    assert now.told("interview_event_lag_seconds_count") == len(events)
    assert now.told("interview_pack_events_sum") == len(starts) + len(mixture) + 1
    assert now.told("interview_worker_packs_total") == now.told("interview_pack_events_count")
    for rpc in RPCS:
        calls = {status: now.told("interview_rpc_seconds_count", rpc=rpc, status=status) or 0 for status in STATUSES}
        assert (calls.pop("ok") > 0, set(calls.values())) == (True, {0})
    for name in ("entries", "claimed", "oldest_seconds"):
        assert now.told(f"interview_stream_{name}") == 0
    for name in ("interview_messages_queued", "interview_hold", "interview_worker_stalled"):
        assert now.told(name) == 0
    assert now.told("interview_redis_up") == 1
    assert then.told("interview_ledger_waiting_events") == waiting >= len(early)

    assert {name for name, _ in then.samples} == SAMPLES
    assert strict == {name.removesuffix("_total") for name in HELP}
    assert set(then.helps.values()) == set(HELP.values())
    values = {label: set[str]() for label in ("reason", "rpc", "status", "le")}
    for _, labels in then.samples:
        for label, value in labels:
            values[label].add(value)
    assert (values["reason"], values["rpc"], values["status"]) == (set(REASONS), set(RPCS), set(STATUSES))
    assert leaks.in_text(then.text) == []
    assert not re.search(r"[0-9a-f]{8}-|session-|early-|nobody-", re.sub("(?m)^#.*$", "", then.text))
    assert list(folder.iterdir()) == []  # the worker leaves nothing
    assert_rows_equal_their_stories(database, events)


def test_the_gauges_tell_of_an_outage_of_supabase_and_of_one_of_redis(
    workers: Workers, stack: Stack, database: Database, user: uuid.UUID, rng: random.Random, port: int
) -> None:
    events = crowd(user, rng, events=100)
    with workers.running(INTERVIEW_METRICS_PORT=str(port)) as worker:
        stack.postgrest.stop()
        workers.stream.add(encoded(events))
        wait_until(lambda: scrape(port).told("interview_hold") == 1, "the hold is told")
        held = scrape(port)
        stack.postgrest.start()
        workers.wait_until_empty()
        wait_until(lambda: scrape(port).told("interview_hold") == 0, "the end of the hold is told")

        stack.redis.stop()
        began = time.monotonic()
        away = scrape(port)
        took = time.monotonic() - began
        stack.redis.start()
        wait_until(lambda: scrape(port).told("interview_redis_up") == 1, "Redis' return is told")
        assert workers.stop(worker) == 0

    assert held.told("interview_stream_entries") == 100
    assert 0 < (held.told("interview_stream_claimed") or 0) <= 100
    assert (held.told("interview_rpc_seconds_count", rpc=RPCS[0], status="unavailable") or 0) > 0
    assert held.told("interview_dead_letters_open") is None  # never known yet

    assert away.told("interview_redis_up") == 0
    assert handled(away) == 100
    assert away.told("interview_worker_stalled") == 0
    absent = {name for name in HELP if name.startswith("interview_stream_")} | {
        "interview_hold",
        "interview_messages_queued",
    }
    assert not absent & {name for name, _ in away.samples}
    assert took < 5
    assert_rows_equal_their_stories(database, events)


def test_counters_go_on_where_processes_are_killed_and_work_goes_on_without_them(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random, port: int, folder: Path
) -> None:
    def renew() -> None:
        """Kill the pool's processes, and wait for others."""
        old = {each.pid for each in psutil.Process(worker.pid).children()}
        for pid in old:
            psutil.Process(pid).kill()
        wait_until(lambda: len(pool() - old) == len(old), "the pool is whole again")

    def pool() -> set[int]:
        return {
            each.pid
            for each in psutil.Process(worker.pid).children()
            if each.is_running() and each.status() != psutil.STATUS_ZOMBIE
        }

    def listened(pid: int) -> set[int]:
        return {each.laddr.port for each in psutil.Process(pid).net_connections() if not each.raddr}

    events = crowd(user, rng, events=900)
    raw = encoded(events)
    rounds = [raw[:300], raw[300:600], raw[600:]]
    with workers.running(INTERVIEW_METRICS_PORT=str(port), TMPDIR=str(folder)) as worker:
        for number, batch in enumerate(rounds[:2], 1):
            workers.stream.add(batch)
            workers.wait_until_empty()
            assert handled(scrape(port)) == 300 * number
            renew()
            wait_until(lambda: not any(port in listened(pid) for pid in pool()), "the pool lets go of the port")

        (counts,) = folder.glob("interview-metrics-*")
        shutil.rmtree(counts)  # as somebody who tidies up the temporary folder
        renew()
        workers.stream.add(rounds[2])
        workers.wait_until_empty()
        assert scrape(port).told("interview_stream_entries") == 0
        assert workers.stop(worker) == 0
    assert workers.logged("metrics.off")
    assert_rows_equal_their_stories(database, events)


def handled(now: Scrape) -> float:
    return sum(now.told(f"interview_events_{what}_total") or 0 for what in ("applied", "waiting"))


def test_a_worker_whose_port_is_in_use_works_all_the_same(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    events = crowd(user, rng, events=100)
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        with workers.running(INTERVIEW_METRICS_PORT=str(port)) as worker:
            workers.stream.add(encoded(events))
            workers.wait_until_empty()
            assert workers.stop(worker) == 0
    (told,) = workers.logged("metrics.not_served")
    assert (told["port"], told["level"]) == (port, "warning")
    assert_rows_equal_their_stories(database, events)


# -------------------------------------------------------------------------------------------- in a process of its own


def counted(*lines: str) -> Scrape:
    """What a fresh process tells that was set up, then did this."""
    code = """
import os
from datetime import UTC, datetime, timedelta
from worker import metrics
from worker.errors import Misconfigured, RefusedCall, Unavailable
metrics.set_up(["poison"])
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
{}
registry = CollectorRegistry()
MultiProcessCollector(registry, metrics.folder())
print(generate_latest(registry).decode())
"""
    done = subprocess.run(
        [sys.executable, "-c", code.format("\n".join(lines))], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return read(done.stdout)


def test_how_a_call_ends_is_its_status() -> None:
    now = counted(
        "for error in (None, Unavailable('x'), Misconfigured('x', remedy='y'), RefusedCall('x')):",
        "    try:",
        "        with metrics.timed_rpc('apply_interview_events_summary'):",
        "            if error: raise error",
        "    except (Unavailable, RefusedCall) as raised:",
        "        assert raised is error",
    )
    for status in STATUSES:
        assert now.told("interview_rpc_seconds_count", rpc="apply_interview_events_summary", status=status) == 1
        assert now.told("interview_rpc_seconds_count", rpc="record_dead_interview_events", status=status) == 0


def test_an_engine_whose_clock_is_ahead_makes_no_lag_below_zero() -> None:
    now = counted("metrics.count_lag(datetime.now(UTC) + timedelta(hours=n) for n in (1, 2))")
    assert (now.told("interview_event_lag_seconds_sum"), now.told("interview_event_lag_seconds_count")) == (0, 2)


def test_the_counts_of_a_process_that_is_killed_stay(tmp_path: Path) -> None:
    now = counted(
        "for _ in range(3):",
        "    if not (child := os.fork()):",
        "        metrics.begin_process()",
        "        metrics.count_outcomes({'applied': 2, 'poison': 1})",
        "        os.kill(os.getpid(), 9)",
        "    os.waitpid(child, 0)",
    )
    assert now.told("interview_events_applied_total") == 6
    assert now.told("interview_events_dead_lettered_total", reason="poison") == 3


def test_on_a_full_disk_nothing_is_counted_and_nothing_is_hurt() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    said = done.stdout.splitlines()
    assert (done.returncode, said[-1]) == (0, "None"), done.stderr
    assert [line for line in said if "metrics.off" in line] == said[:-1] != []


FULL_DISK = """
import shutil
from collections import namedtuple
from unittest.mock import patch
from worker import metrics

with patch.object(shutil, "disk_usage", return_value=namedtuple("Usage", "free")(4096)):
    metrics.set_up(["poison"])
metrics.begin_process()
metrics.count_outcomes({"applied": 1, "poison": 1})
print(metrics.folder())
"""


def test_a_process_forked_while_supabase_is_asked_waits_for_nothing(stack: Stack) -> None:
    """It once did: for a lock of the client's, held by a thread of the process that it was forked from."""
    done = subprocess.run(
        [sys.executable, "-c", FORKED],
        cwd=ROOT,
        env={**os.environ, **stack.environment, "INTERVIEW_METRICS_PORT": str(free_port())},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "exit status 0, loaded late: []"), done.stderr


FORKED = """
import os, signal, sys, time, urllib.request
from worker import database, metrics, scrape
from worker.settings import load_settings

create_client = database.create_client

def slowly(*arguments):
    time.sleep(1)
    return create_client(*arguments)

database.create_client = slowly
settings = load_settings()
metrics.set_up(["poison"])
endpoint = scrape.serve(settings, "interview", dict)
url = f"http://127.0.0.1:{settings.metrics_port}"
loaded = set(sys.modules)
urllib.request.urlopen(url).read()  # a thread begins to ask

if not (child := os.fork()):
    signal.alarm(10)  # ends it, should it wait
    database.Database(settings).count_waiting()
    os._exit(0)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
while b"interview_ledger_waiting_events " not in urllib.request.urlopen(url).read():
    time.sleep(0.05)
print(f"exit status {status}, loaded late: {sorted(set(sys.modules) - loaded)}")
"""


def test_without_a_port_nothing_is_loaded_made_or_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = "worker.metrics, worker.scrape, worker.supervisor.bootstep, worker.apply.tasks"
    loaded = subprocess.run(
        [sys.executable, "-c", f"import sys, {modules}; print('prometheus_client' in sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout == "False\n"

    def times() -> Iterator[Any]:
        pytest.fail("looked at")
        yield

    metrics.count_lag(times())
    metrics.count_outcomes({"applied": 1})
    assert metrics.folder() is None


# --------------------------------------------------------------------------------------------- alerts and dashboard


def test_every_metric_asks_an_operators_question() -> None:
    assert [name for name, question in HELP.items() if not re.fullmatch(r"[A-Z].+\?", question)] == []
    assert len(set(HELP.values())) == len(HELP)


ALERTS_FORM = {
    "type": "object",
    "required": ["groups"],
    "additionalProperties": False,
    "properties": {
        "groups": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "rules"],
                "additionalProperties": False,
                "properties": {
                    "name": {"type": "string"},
                    "rules": {"type": "array", "items": {"$ref": "#/$defs/rule"}},
                },
            },
        }
    },
    "$defs": {
        "rule": {
            "type": "object",
            "required": ["alert", "expr", "labels", "annotations"],
            "additionalProperties": False,
            "properties": {
                "alert": {"type": "string", "pattern": "^Interview[A-Za-z]+$"},
                "expr": {"type": "string"},
                "for": {"type": "string", "pattern": "^([0-9]+(s|m|h|d))+$"},
                "labels": {
                    "type": "object",
                    "required": ["severity"],
                    "additionalProperties": False,
                    "properties": {"severity": {"enum": ["page", "ticket"]}},
                },
                "annotations": {
                    "type": "object",
                    "required": ["summary", "description", "next", "runbook"],
                    "additionalProperties": False,
                    "patternProperties": {".": {"type": "string", "minLength": 1}},
                    "properties": dict.fromkeys(("summary", "description", "next", "runbook"), True),
                },
            },
        }
    },
}
RULES = {rule["alert"]: rule for group in ALERTS["groups"] for rule in group["rules"]}
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = {
    **{name: rule["expr"] for name, rule in RULES.items()},
    **{f"{panel['title']} {each['refId']}": each["expr"] for panel in PANELS for each in panel["targets"]},
}
# What our queries are made of, besides metrics, numbers and durations.
PROMQL = {"sum", "max", "min", "by", "rate", "increase", "histogram_quantile", "absent", "offset"}
LABELS = {"job", "instance", "le", "reason", "rpc", "status"}


def test_the_alerts_have_the_form_that_prometheus_wants() -> None:
    found = jsonschema.Draft202012Validator(ALERTS_FORM).iter_errors(ALERTS)
    assert [f"{each.json_path}: {each.message}" for each in found] == []
    assert len(RULES) == sum(len(group["rules"]) for group in ALERTS["groups"])  # no name twice


def pairs(text: str) -> str:
    """What stays of a text's brackets when each pair is taken out."""
    brackets = re.sub(r"[^()\[\]{}]", "", text)
    while (fewer := re.sub(r"\(\)|\[\]|\{\}", "", brackets)) != brackets:
        brackets = fewer
    return brackets


@pytest.mark.parametrize("where", QUERIES)
def test_a_query_is_made_of_what_there_is(where: str) -> None:
    query = QUERIES[where]
    assert pairs(query) == ""
    words = set(re.findall(r"(?<![$\w])[a-z_]+", re.sub(r'"[^"]*"|\[[^]]*\]|offset \w+', "", query)))
    assert words - PROMQL - LABELS - SAMPLES <= {"up"}
    for function in ("rate", "increase"):  # of counters only, and never of a sum of them
        for inside in re.findall(rf"\b{function}\(([^)]*)\)", query):
            assert re.fullmatch(r"interview_[a-z_]+(_total|_bucket|_sum|_count)\[(\d+m|\$__rate_interval)\]", inside)


def test_every_metric_named_exists_and_every_metric_is_on_the_dashboard() -> None:
    named = set(re.findall("interview_[a-z_]+", ALERTS_TEXT + DASHBOARD_TEXT))
    assert named <= SAMPLES
    shown = {re.sub("_(bucket|sum|count)$", "", name) for name in re.findall("interview_[a-z_]+", DASHBOARD_TEXT)}
    assert HELP.keys() <= shown


@pytest.mark.parametrize("name", RULES)
def test_an_alert_says_what_it_means_and_what_comes_next(name: str) -> None:
    rule = RULES[name]
    told = rule["annotations"]
    file, _, anchor = told["runbook"].partition("#")
    headings = re.findall(r"^#+ (.*)$", (ROOT / file).read_text(), re.MULTILINE)
    assert anchor in [re.sub(r"\W+", "-", heading.lower()) for heading in headings]
    commands = re.findall(r"interviews ((?:dlq )?[a-z]+)", told["next"])
    assert commands
    for command in commands:
        group: Any = interviews
        for word in command.split():
            group = group.commands[word]
    for text in told.values():
        assert pairs(text) == ""
        for label in re.findall(r"\$labels\.(\w+)", text):
            by = re.search(r"by \(([^)]*)\)", rule["expr"])
            assert label in (by[1].split(", ") if by else ["instance", "job"])


def test_the_dashboard_is_readable() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    cells: list[tuple[int, int]] = []
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells += [(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])]
    assert len(set(cells)) == len(cells)  # no panel lies on another
    assert max(x for x, _ in cells) < 24
    assert len({panel["title"] for panel in PANELS}) == len(PANELS) - 1  # "Oldest event": now, and over time
    (source,) = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    for panel in PANELS:
        assert re.search(r"[?.]$", panel["description"].rstrip(")")), panel["title"]
        for each in [panel, *panel["targets"]]:
            assert each["datasource"] == {"type": "prometheus", "uid": source["uid"]}


def test_prometheus_reads_the_alerts_of_the_job_that_they_name() -> None:
    said = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert said["rule_files"] == ["alerts.yml"]
    jobs = {each["job_name"] for each in said["scrape_configs"]}
    assert set(re.findall(r'job=\\?"(\w+)', ALERTS_TEXT + DASHBOARD_TEXT)) <= jobs
