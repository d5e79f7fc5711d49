"""`--against`: this checkout beside another commit, each with its own servers and SQL, in rounds that take turns."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

from rich.console import Console

from tests.bench import tables
from tests.bench.bench import Bench
from tests.bench.comparison import Comparison

PARTS: Final = ("rates", "latency", "idle", "many")
LIMIT: Final = "events/s: the limit, two bare clients of the RPC"
ONE_WORKER: Final = "events/s: one worker"
LATENCY_EVENTS: Final = {1: 15, 100: 1_000, 1_000: 10_000}  # by events per second
TAIL_FROM: Final = 100  # events; of fewer p95 and p99 say nothing
MANY_WORKERS: Final = 16
MANY_SECONDS: Final = 20
IDLE_SECONDS: Final = 60

Figures = Mapping[str, float]
Measure = Callable[[Bench], Figures]


def compare(console: Console, ours: Bench, theirs: Bench, part: str, *, rounds: int, events: int) -> dict[str, Any]:
    """Measure a part on both sides, print its table, and return its figures.

    A round takes each measure once a side, one side right after the other; who is first changes from round to round.
    """
    result = Comparison((ours.side.name, theirs.side.name))
    for number in range(rounds):
        for name, measure in _measures(part, events).items():
            figures = {}
            for bench in (ours, theirs) if number % 2 == 0 else (theirs, ours):
                with console.status(f"{part}, round {number + 1} of {rounds}: {name}, {bench.side.name}"):
                    ours.checkpoint()
                    theirs.checkpoint()
                    figures[bench] = measure(bench)
            result.add(figures[ours], figures[theirs])
    if part == "rates":
        result.add_share("% of the limit: one worker", of=ONE_WORKER, whole=LIMIT)
    tables.print_comparison(console, part, result)
    return result.as_json()


def _measures(part: str, events: int) -> dict[str, Measure]:
    if part == "rates":
        return {
            "the limit": lambda bench: {LIMIT: bench.limit(events)},
            "one worker": lambda bench: _one_worker(bench, events),
            "two workers": lambda bench: _workers(bench, events, 2),
            "four workers": lambda bench: _workers(bench, events, 4),
            "live publishers": lambda bench: {"events/s: one worker, two live publishers": bench.live(events)},
        }
    if part == "latency":
        return {f"{rate} events/s": partial(_latency, rate=rate, count=count) for rate, count in LATENCY_EVENTS.items()}
    if part == "idle":
        return {"one worker": lambda bench: bench.idle(IDLE_SECONDS)}
    return {f"{MANY_WORKERS} workers": lambda bench: bench.many(MANY_WORKERS, MANY_SECONDS)}


def _one_worker(bench: Bench, events: int) -> Figures:
    run = bench.backlog(events)
    cpu = run.cpu_seconds_per_million  # which is µs per event
    return {
        ONE_WORKER: run.events_per_second,
        **{f"µs of CPU: {name}": spent for name, spent in cpu.items()},
        "µs of CPU: all together": sum(cpu.values()),
    }


def _workers(bench: Bench, events: int, count: int) -> Figures:
    return {f"events/s: {count} workers": bench.backlog(events, workers=count).events_per_second}


def _latency(bench: Bench, *, rate: int, count: int) -> Figures:
    p50, p95, p99 = bench.latency(count, rate=rate)
    tail = {f"ms at {rate:,}/s: p95": p95, f"ms at {rate:,}/s: p99": p99} if count >= TAIL_FROM else {}
    return {f"ms at {rate:,}/s: p50": p50} | tail
