"""A side, a user and a stopwatch: everything that `make bench` measures with servers that run."""

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
from pydantic import SecretStr

from events import AsyncPublisher, Event, Publisher, parse_event
from events.contract import new_event_id
from tests.bench import costs, limit, live
from tests.bench.costs import WORKER, Spent
from tests.bench.side import Side
from tests.database import Database
from tests.stories import chunks, crowd, encoded
from worker.settings import StreamSettings
from worker.stream import EventStream, connect

PATIENCE_SECONDS: Final = 900.0
POLL_SECONDS: Final = 0.01
LIMIT_PACK: Final = 500  # events in one call of a bare client, whatever the workers' packs are: figures stay comparable
FILL: Final = 1000  # events in a round trip
STEPS: Final = 20  # looks at a worker's memory on the way through a backlog
SETTLE_SECONDS: Final = 5  # for what a worker does at its start
BIN: Final = Path(sys.executable).parent


@dataclass(frozen=True)
class Run:
    """A backlog, applied by workers that had started before."""

    events_per_second: float
    cpu_seconds_per_million: dict[str, float]  # by process
    memory_mebibytes: list[float]  # of the first worker, at each of STEPS
    waiting_bytes: float  # of Redis' memory, per event that waits


class Bench:
    """Measures; whatever is left in Redis is applied or deleted when a measure ends."""

    def __init__(self, side: Side, folder: Path) -> None:
        self.side = side
        self.folder = folder
        connection = psycopg.connect(side.environment["DATABASE_URL"], autocommit=True, row_factory=dict_row)
        self.database = Database(connection)
        self.user = self.database.create_user()
        self.rng = random.Random(1)
        self.redis_url = side.environment["REDIS_URL"]
        settings = StreamSettings(REDIS_URL=SecretStr(self.redis_url))
        self._running: list[subprocess.Popen[bytes]] = []
        self.client: Any = connect(settings)
        self.stream = EventStream(self.client, settings.stream)

    def close(self) -> None:
        """Close the connections to Postgres and Redis."""
        self.database.connection.close()
        self.client.close()

    def warm_up(self, count: int) -> None:
        """Apply events, so that what is measured first does not pay for empty caches."""
        self.limit(count)

    def checkpoint(self) -> None:
        """Let Postgres write down what an earlier measure has left, so that no later one pays for it."""
        self.database.connection.execute("checkpoint")

    def events(self, count: int) -> list[dict[str, Any]]:
        """Interviews, with ids as the publisher makes them."""
        return [each | {"id": str(new_event_id())} for each in crowd(self.user, self.rng, events=count)]

    def valid(self, count: int) -> list[Event]:
        return [parse_event(raw) for raw in encoded(self.events(count))]

    # ------------------------------------------------------------------------------------------------- publishing

    def publish(self, count: int, *, at_once: int) -> float:
        """Events per second into the stream, from one process, so many in a call."""
        events = self.valid(count)
        with self._publisher() as publisher:
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
            async with AsyncPublisher(self.redis_url, stream=self.stream.key) as publisher:
                began = time.monotonic()
                for start in range(0, count, at_once):
                    await publisher.publish_many(events[start : start + at_once])
                return count / (time.monotonic() - began)

        rate = asyncio.run(published())
        self.client.delete(self.stream.key)
        return rate

    # --------------------------------------------------------------------------------------------------- applying

    def limit(self, count: int) -> float:
        """Events per second of two bare clients of the batch RPC, LIMIT_PACK events a call."""
        bodies = [event.model_dump(mode="json", exclude_none=True) for event in self.valid(count)]
        packs = [bodies[at : at + LIMIT_PACK] for at in range(0, count, LIMIT_PACK)]
        return limit.events_per_second(self.side.environment, packs)

    def fill(self, count: int) -> None:
        """A backlog of interviews, side by side in no way: each comes whole."""
        for start in range(0, count, FILL):
            self.stream.add(encoded(self.events(min(FILL, count - start))))

    def backlog(self, count: int, *, workers: int = 1, **settings: str) -> Run:
        """Interviews, applied from a backlog by one or more of our workers."""
        memory: list[float] = []
        with self._workers(workers, **settings) as (first, *_):
            self._wait_until_ready()
            with self._paused():
                empty = self._redis_bytes()
                self.fill(count)
                count = self._left()
                waiting = (self._redis_bytes() - empty) / count

            def apply_all() -> None:
                for step in range(1, STEPS + 1):
                    self._wait_until_left(count - count * step // STEPS)
                    memory.append(costs.memory_mebibytes(first.pid))

            spent = self._spent(apply_all)
        self._assert_nothing_dead()
        cpu = {name: seconds / count * 1e6 for name, seconds in spent.cpu_seconds.items()}
        return Run(count / spent.seconds, cpu, memory, waiting)

    def rate_of(self, raw: list[bytes]) -> float:
        """Events per second of our worker from a backlog of these."""
        for chunk in chunks(raw, FILL):
            self.stream.add(chunk)
        with self._workers(1):
            return self._rate(self._left, len(raw))

    def live(self, count: int) -> float:
        """Events per second applied by one worker while two engines publish as fast as they can."""
        raw = encoded(self.events(count))
        shares = [raw[: len(raw) // 2], raw[len(raw) // 2 :]]
        with (
            self._workers(1),
            live.engines(self.redis_url, self.stream.key, shares) as (barrier, processes),
        ):
            self._wait_until_ready()
            barrier.wait(PATIENCE_SECONDS)
            began = time.monotonic()
            self._wait_until(lambda: not any(process.is_alive() for process in processes))
            self._wait_until_left(0)
            rate = len(raw) / (time.monotonic() - began)
        self._assert_nothing_dead()
        return rate

    def latency(self, count: int, *, rate: float) -> list[float]:
        """Milliseconds from publish to commit: p50, p95, p99."""
        with self._workers(1), self._publisher() as publisher:
            self._wait_until_ready()
            return live.latency_milliseconds(publisher, self.database, self.valid(count), rate=rate)

    def idle(self, seconds: float) -> dict[str, float]:
        """What a worker does a minute that has nothing to do, and its memory in MiB."""
        with self._workers(1) as (worker,):
            self._wait_until_ready()
            time.sleep(SETTLE_SECONDS)
            spent = self._spent(lambda: time.sleep(seconds))
            return {
                "Redis commands a minute": spent.redis_commands / spent.seconds * 60,
                "per cent of a core": spent.cpu_of(WORKER) / spent.seconds * 100,
                "per cent of a core, servers": spent.cpu_of(self.side.servers) / spent.seconds * 100,
                "memory, MiB": costs.memory_mebibytes(worker.pid),
            }

    def many(self, workers: int, seconds: int) -> dict[str, float]:
        """What an event costs where so many workers have nothing else to do: one comes each second."""
        with self._workers(workers, INTERVIEW_CONCURRENCY="1"), self._publisher() as publisher:
            self._wait_until_ready()
            publisher.publish_many(self.valid(10))  # connects
            self._wait_until_left(0)
            time.sleep(SETTLE_SECONDS)
            idle = self._spent(lambda: time.sleep(seconds))
            times: list[float] = []
            events = self.valid(-(-seconds // 10) * 10)[:seconds]
            busy = self._spent(
                lambda: times.extend(live.latency_milliseconds(publisher, self.database, events, rate=1))
            )
        idle_cpu, idle_commands = idle.cpu_of(WORKER) / idle.seconds * 1000, idle.redis_commands / idle.seconds
        cpu = (busy.cpu_of(WORKER) * 1000 - idle_cpu * busy.seconds) / seconds
        commands = (busy.redis_commands - idle_commands * busy.seconds) / seconds - 1  # the publisher's own
        return {
            "CPU ms a second with nothing to do": idle_cpu,
            "CPU ms that an event adds": cpu,
            "Redis commands a second with nothing to do": idle_commands,
            "Redis commands that an event adds": commands,
            "publish to commit: p50 ms": times[0],
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
        """Workers, each with a name and a heartbeat file of its own; none may end before the block does."""
        with ExitStack() as running:
            self._running = []
            for number in range(count):
                self._heartbeat(number).unlink(missing_ok=True)
                started = self.side.running_worker(
                    self._log(number),
                    f"--hostname=bench-{number}@%h",
                    INTERVIEW_HEARTBEAT_FILE=str(self._heartbeat(number)),
                    **settings,
                )
                self._running.append(running.enter_context(started))
            try:
                yield self._running
            finally:
                self._running = []

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """Stop all processes of the workers where they are, so that all begin together when the block ends."""
        processes = [process for worker in self._running for process in costs.family(worker.pid)]
        for process in processes:
            process.suspend()
        try:
            yield
        finally:
            for process in processes:
                process.resume()

    def _heartbeat(self, number: int) -> Path:
        return self.folder / f"heartbeat-{number}"

    def _log(self, number: int) -> Path:
        return self.folder / f"worker-{number}.log"

    def _publisher(self) -> Publisher:
        return Publisher(self.redis_url, stream=self.stream.key)

    def _spent(self, work: Callable[[], None]) -> Spent:
        """Do the work; return what workers and servers spent on it."""
        pids = [worker.pid for worker in self._running]
        began, commands = time.monotonic(), costs.redis_commands(self.client)
        before = costs.cpu_seconds(self.side.servers, pids)
        work()
        seconds = time.monotonic() - began
        after = costs.cpu_seconds(self.side.servers, pids)
        commands = costs.redis_commands(self.client) - commands - 1  # our own question
        return Spent(seconds, {name: after[name] - before[name] for name in after}, commands)

    def _assert_nothing_dead(self) -> None:
        """Dead letters would be no work done: raise ClickException where there are any."""
        dead = self.database.one("select count(*) as n, min(reason) as reason from public.interview_dead_letters")
        if dead["n"]:
            raise click.ClickException(f"{self.side.name}: {dead['n']} events were dead-lettered: {dead['reason']}")

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
        """Until each worker has a heartbeat, and events have been applied."""
        self._wait_until(lambda: all(self._heartbeat(number).exists() for number in range(len(self._running))))
        self.fill(10)
        self._wait_until_left(0)

    def _wait_until_left(self, most: int) -> None:
        self._wait_until(lambda: self._left() <= most)

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise click.ClickException(f"{self.side.name}: no end after {PATIENCE_SECONDS:.0f} s")
            self._assert_running()
            time.sleep(POLL_SECONDS)

    def _assert_running(self) -> None:
        for number, worker in enumerate(self._running):
            if worker.poll() is not None:
                last = (self._log(number).read_text(errors="replace").splitlines() or ["it printed nothing"])[-1]
                raise click.ClickException(f"{self.side.name}: a worker ended with {worker.returncode}: {last}")
