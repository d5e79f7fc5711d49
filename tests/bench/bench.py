"""The stack, a user and a stopwatch: everything that `make bench` measures with servers that run."""

import asyncio
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import psycopg
from psycopg.rows import dict_row

from events import AsyncPublisher, Event, Publisher, parse_event
from events.contract import new_event_id
from tests.bench import costs, limit, live
from tests.database import Database
from tests.stories import chunks, crowd, encoded
from worker.demo import running_worker
from worker.embedded import Stack
from worker.settings import load_settings
from worker.stream import EventStream, connect

PATIENCE_SECONDS: Final = 900.0
POLL_SECONDS: Final = 0.01
FILL: Final = 1000  # events in a round trip
STEPS: Final = 20  # looks at a worker's memory on the way through a backlog
BIN: Final = Path(sys.executable).parent


@dataclass(frozen=True)
class Run:
    """A backlog, applied: from its first event that was done to its last."""

    events_per_second: float
    cpu_seconds_per_million: dict[str, float]  # by process
    memory_mebibytes: list[float]  # of the first worker, at each of STEPS
    waiting_bytes: float  # of Redis' memory, per event that waits


class Bench:
    """Measures; whatever is left in Redis is applied or deleted when a measure ends."""

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
        """Interviews, with ids as the publisher makes them."""
        return [each | {"id": str(new_event_id())} for each in crowd(self.user, self.rng, events=count)]

    def valid(self, count: int) -> list[Event]:
        return [parse_event(raw) for raw in encoded(self.events(count))]

    # ------------------------------------------------------------------------------------------------- publishing

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

    # --------------------------------------------------------------------------------------------------- applying

    def limit(self, count: int) -> float:
        """Events per second of two bare clients of the batch RPC."""
        size = load_settings().pack_size
        bodies = [event.model_dump(mode="json", exclude_none=True) for event in self.valid(count)]
        return limit.events_per_second([bodies[at : at + size] for at in range(0, count, size)])

    def fill(self, count: int) -> None:
        """A backlog of interviews, side by side in no way: each comes whole."""
        for _ in range(0, count, FILL):
            self.stream.add(encoded(self.events(min(FILL, count))))

    def backlog(self, count: int, *, workers: int = 1, **settings: str) -> Run:
        """Interviews, applied from a backlog by one or more of our workers."""
        empty = self._redis_bytes()
        self.fill(count)
        waiting = (self._redis_bytes() - empty) / count
        with self._workers(workers, **settings) as (worker, *_):
            self._wait_until(lambda: self._left() < count)
            began, first, before = time.monotonic(), self._left(), costs.cpu_seconds(self.stack, worker.pid)
            memory = []
            for step in range(1, STEPS + 1):
                self._wait_until_left(first - first * step // STEPS)
                memory.append(costs.memory_mebibytes(worker.pid))
            seconds, after = time.monotonic() - began, costs.cpu_seconds(self.stack, worker.pid)
        cpu = {name: (after[name] - before[name]) / first * 1e6 for name in after}
        return Run(first / seconds, cpu, memory, waiting)

    def rate_of(self, raw: list[bytes]) -> float:
        """Events per second of our worker from a backlog of these."""
        for chunk in chunks(raw, FILL):
            self.stream.add(chunk)
        with self._workers(1):
            return self._rate(self._left, len(raw))

    def live(self, count: int) -> float:
        """Events per second applied by one worker while two engines publish as fast as they can."""
        raw = encoded(self.events(count))
        with self._workers(1), live.engines([raw[: count // 2], raw[count // 2 :]]) as barrier:
            self._wait_until_ready()
            barrier.wait(PATIENCE_SECONDS)
            began = time.monotonic()
            self._wait_until(lambda: self._left() > 0)
            self._wait_until_left(0)
            return count / (time.monotonic() - began)

    def latency(self, count: int, *, rate: float) -> list[float]:
        """Milliseconds from publish to commit: p50, p95, p99."""
        with self._workers(1), Publisher() as publisher:
            self._wait_until_ready()
            return live.latency_milliseconds(publisher, self.database, self.valid(count), rate=rate)

    def idle(self, seconds: float) -> dict[str, float]:
        """What a worker does a minute that has nothing to do, and its memory in MiB."""
        with self._workers(1) as (worker,):
            self._wait_until_ready()
            time.sleep(5)  # for what it does at its start
            began, commands = time.monotonic(), costs.redis_commands(self.client)
            cpu = costs.cpu_seconds(self.stack, worker.pid)
            time.sleep(seconds)
            minutes = (time.monotonic() - began) / 60
            now = costs.cpu_seconds(self.stack, worker.pid)
            spent = sum(now[name] - cpu[name] for name in now if name.startswith("worker"))
            return {
                "Redis commands a minute": (costs.redis_commands(self.client) - commands - 1) / minutes,
                "per cent of a core": spent / minutes / 60 * 100,
                "memory, MiB": costs.memory_mebibytes(worker.pid),
            }

    # ------------------------------------------------------------------------------------------------ the baselines

    def naive_celery(self, count: int, *, pool: str, concurrency: int) -> float:
        """Events per second of the naive task from a backlog, in Celery."""
        from tests.bench import naive  # reads the environment

        for event in self.events(count):
            naive.apply_event.delay(event)
        options = [f"--pool={pool}", f"--concurrency={concurrency}", "--loglevel=ERROR"]
        command = [str(BIN / "celery"), "-A", "tests.bench.naive", "worker", *options]
        return self._naive(command, lambda: int(self.client.llen(naive.QUEUE)))

    def naive_dramatiq(self, count: int, *, processes: int, threads: int) -> float:
        """As naive_celery, in dramatiq."""
        from tests.bench import naive_dramatiq  # reads the environment

        for event in self.events(count):
            naive_dramatiq.apply_event.send(event)
        options = [f"--processes={processes}", f"--threads={threads}"]
        command = [str(BIN / "dramatiq"), "tests.bench.naive_dramatiq", *options]
        return self._naive(command, lambda: int(self.client.hlen(naive_dramatiq.MESSAGES)))

    def _naive(self, command: list[str], left: Callable[[], int]) -> float:
        waiting = left()
        worker = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return self._rate(left, waiting)
        finally:
            worker.terminate()
            worker.wait()

    # --------------------------------------------------------------------------------------------------- its means

    @contextmanager
    def _workers(self, count: int, **settings: str) -> Iterator[list[subprocess.Popen[bytes]]]:
        environment = self.stack.environment | settings
        with ExitStack() as running:
            yield [
                running.enter_context(running_worker(environment, self.folder / f"worker-{number}.log"))
                for number in range(count)
            ]

    def _rate(self, left: Callable[[], int], waiting: int) -> float:
        """Events per second, from the first of those waiting that is done to the last."""
        self._wait_until(lambda: left() < waiting)
        began, first = time.monotonic(), left()
        self._wait_until(lambda: left() == 0)
        return first / (time.monotonic() - began)

    def _left(self) -> int:
        return int(self.client.xlen(self.stream.key))

    def _redis_bytes(self) -> int:
        return int(self.client.info("memory")["used_memory"])

    def _wait_until_ready(self) -> None:
        """Until a worker has applied an event."""
        self.fill(10)
        self._wait_until_left(0)

    def _wait_until_left(self, most: int) -> None:
        self._wait_until(lambda: self._left() <= most)

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise click.ClickException(f"no end after {PATIENCE_SECONDS:.0f} s")
            time.sleep(POLL_SECONDS)
