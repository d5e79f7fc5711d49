"""`make bench`: our worker beside a naive Celery task, in one run on one machine, as ratios.

    python -m tests.bench [--events 50000] [--naive-events 2000] [--rounds 3] [--ledger 10000]... [--json bench.json]

Rates come from a backlog unless they say otherwise; an event counts when it has left the stream, after its commit.

Every figure is the median of the rounds. The load goes to 127.0.0.1 and stops by itself.
"""

import asyncio
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import psycopg
from psycopg.rows import dict_row
from rich.console import Console
from rich.table import Table

from events import AsyncPublisher, Event, Publisher, parse_event
from tests.bench import costs, limit, live
from tests.bench.growth import grow, pack_milliseconds
from tests.database import Database
from tests.stories import crowd, encoded
from worker.demo import running_worker
from worker.embedded import Stack
from worker.settings import load_settings
from worker.stream import EventStream, connect

PATIENCE_SECONDS = 600.0
FILL = 1000  # events in a round trip


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

    def valid(self, count: int) -> list[Event]:
        return [parse_event(raw) for raw in encoded(self.events(count))]

    def publish(self, count: int, *, at_once: int) -> float:
        """Events per second into the stream, from one process, so many in a call."""
        events = self.valid(count)
        with Publisher() as publisher:
            began = time.monotonic()
            for start in range(0, count, at_once):
                publisher.publish_many(events[start : start + at_once])
            rate = count / (time.monotonic() - began)
        self.client.delete(self.stream.key)
        return rate

    def publish_async(self, count: int, *, at_once: int) -> float:
        """As publish, by AsyncPublisher."""
        events = self.valid(count)

        async def published() -> float:
            async with AsyncPublisher() as publisher:
                began = time.monotonic()
                for start in range(0, count, at_once):
                    await publisher.publish_many(events[start : start + at_once])
                return count / (time.monotonic() - began)

        rate = asyncio.run(published())
        self.client.delete(self.stream.key)
        return rate

    def limit(self, count: int) -> float:
        """Events per second of two bare clients of the batch RPC."""
        size = load_settings().pack_size
        bodies = [event.model_dump(mode="json", exclude_none=True) for event in self.valid(count)]
        return limit.events_per_second([bodies[at : at + size] for at in range(0, count, size)])

    def fill(self, count: int) -> None:
        """A backlog."""
        for _ in range(0, count, FILL):
            self.stream.add(encoded(self.events(min(FILL, count))))

    def backlog(self, count: int, *, workers: int = 1) -> float:
        """Events per second applied by workers from a backlog, from the first that is done to the last."""
        self.fill(count)
        with self._workers(workers):
            return self._rate(count)

    def live(self, count: int) -> float:
        """Events per second applied by one worker while two engines publish as fast as they can."""
        halves = [self.valid(count // 2) for _ in range(2)]
        with self._workers(1), ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as engines:
            self._wait_until_ready()
            began = time.monotonic()
            for done in [engines.submit(live.publish_all, half) for half in halves]:
                done.result()
            self._wait_until(lambda: self.client.xlen(self.stream.key) == 0)
            return count / (time.monotonic() - began)

    def latency(self, count: int, *, rate: float) -> list[float]:
        """Milliseconds from publish to commit: p50, p95, p99."""
        with self._workers(1), Publisher() as publisher:
            self._wait_until_ready()
            return live.latency_milliseconds(publisher, self.database, self.valid(count), rate=rate)

    def costs(self, count: int) -> dict[str, float]:
        """CPU seconds per million events by process, and a worker's private memory on the way, in MiB."""
        empty = int(self.client.info("memory")["used_memory"])
        self.fill(count)
        waiting = (int(self.client.info("memory")["used_memory"]) - empty) / count
        with self._workers(1) as (worker,):
            self._wait_until(lambda: self.client.xlen(self.stream.key) < count * 0.95)
            left, before = self.client.xlen(self.stream.key), costs.cpu_seconds(self.stack, worker.pid)
            memory = [costs.memory_mebibytes(worker.pid)]
            self._wait_until(lambda: self.client.xlen(self.stream.key) < count * 0.05)
            memory.append(costs.memory_mebibytes(worker.pid))
            done = left - self.client.xlen(self.stream.key)
            after = costs.cpu_seconds(self.stack, worker.pid)
            self._wait_until(lambda: self.client.xlen(self.stream.key) == 0)
        told = {f"CPU seconds per million events: {name}": (after[name] - before[name]) / done * 1e6 for name in after}
        told |= {"memory of a worker, MiB, at the first twentieth": memory[0]}
        told |= {"memory of a worker, MiB, at the last twentieth": memory[1]}
        return told | {"memory of Redis per waiting event, bytes": waiting}

    def idle(self, seconds: float) -> dict[str, float]:
        """What a worker does a minute that has nothing to do."""
        with self._workers(1) as (worker,):
            self._wait_until_ready()
            time.sleep(5)  # for what it does at its start
            began, commands = time.monotonic(), costs.redis_commands(self.client)
            cpu = sum(sum(each.cpu_times()[:2]) for each in costs.family(worker.pid))
            time.sleep(seconds)
            minutes = (time.monotonic() - began) / 60
            cpu = sum(sum(each.cpu_times()[:2]) for each in costs.family(worker.pid)) - cpu
            return {
                "idle worker: Redis commands per minute": (costs.redis_commands(self.client) - commands - 1) / minutes,
                "idle worker: per cent of a core": cpu / minutes / 60 * 100,
                "idle worker: memory, MiB": costs.memory_mebibytes(worker.pid),
            }

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

    @contextmanager
    def _workers(self, count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
        with ExitStack() as running:
            yield [
                running.enter_context(running_worker(self.stack.environment, self.folder / f"worker-{number}.log"))
                for number in range(count)
            ]

    def _wait_until_ready(self) -> None:
        """Until it has applied an event."""
        self.fill(10)
        self._wait_until(lambda: self.client.xlen(self.stream.key) == 0)

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise click.ClickException(f"no end after {PATIENCE_SECONDS:.0f} s")
            time.sleep(0.005)

    def _rate(self, count: int) -> float:
        self._wait_until(lambda: self.client.xlen(self.stream.key) < count)
        left, began = self.client.xlen(self.stream.key), time.monotonic()
        self._wait_until(lambda: self.client.xlen(self.stream.key) == 0)
        return float(left) / (time.monotonic() - began)


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
            "the limit: two bare clients of the batch RPC": lambda: bench.limit(events),
            "our worker": lambda: bench.backlog(events),
            "our worker, with live publishers": lambda: bench.live(events),
            "two of our workers": lambda: bench.backlog(events, workers=2),
            "four of our workers": lambda: bench.backlog(events, workers=4),
            "publish_many, 500 in a call": lambda: bench.publish(events, at_once=500),
            "publish, one by one": lambda: bench.publish(events // 10, at_once=1),
            "publish_many of AsyncPublisher": lambda: bench.publish_async(events, at_once=500),
            "publish of AsyncPublisher": lambda: bench.publish_async(events // 10, at_once=1),
        }
        for number in range(rounds):
            for name, measure in measures.items():
                with console.status(f"round {number + 1} of {rounds}: {name}"):
                    results.setdefault(name, []).append(measure())
        with console.status("latency, costs, idle"):
            latency = {rate: bench.latency(int(min(1000, max(20, rate * 10))), rate=rate) for rate in (1, 100, 1000)}
            spent = bench.costs(4 * events) | bench.idle(30)
        growth = {}
        for size in filter(None, sizes):
            with console.status(f"a ledger of {size:,} rows"):
                grow(bench.database, ledger_rows=size)
                growth[size] = pack_milliseconds(bench.database)
    medians = {name: statistics.median(rates) for name, rates in results.items()}
    _print_rates(console, medians)
    _print_latency(console, latency)
    for name, cost in spent.items():
        console.print(f"{name}: {cost:,.1f}")
    _print_growth(console, growth)
    report = {
        "events_per_second": medians,
        "rounds": results,
        "latency_milliseconds_p50_p95_p99_at_events_per_second": latency,
        "costs": spent,
        "pack_of_200_milliseconds": growth,
    }
    file.write_text(json.dumps(report, indent=2) + "\n")


def _print_rates(console: Console, medians: dict[str, float]) -> None:
    baseline, limit = list(medians.values())[:2]
    table = Table(box=None, header_style="bold")
    table.add_column("")
    table.add_column("events/s", justify="right")
    table.add_column("times naive", justify="right")
    table.add_column("of the limit", justify="right")
    for name, rate in medians.items():
        table.add_row(name, f"{rate:,.0f}", f"{rate / baseline:.1f}", f"{rate / limit:.0%}")
    console.print(table)


def _print_latency(console: Console, latency: dict[int, list[float]]) -> None:
    table = Table(box=None, header_style="bold")
    for column in ("events/s", "publish to commit: p50 ms", "p95 ms", "p99 ms"):
        table.add_column(column, justify="right")
    for rate, times in latency.items():
        table.add_row(f"{rate:,}", *(f"{each:.1f}" for each in times))
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
