"""`make bench --against`: what it reads, what it refuses, and the table that it prints."""

import io
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import click
import pytest
from rich.console import Console

from tests.bench import checkout, tables
from tests.bench.bench import Bench
from tests.bench.comparison import Comparison
from tests.bench.costs import WORKER, cpu_seconds, find_servers
from tests.bench.side import other_checkout, printed_settings, this_checkout
from worker.embedded import Stack

PRINTED = """# running, data in /tmp/some where; Ctrl-C stops it. In another terminal:
#   . .interviews/env && celery -A worker worker
export REDIS_URL=redis://:pass@127.0.0.1:1/0
export SUPABASE_URL=http://127.0.0.1:2
export SUPABASE_REST_URL=http://127.0.0.1:2
export SUPABASE_SECRET_KEY='a key=with "marks"'
export DATABASE_URL=postgresql://postgres:pass@127.0.0.1:3/postgres
"""


def test_the_settings_that_up_prints_are_read() -> None:
    assert printed_settings(PRINTED) == {
        "REDIS_URL": "redis://:pass@127.0.0.1:1/0",
        "SUPABASE_URL": "http://127.0.0.1:2",
        "SUPABASE_REST_URL": "http://127.0.0.1:2",
        "SUPABASE_SECRET_KEY": 'a key=with "marks"',
        "DATABASE_URL": "postgresql://postgres:pass@127.0.0.1:3/postgres",
    }


@pytest.mark.parametrize(
    "printed", ["", PRINTED[: PRINTED.index("export DATABASE")], PRINTED.rstrip("\n"), "an error\n"]
)
def test_settings_are_read_only_when_all_are_printed(printed: str) -> None:
    assert printed_settings(printed) is None


def test_up_of_a_checkout_starts_its_servers_and_stops_them(tmp_path: Path) -> None:
    """As another commit's, with our own `interviews up`."""
    commit = "0123456789abcdef"
    with other_checkout(checkout.ROOT, commit, tmp_path / "theirs") as side:
        assert side.name == commit[: checkout.SHORT]
        assert side.servers.keys() == {"Redis", "PostgREST", "Postgres"}
        assert len(set(side.servers.values())) == 3
        assert Stack.running(tmp_path / "theirs" / "data") == side.environment
    assert Stack.running(tmp_path / "theirs" / "data") is None


def test_the_servers_of_a_stack_are_found_by_their_ports(stack: Stack) -> None:
    started = {"Redis": stack.redis, "PostgREST": stack.postgrest, "Postgres": stack.postgres}
    expected = {name: server.process.pid for name, server in started.items() if server.process is not None}
    assert find_servers(stack.environment, os.getpid()) == expected


def test_a_server_that_is_not_there_is_an_error(stack: Stack) -> None:
    elsewhere = stack.environment | {"REDIS_URL": "redis://127.0.0.1:1/0"}
    with pytest.raises(click.ClickException, match="listens on the port of Redis"):
        find_servers(elsewhere, os.getpid())


def test_cpu_is_counted_for_each_process_of_all_workers(stack: Stack) -> None:
    servers = find_servers(stack.environment, os.getpid())
    counted = cpu_seconds(servers, [os.getpid()])
    assert counted.keys() == {*WORKER, *servers}
    assert counted["Postgres"] > 0


def test_a_wrong_revision_is_one_line_and_status_2() -> None:
    """The line names it; nothing is built or started."""
    before = sorted(checkout.CACHE.glob("*"))
    ended = _bench("--against", "no-such-revision")
    assert ended.returncode == 2
    assert ended.stderr == "Error: --against no-such-revision: git knows no such commit here\n"
    assert sorted(checkout.CACHE.glob("*")) == before


def test_an_option_is_no_revision() -> None:
    assert _bench("--against=--all").returncode == 2


def test_a_part_that_is_not_compared_is_refused() -> None:
    ended = _bench("--against", "HEAD", "--part", "growth", "--part", "idle")
    assert ended.returncode == 2
    assert "--against compares rates, latency, idle, many; not growth" in ended.stderr


def _bench(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.bench", *options]
    return subprocess.run(command, cwd=checkout.ROOT, capture_output=True, text=True, check=False)


def test_head_is_a_commit() -> None:
    assert re.fullmatch(r"[0-9a-f]{40}", checkout.find_commit("HEAD"))


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose `make setup` notes that it ran; the bench takes it for its own."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "Makefile").write_text("setup:\n\techo again >> set-up\n")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *arguments], check=True)
    monkeypatch.setattr(checkout, "ROOT", folder)
    return folder


def test_a_commit_is_built_once_and_used_again(repository: Path, tmp_path: Path) -> None:
    """Its own `make setup` runs each time, and leaves alone what is up to date."""
    commit, cache = checkout.find_commit("HEAD"), tmp_path / "cache"
    folders = {checkout.build(commit, _silent(), cache=cache) for _ in range(2)}
    assert folders == {cache / commit[: checkout.SHORT]}
    assert (folders.pop() / "set-up").read_text() == "again\nagain\n"


def test_a_build_that_was_deleted_is_built_again(repository: Path, tmp_path: Path) -> None:
    commit, cache = checkout.find_commit("HEAD"), tmp_path / "cache"
    folder = checkout.build(commit, _silent(), cache=cache)
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    assert (checkout.build(commit, _silent(), cache=cache) / "Makefile").exists()


def test_a_build_that_somebody_changed_is_refused(repository: Path, tmp_path: Path) -> None:
    """And is left as it is."""
    commit, cache = checkout.find_commit("HEAD"), tmp_path / "cache"
    makefile = checkout.build(commit, _silent(), cache=cache) / "Makefile"
    makefile.write_text("setup:\n\ttrue\n")
    with pytest.raises(click.ClickException, match=r"is not what .* is, so nothing was measured: git worktree remove"):
        checkout.build(commit, _silent(), cache=cache)
    assert makefile.read_text() == "setup:\n\ttrue\n"


def test_a_setup_that_fails_is_one_line_with_its_log(repository: Path, tmp_path: Path) -> None:
    (repository / "Makefile").write_text("setup:\n\t@echo what is wrong; false\n")
    git = ["git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    subprocess.run([*git, "commit", "-q", "-a", "-m", "two"], check=True)
    with pytest.raises(click.ClickException) as raised:
        checkout.build(checkout.find_commit("HEAD"), _silent(), cache=tmp_path / "cache")
    assert re.fullmatch(r"make setup failed: make: .* Error 1 \(see .*\.log\)", raised.value.message)


def _silent() -> Console:
    return Console(file=io.StringIO())


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """A bench with a stack of its own, in which nothing is dead."""
    with this_checkout(tmp_path / "stack") as side, closing(Bench(side, tmp_path)) as bench:
        for name, value in side.environment.items():
            monkeypatch.setenv(name, value)
        yield bench


def test_real_workers_are_measured(bench: Bench) -> None:
    """Of the figures only that they are there."""
    run = bench.backlog(2_000, workers=2)
    assert run.events_per_second > 0
    assert all(spent >= 0 for spent in run.cpu_seconds_per_million.values())
    assert bench.database.one("select count(*) as n from public.interview_events")["n"] == 2_010  # 10 to be ready
    assert bench.limit(2_000) > 0
    assert len(bench.latency(20, rate=100)) == 3


def test_events_that_are_rejected_are_no_rate(bench: Bench) -> None:
    bench.user = uuid.uuid4()  # whom the database does not know
    with pytest.raises(click.ClickException, match=r"events were dead-lettered: unknown_user"):
        bench.backlog(20)
    with pytest.raises(click.ClickException, match="a bare client of the batch RPC failed"):
        bench.limit(2_000)


@pytest.fixture
def comparison() -> Comparison:
    made = Comparison(("this checkout", "abc"))
    for ours, theirs in ((1500.0, 1000.0), (2000.0, 1000.0), (1000.0, 2000.0)):
        made.add({"events/s": ours, "dead": 1.0}, {"events/s": theirs, "dead": 0.0})
    return made


def test_the_table_shows_medians_their_ratio_and_its_span(comparison: Comparison) -> None:
    output = io.StringIO()
    tables.print_comparison(Console(file=output, width=100), "rates", comparison)
    header, *rows = [re.split(r" {2,}", line.strip()) for line in output.getvalue().splitlines()]
    assert header == ["rates", "this checkout", "abc", "ratio", "least to most"]
    assert rows == [["events/s", "1,500", "1,000", "1.50", "0.50 to 2.00"], ["dead", "1.00", "0.00", "-"]]


def test_a_share_is_of_its_own_side(comparison: Comparison) -> None:
    comparison.add_share("share", of="dead", whole="events/s")
    assert comparison.rounds["share"] == [(100 / 1500, 0.0)]


def test_a_comparison_as_json_keeps_every_round(comparison: Comparison) -> None:
    assert comparison.as_json()["events/s"] == {
        "medians": {"this checkout": 1500.0, "abc": 1000.0},
        "ratio": 1.5,
        "rounds": [(1500.0, 1000.0), (2000.0, 1000.0), (1000.0, 2000.0)],
    }
    assert comparison.as_json()["dead"]["ratio"] is None
