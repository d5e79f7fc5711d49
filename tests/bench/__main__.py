"""`make bench`: our worker beside a naive Celery task, in one run on one machine, as ratios.

    python -m tests.bench [--events 50000] [--naive-events 2000] [--rounds 3] [--ledger 10000]... [--json bench.json]

Every figure is the median of the rounds. The load goes to 127.0.0.1 and stops by itself.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import psycopg
from psycopg.rows import dict_row
from rich.console import Console
from rich.table import Table

from events import Publisher, parse_event
from tests.bench.growth import grow, pack_milliseconds
from tests.database import Database
from tests.stories import chunks, crowd, encoded
from worker.demo import running_worker
from worker.embedded import Stack
from worker.settings import load_settings
from worker.stream import EventStream, connect

PATIENCE_SECONDS = 600.0


class Bench:
    """The stack, a user, and a stopwatch."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self.stack = stack
        self.folder = folder
        self.database = Database(psycopg.connect(stack.database_url, autocommit=True, row_factory=dict_row))
        self.user = self.database.create_user()
        self.rng = random.Random(1)
        settings = load_settings()
        self.client: Any = connect(settings)
        self.stream = EventStream(self.client, settings.stream)

    def events(self, count: int) -> list[dict[str, Any]]:
        return crowd(self.user, self.rng, events=count)

    def publish_many(self, count: int) -> float:
        """Events per second into the stream, from one process, hundreds in a round trip."""
        events = [parse_event(raw) for raw in encoded(self.events(count))]
        with Publisher() as publisher:
            began = time.monotonic()
            publisher.publish_many(events)
            rate = count / (time.monotonic() - began)
        self.client.delete(self.stream.key)
        return rate

    def publish_single(self, count: int) -> float:
        """Events per second into the stream, from one process, each confirmed before the next."""
        events = [parse_event(raw) for raw in encoded(self.events(count))]
        with Publisher() as publisher:
            began = time.monotonic()
            for event in events:
                publisher.publish(event)
            rate = count / (time.monotonic() - began)
        self.client.delete(self.stream.key)
        return rate

    def backlog(self, count: int) -> float:
        """Events per second applied by one worker from a backlog, first commit to last."""
        for chunk in chunks(encoded(self.events(count)), 1000):
            self.stream.add(chunk)
        before = self._ledger()
        with running_worker(self.stack.environment, self.folder / "worker.log"):
            return self._rate(lambda: self._ledger() - before, count)

    def naive(self, count: int) -> float:
        """Events per second of the naive task from a backlog, in order, so that it makes no error."""
        from tests.bench import naive  # reads the environment

        for event in self.events(count):
            naive.apply_event.delay(event)
        with self._naive_worker():
            left = self.client.llen("naive")
            began, began_left = 0.0, left
            while left:
                left = self.client.llen("naive")
                if began == 0.0 and left < count:
                    began, began_left = time.monotonic(), left
                time.sleep(0.02)
            return float(began_left) / (time.monotonic() - began)

    @contextmanager
    def _naive_worker(self) -> Iterator[None]:
        worker = subprocess.Popen(
            [str(Path(sys.executable).parent / "celery"), "-A", "tests.bench.naive", "worker", "-l", "ERROR"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield
        finally:
            worker.terminate()
            worker.wait()

    def _rate(self, done: Callable[[], int], count: int) -> float:
        deadline = time.monotonic() + PATIENCE_SECONDS
        first, began = 0, 0.0
        while (now := done()) < count:
            if now and not first:
                first, began = now, time.monotonic()
            if time.monotonic() > deadline:
                raise click.ClickException(f"{now} of {count} events after {PATIENCE_SECONDS:.0f} s")
            time.sleep(0.02)
        return (count - first) / (time.monotonic() - began)

    def _ledger(self) -> int:
        return int(self.database.one("select count(*) as n from public.interview_events")["n"])


@click.command()
@click.option("--events", type=int, default=50_000, show_default=True, help="Events of our worker's backlog.")
@click.option("--naive-events", type=int, default=2_000, show_default=True, help="Events of the naive task's.")
@click.option("--rounds", type=int, default=3, show_default=True)
@click.option(
    "--ledger",
    "sizes",
    type=int,
    multiple=True,
    default=(10_000, 1_000_000, 5_000_000),
    show_default=True,
    help="Ledger rows at which a pack of 200 is timed; 0 for none.",
)
@click.option("--json", "file", type=click.Path(path_type=Path), default=Path("bench.json"), show_default=True)
def main(events: int, naive_events: int, rounds: int, sizes: tuple[int, ...], file: Path) -> None:
    """Measure, print a table, write it as JSON."""
    console = Console(highlight=False)
    results: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, Stack(Path(folder) / "stack", temporary=True) as stack:
        os.environ.update(stack.environment)
        bench = Bench(stack, Path(folder))
        measures: dict[str, Callable[[], float]] = {
            "naive Celery: one task, one RPC per event": lambda: bench.naive(naive_events),
            "our worker, from a backlog": lambda: bench.backlog(events),
            "publish_many": lambda: bench.publish_many(events),
            "publish, one by one": lambda: bench.publish_single(events // 10),
        }
        for number in range(rounds):
            for name, measure in measures.items():
                with console.status(f"round {number + 1} of {rounds}: {name}"):
                    results.setdefault(name, []).append(measure())
        growth = {}
        for size in filter(None, sizes):
            with console.status(f"a ledger of {size:,} rows"):
                grow(bench.database, ledger_rows=size)
                growth[size] = pack_milliseconds(bench.database)
    medians = {name: statistics.median(rates) for name, rates in results.items()}
    _print_rates(console, medians)
    _print_growth(console, growth)
    report = {"events_per_second": medians, "rounds": results, "pack_of_200_milliseconds": growth}
    file.write_text(json.dumps(report, indent=2) + "\n")


def _print_rates(console: Console, medians: dict[str, float]) -> None:
    baseline = next(iter(medians.values()))
    table = Table(box=None, header_style="bold")
    table.add_column("")
    table.add_column("events/s", justify="right")
    table.add_column("times naive", justify="right")
    for name, rate in medians.items():
        table.add_row(name, f"{rate:,.0f}", f"{rate / baseline:.1f}")
    console.print(table)


def _print_growth(console: Console, growth: dict[int, float]) -> None:
    if not growth:
        return
    smallest = next(iter(growth.values()))
    table = Table(box=None, header_style="bold")
    for column in ("ledger rows", "ms per pack of 200", "times the smallest"):
        table.add_column(column, justify="right")
    for size, milliseconds in growth.items():
        table.add_row(f"{size:,}", f"{milliseconds:.1f}", f"{milliseconds / smallest:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
