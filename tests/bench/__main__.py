"""`make bench`: our worker beside naive tasks, or beside another commit's, in one run on one machine, as ratios.

    python -m tests.bench [--part rates]... [--rounds 5] [--events 50000] [--naive-events 2000] [--json bench.json]
    python -m tests.bench --against REV [--part rates|latency|idle|many]... [--rounds 5] [--events 50000]

Rates come from a backlog unless they say otherwise; an event counts when it has left the stream, after its commit. Each
is the median of the rounds, and in a round each is measured once, so that a machine's slow minute hits all alike. The
load goes to 127.0.0.1 and stops by itself. With --against nothing but this checkout and the other commit is measured;
see against.py.
"""

import json
import os
import signal
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console

from tests.bench import against, checkout, tables
from tests.bench.bench import Bench, Run
from tests.bench.growth import grow, pack_cost, results, spread_milliseconds
from tests.bench.side import other_checkout, this_checkout
from tests.stories import encoded
from worker.embedded import StackError

PARTS: Final = ("rates", "latency", "idle", "many", "choices", "growth", "ledgers")
NAIVE: Final = {
    "naive Celery, prefork: one task, one RPC per event": {"pool": "prefork", "concurrency": 2},
    "naive Celery, 8 threads": {"pool": "threads", "concurrency": 8},
}
DRAMATIQ: Final = "naive dramatiq, 2 processes of 4 threads"
CHOICES: Final[dict[str, dict[str, str]]] = {
    "as it comes: prefork, 3 packs at once, 1,000 events each": {},
    "2 packs at once": {"INTERVIEW_CONCURRENCY": "2"},
    "4 packs at once": {"INTERVIEW_CONCURRENCY": "4"},
    "200 events each": {"INTERVIEW_PACK_SIZE": "200"},
    "500 events each": {"INTERVIEW_PACK_SIZE": "500"},
    "threads": {"INTERVIEW_POOL": "threads"},
}
LATENCY_RATES: Final = (1, 100, 1000)  # events per second
BACKLOGS: Final = (10_000, 100_000, 1_000_000, 2_000_000)
LEDGERS: Final = (10_000, 1_000_000, 5_000_000)
SESSIONS: Final = (1, 10, 50, 500)  # of one pack
FEEDBACK_KIBIBYTES: Final = (1, 10, 50, 200)
FEEDBACK_MEBIBYTES: Final = 64  # in all
WARM_UP: Final = 10_000  # events


@click.command()
@click.option("--part", "parts", type=click.Choice(PARTS), multiple=True, help="What to measure; all that there is.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--events", type=int, default=50_000, show_default=True, help="Events of our worker's backlog.")
@click.option("--naive-events", type=int, default=2_000, show_default=True, help="Events of the naive tasks'.")
@click.option("--json", "file", type=click.Path(path_type=Path), default=Path("bench.json"), show_default=True)
@click.option("--chart", type=click.Path(path_type=Path), help="Draw the rates in this SVG file.")
@click.option("--against", "revision", metavar="REV", help="Compare with this commit, built in .bench/.")
def main(
    parts: Sequence[str],
    rounds: int,
    events: int,
    naive_events: int,
    file: Path,
    chart: Path | None,
    revision: str | None,
) -> None:
    """Measure, print tables, write them as JSON."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the servers at SIGTERM as at Ctrl-C
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = tables.FILE_WIDTH
    try:
        if revision is None:
            report = _measure(console, parts or PARTS, rounds, events, naive_events, chart)
        else:
            report = _compare(console, revision, parts or against.PARTS, rounds, events)
    except StackError as error:
        raise click.ClickException(str(error)) from error
    file.write_text(json.dumps(report, indent=2) + "\n")


def _measure(
    console: Console, parts: Sequence[str], rounds: int, events: int, naive_events: int, chart: Path | None
) -> dict[str, Any]:
    measures: dict[str, Callable[[Bench], Any]] = {
        "rates": lambda bench: _rates(console, bench, rounds, events, naive_events, chart),
        "latency": lambda bench: _latency(console, bench),
        "idle": lambda bench: _idle(console, bench),
        "many": lambda bench: _many(console, bench),
        "choices": lambda bench: _choices(console, bench, rounds, events),
        "growth": lambda bench: _growth(console, bench),
        "ledgers": lambda bench: _ledgers(console, bench),
    }
    report: dict[str, Any] = {}
    for stack_of in (PARTS[:-1], PARTS[-1:]):  # a ledger grows in a database of its own
        wanted = [part for part in stack_of if part in parts]
        if wanted:
            with tempfile.TemporaryDirectory() as folder, _our_bench(Path(folder)) as bench:
                report |= {part: measures[part](bench) for part in wanted}
    return report


def _compare(console: Console, revision: str, parts: Sequence[str], rounds: int, events: int) -> dict[str, Any]:
    """The parts on both sides, whose servers all run from the first to the last; one side at a time has work."""
    if others := set(parts) - set(against.PARTS):
        raise click.UsageError(f"--against compares {', '.join(against.PARTS)}; not {', '.join(sorted(others))}")
    commit = checkout.find_commit(revision)
    root = checkout.build(commit, console)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o711)  # as root Postgres runs as another user, who must get to its data
        with (
            _our_bench(folder / "ours") as ours,
            other_checkout(root, commit, folder / "theirs") as side,
            closing(Bench(side, folder / "theirs")) as theirs,
        ):
            wanted = [part for part in against.PARTS if part in parts]
            with console.status("warming up"):
                ours.warm_up(WARM_UP)
                theirs.warm_up(WARM_UP)
            figures = {
                part: against.compare(console, ours, theirs, part, rounds=rounds, events=events) for part in wanted
            }
    return {"against": commit, **figures}


@contextmanager
def _our_bench(folder: Path) -> Iterator[Bench]:
    folder.mkdir(exist_ok=True)
    with this_checkout(folder / "stack") as side:
        os.environ.update(side.environment)  # the naive tasks read it
        with closing(Bench(side, folder)) as bench:
            yield bench


def _rates(
    console: Console, bench: Bench, rounds: int, events: int, naive_events: int, chart: Path | None
) -> dict[str, Any]:
    measures: dict[str, Callable[[], float]] = {
        name: lambda options=options: bench.naive_celery(naive_events, **options)  # type: ignore[misc]
        for name, options in NAIVE.items()
    }
    measures |= {
        DRAMATIQ: lambda: bench.naive_dramatiq(naive_events, processes=2, threads=4),
        tables.LIMIT: lambda: bench.limit(events),
        "our worker": lambda: bench.backlog(events).events_per_second,
        "our worker, with two live publishers": lambda: bench.live(events),
        "our workers, two on the same cores": lambda: bench.backlog(events, workers=2).events_per_second,
        "our workers, four on the same cores": lambda: bench.backlog(events, workers=4).events_per_second,
        "publish_many, 500 in a call": lambda: bench.publish(events, at_once=500),
        "publish, one by one": lambda: bench.publish(events // 10, at_once=1),
        "publish_many of AsyncPublisher": lambda: bench.publish_async(events, at_once=500),
        "publish of AsyncPublisher": lambda: bench.publish_async(events // 10, at_once=1),
    }
    told = _rounds(console, measures, rounds)
    medians = told["events per second"]
    tables.print_rates(console, medians, [*NAIVE])
    if chart is not None:
        tables.draw_rates(chart, medians, f"{os.cpu_count()} cores for all, servers included")
    return told


def _choices(console: Console, bench: Bench, rounds: int, events: int) -> dict[str, Any]:
    """Our worker's defaults beside what else they could be."""
    measures: dict[str, Callable[[], float]] = {
        name: lambda settings=settings: bench.backlog(events, **settings).events_per_second  # type: ignore[misc]
        for name, settings in CHOICES.items()
    }
    told = _rounds(console, measures, rounds)
    tables.print_costs(console, "our worker, events/s", told["events per second"])
    return told


def _rounds(console: Console, measures: dict[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """Each measure once a round; the medians, and all of them."""
    rates: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(rounds):
        for name, measure in measures.items():
            with console.status(f"round {number + 1} of {rounds}: {name}"):
                rates[name].append(measure())
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {"events per second": medians, "rounds": rates}


def _latency(console: Console, bench: Bench) -> dict[int, list[float]]:
    latency = {}
    for rate in LATENCY_RATES:
        with console.status(f"latency at {rate} events/s"):
            latency[rate] = bench.latency(min(5000, max(30, rate * 20)), rate=rate)
    tables.print_latency(console, latency)
    return latency


def _idle(console: Console, bench: Bench) -> dict[str, float]:
    with console.status("an idle worker, for a minute"):
        idle = bench.idle(60)
    tables.print_costs(console, "an idle worker", idle)
    return idle


def _many(console: Console, bench: Bench) -> dict[str, float]:
    with console.status(f"{against.MANY_WORKERS} workers, an event a second"):
        costs = bench.many(against.MANY_WORKERS, against.MANY_SECONDS)
    tables.print_costs(console, f"{against.MANY_WORKERS} workers, an event a second", costs)
    return costs


def _growth(console: Console, bench: Bench) -> dict[str, Any]:
    """What becomes slower, or larger, as something grows."""
    backlogs: dict[int, Run] = {}
    for size in BACKLOGS:
        with console.status(f"a backlog of {size:,}"):
            backlogs[size] = bench.backlog(size)
    header = ["events in the backlog", "events/s", "worker's MiB: first twentieth", "peak", "last twentieth"]
    rows = {
        size: [run.events_per_second, run.memory_mebibytes[0], max(run.memory_mebibytes), run.memory_mebibytes[-1]]
        for size, run in backlogs.items()
    }
    tables.print_growth(console, header, rows)
    million = backlogs[1_000_000]
    tables.print_costs(console, "CPU seconds per million events", million.cpu_seconds_per_million)
    tables.print_costs(console, "an event that waits", {"bytes of Redis' memory": million.waiting_bytes})

    feedback = {}
    for size in FEEDBACK_KIBIBYTES:
        with console.status(f"feedback of {size} KiB"):
            count = min(20_000, (FEEDBACK_MEBIBYTES << 10) // size)
            rate = bench.rate_of(encoded(results(bench.database, bench.rng, feedback_kibibytes=size, count=count)))
            feedback[size] = [rate, rate * size / 1024]
    tables.print_growth(console, ["KiB of feedback", "finishes/s", "MiB/s"], feedback)

    spread = {}
    for size in SESSIONS:
        with console.status(f"{size} sessions in a pack"):
            spread[size] = [spread_milliseconds(bench.database, sessions=size)]
    tables.print_growth(console, ["sessions in a pack of 500", "ms per pack"], spread)

    return {
        "backlogs": {size: vars(run) for size, run in backlogs.items()},
        "feedback_kibibytes: finishes per second, mebibytes per second": feedback,
        "sessions in a pack: milliseconds": spread,
    }


def _ledgers(console: Console, bench: Bench) -> dict[int, list[float]]:
    database, ledgers = bench.database, {}
    for size in LEDGERS:
        with console.status(f"a ledger of {size:,} rows"):
            grow(database, ledger_rows=size)
            ledgers[size] = [*pack_cost(database, ordered_ids=True), *pack_cost(database, ordered_ids=False)]
    header = ["ledger rows", "ms per pack of 500", "WAL bytes per event", "with random ids: ms", "WAL bytes"]
    tables.print_growth(console, header, ledgers)
    return ledgers


if __name__ == "__main__":
    main()
