"""The stage for faults: servers behind proxies, several workers, several engines, and the final reckoning."""

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

import psycopg
import redis
from psycopg.rows import dict_row

from tests.chaos.engine import session_events
from tests.chaos.proxy import Proxy
from tests.database import Database
from tests.stories import assert_rows_equal_their_stories
from worker.embedded import Stack

PATIENCE_SECONDS = 120.0
RECLAIM_SECONDS = 5.0
SETTINGS = {
    "INTERVIEW_RECLAIM_SECONDS": str(RECLAIM_SECONDS),
    "INTERVIEW_RPC_TIMEOUT_SECONDS": "4",
    "INTERVIEW_BACKOFF_SECONDS": "1",
}


@dataclass
class Theatre:
    """Three workers and two engines around one stack, each server behind a proxy of its own."""

    stack: Stack
    folder: Path
    rng: random.Random
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    engines: list[subprocess.Popen[str]] = field(default_factory=list)
    sessions: list[int] = field(default_factory=list)
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
                theatre._start_engine(seed + number, rate)
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
                [str(Path(sys.executable).parent / "celery"), "-A", "worker", "worker", "--without-mingle",
                 "--without-gossip"],
                env={**os.environ, **SETTINGS, **self.environment},
                stdout=subprocess.DEVNULL,
                stderr=output,
            )  # fmt: skip
        self.workers.append(worker)
        return worker

    def any_worker(self) -> subprocess.Popen[bytes]:
        """One of those that run."""
        return self.rng.choice([worker for worker in self.workers if worker.poll() is None])

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

    def _start_engine(self, seed: int, rate: float) -> None:
        engine = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.engine", self.stack.environment["REDIS_URL"], str(self.user),
             str(seed), str(rate)],
            stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        self.engines.append(engine)
        threading.Thread(target=self._listen, args=(engine,), daemon=True).start()

    def _listen(self, engine: subprocess.Popen[str]) -> None:
        assert engine.stdout is not None
        for line in engine.stdout:
            self.sessions.append(int(line))

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

    # -------------------------------------------------------------------------------------------- the reckoning

    def reckon(self) -> int:
        """Stop the engines, let the workers finish, and compare; answers the number of events published.

        Raises AssertionError where an event was lost, doubled or left behind, or a row differs from its story.
        """
        for engine in self.engines:
            engine.send_signal(signal.SIGTERM)
        for engine in self.engines:
            assert engine.wait(PATIENCE_SECONDS) == 0
        self.wait_until(lambda: self.redis().xlen("interview:events") == 0, "the stream is empty")
        for worker in self.workers:
            worker.send_signal(signal.SIGTERM)
        for worker in self.workers:
            assert worker.wait(PATIENCE_SECONDS) == 0
        self.applied()  # reconnects
        sessions = list(self.sessions)
        events = [event for seed in sessions for event in session_events(self.user, seed)]
        assert_rows_equal_their_stories(self.database, events)
        ledger = self.database.one("select count(*) as n, count(applied_at) as applied from public.interview_events")
        assert (ledger["n"], ledger["applied"]) == (len(events), len(events))
        assert self.database.all("select reason, detail from public.interview_dead_letters") == []
        return len(events)
