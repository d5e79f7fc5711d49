"""The stage for faults: servers behind proxies, several workers, several engines, and the final reckoning."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import psutil
import psycopg
import redis
from psycopg.rows import dict_row

from events.publisher import FIELD
from tests.chaos.engine import session_events
from tests.chaos.proxy import Proxy
from tests.database import Database
from tests.stories import encoded, wrong_rows
from worker.embedded import Stack

PATIENCE_SECONDS = 120.0
RECLAIM_SECONDS = 5.0
FILL_BYTES = 4 << 20  # some 13,000 events
SETTINGS = {
    "INTERVIEW_RECLAIM_SECONDS": str(RECLAIM_SECONDS),
    "INTERVIEW_RPC_TIMEOUT_SECONDS": "4",
    "INTERVIEW_BACKOFF_SECONDS": "1",
}


@dataclass(frozen=True)
class Reckoning:
    """What was published, what of it is nowhere, and how many rows are not what their events tell."""

    events: int
    lost: int
    wrong_rows: int


@dataclass
class Theatre:
    """Three workers and two engines around one stack, each server behind a proxy of its own."""

    stack: Stack
    folder: Path
    rng: random.Random
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    logs: dict[int, Path] = field(default_factory=dict)  # by the worker's process id
    engines: list[subprocess.Popen[str]] = field(default_factory=list)
    sessions: list[int] = field(default_factory=list)
    memory_limit: int = 0  # bytes of Redis' maxmemory; 0 until it is first filled
    database: Database = field(init=False)
    user: uuid.UUID = field(init=False)
    redis_proxy: Proxy = field(init=False)
    rest_proxy: Proxy = field(init=False)
    environment: dict[str, str] = field(init=False)

    @classmethod
    @contextmanager
    def open(
        cls, folder: Path, seed: int, *, workers: int = 3, engines: int = 2, rate: float = 150.0
    ) -> Iterator[Self]:
        """Everything up and under load; everything down at the end. `rate`: events/s of each engine."""
        with ExitStack() as opened:
            stack = opened.enter_context(Stack(folder / "stack", temporary=True))
            theatre = cls(stack, folder, random.Random(seed))
            theatre._open_proxies(opened)
            opened.callback(theatre._close)
            theatre.database = Database(
                opened.enter_context(psycopg.connect(stack.database_url, autocommit=True, row_factory=dict_row))
            )
            theatre.user = theatre.database.create_user()
            for _ in range(workers):
                theatre.start_worker()
            for number in range(engines):
                theatre._start_engine(seed + number, rate, spool=number == 0)
            yield theatre

    def _open_proxies(self, opened: ExitStack) -> None:
        settings = self.stack.environment
        redis_url, rest_url = urlsplit(settings["REDIS_URL"]), urlsplit(settings["SUPABASE_REST_URL"])
        assert redis_url.port
        assert rest_url.port
        self.redis_proxy = opened.enter_context(Proxy(redis_url.port).running())
        self.rest_proxy = opened.enter_context(Proxy(rest_url.port).running())
        self.environment = settings | {
            "REDIS_URL": settings["REDIS_URL"].replace(f":{redis_url.port}/", f":{self.redis_proxy.port}/"),
            "SUPABASE_URL": f"http://127.0.0.1:{self.rest_proxy.port}",
            "SUPABASE_REST_URL": f"http://127.0.0.1:{self.rest_proxy.port}",
        }

    # ------------------------------------------------------------------------------------------------ the actors

    def start_worker(self) -> subprocess.Popen[bytes]:
        """One more worker; its log goes to the folder."""
        log = self.folder / f"worker-{len(list(self.folder.glob('worker-*')))}.log"
        with log.open("wb") as output:
            worker = subprocess.Popen(
                [str(Path(sys.executable).parent / "celery"), "-A", "worker", "worker"],
                env={**os.environ, **SETTINGS, **self.environment},
                stdout=subprocess.DEVNULL,
                stderr=output,
            )
        self.workers.append(worker)
        self.logs[worker.pid] = log
        return worker

    def any_worker(self) -> subprocess.Popen[bytes]:
        """One of those that run."""
        return self.rng.choice([worker for worker in self.workers if worker.poll() is None])

    def any_ready_worker(self) -> subprocess.Popen[bytes]:
        """One of those that have started, waiting for the first where none has."""
        ready: list[subprocess.Popen[bytes]] = []

        def look() -> bool:
            ready[:] = [each for each in self.workers if each.poll() is None and b" ready." in self._log(each)]
            return bool(ready)

        self.wait_until(look, "a worker is ready")
        return self.rng.choice(ready)

    def _log(self, worker: subprocess.Popen[bytes]) -> bytes:
        return self.logs[worker.pid].read_bytes()

    def holds_claims(self, worker: subprocess.Popen[bytes]) -> bool:
        """Whether a process of this worker has claimed entries."""
        started = [line for line in self._log(worker).splitlines() if b'"worker.started"' in line]
        if not started:
            return False
        worker_id = json.loads(started[0])["worker"].encode()
        consumers = self.redis().xinfo_consumers("interview:events", "workers")
        return any(each["pending"] and each["name"].startswith(worker_id) for each in consumers)

    def kill_with_pool(self, worker: subprocess.Popen[bytes]) -> None:
        """kill -9 of a worker and its pool at one moment, as when a machine dies."""
        family = [*psutil.Process(worker.pid).children(), worker]
        for process in family:
            process.kill()
        worker.wait()

    def replace(self, worker: subprocess.Popen[bytes]) -> None:
        """Wait for a worker's end and start another in its stead."""
        try:
            worker.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
            raise AssertionError("a worker did not end after SIGTERM") from None
        self.workers.remove(worker)
        self.start_worker()

    def _start_engine(self, seed: int, rate: float, *, spool: bool) -> None:
        engine = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.engine", self.stack.environment["REDIS_URL"], str(self.user),
             str(seed), str(rate), *([str(self.folder / f"engine-{seed}.spool")] if spool else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # its spool logs each time that Redis is away
            text=True,
        )  # fmt: skip
        self.engines.append(engine)
        threading.Thread(target=self._listen, args=(engine,), daemon=True).start()

    def _listen(self, engine: subprocess.Popen[str]) -> None:
        assert engine.stdout is not None
        for line in engine.stdout:
            self.sessions.append(int(line))

    @contextmanager
    def paused_workers(self) -> Iterator[None]:
        """All workers stand still, their processes too."""
        family = []
        for worker in self.workers:
            with suppress(psutil.NoSuchProcess):
                family += [psutil.Process(worker.pid), *psutil.Process(worker.pid).children()]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        try:
            yield
        finally:
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    def fill_redis(self) -> None:
        """Set a limit to Redis' memory, unless one stands, and publish interviews until it refuses them."""
        client = self.redis()
        self.memory_limit = self.memory_limit or client.info("memory")["used_memory"] + FILL_BYTES
        self.set_memory_limit()
        with suppress(redis.exceptions.OutOfMemoryError, redis.exceptions.ExecAbortError):
            while True:
                seed = self.rng.getrandbits(64)
                with client.pipeline(transaction=True) as whole_session_or_nothing:
                    for raw in encoded(session_events(self.user, seed)):
                        whole_session_or_nothing.xadd("interview:events", {FIELD: raw})
                    whole_session_or_nothing.execute()
                self.sessions.append(seed)

    def set_memory_limit(self) -> None:
        """Let Redis have the memory that it may."""
        self.redis().config_set("maxmemory", self.memory_limit)

    def _close(self) -> None:
        processes: list[subprocess.Popen[Any]] = [*self.engines, *self.workers]
        for process in processes:
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()

    # --------------------------------------------------------------------------------------------- what one sees

    def redis(self) -> Any:
        """A client past the proxy."""
        return redis.Redis.from_url(self.stack.environment["REDIS_URL"], socket_timeout=5)

    def applied(self) -> int:
        """Events in the ledger, through whatever connection the faults have left."""
        while True:
            with suppress(psycopg.OperationalError):
                return int(self.database.one("select count(*) as n from public.interview_events")["n"])
            with suppress(psycopg.OperationalError):
                self.database.connection = psycopg.connect(
                    self.stack.database_url, autocommit=True, row_factory=dict_row
                )
            time.sleep(0.05)

    def wait_until(self, condition: Callable[[], bool], what: str) -> float:
        """Seconds until a condition holds; fails, saying what for, when patience ends."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < PATIENCE_SECONDS, f"waited in vain until {what}"
            time.sleep(0.02)
        return time.monotonic() - began

    def seconds_to_recover(self) -> float:
        """Seconds until events are applied again."""
        before = self.applied()
        return self.wait_until(lambda: self.applied() > before, "events are applied again")

    def memory_mib(self) -> float:
        """The largest worker's resident memory, its pool's processes included."""
        sizes = []
        for worker in self.workers:
            with suppress(psutil.NoSuchProcess):
                main = psutil.Process(worker.pid)
                sizes.append(sum(each.memory_info().rss for each in [main, *main.children()]))
        return max(sizes, default=0) / 2**20

    # -------------------------------------------------------------------------------------------- the reckoning

    def reckon(self) -> Reckoning:
        """Stop the engines, let the workers finish, and compare with what was published.

        Raises AssertionError where something is left behind, doubled, or dead.
        """
        for engine in self.engines:
            engine.send_signal(signal.SIGTERM)
        for engine in self.engines:
            assert engine.wait(PATIENCE_SECONDS) == 0
        self.wait_until(lambda: self.redis().xlen("interview:events") == 0, "the stream is empty")
        for worker in self.workers:
            worker.send_signal(signal.SIGTERM)
        for worker in self.workers:
            assert worker.wait(PATIENCE_SECONDS) == 0, f"a worker ended badly: see {self.logs[worker.pid]}"
        self.applied()  # reconnects
        published = [event for seed in self.sessions for event in session_events(self.user, seed)]
        ledger = self.database.all("select event_id::text as id, applied_at from public.interview_events")
        assert [each for each in ledger if each["applied_at"] is None] == []
        assert self.database.all("select reason, detail from public.interview_dead_letters") == []
        applied, ids = {each["id"] for each in ledger}, {each["id"] for each in published}
        assert applied <= ids
        return Reckoning(len(published), len(ids - applied), len(wrong_rows(self.database, published)))
