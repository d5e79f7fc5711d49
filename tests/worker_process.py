"""A real Celery worker on the real stack, and the view of it that a test needs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.proxy import Proxy
from worker.embedded import Stack
from worker.hold import HoldState, hold_key, read_hold
from worker.settings import load_settings
from worker.stream import EventStream, connect

PATIENCE_SECONDS = 90.0
STREAM = "interview:events"

# Short times, so that recovery is seen in seconds.
QUICK = {
    "INTERVIEW_RECLAIM_SECONDS": "3",
    "INTERVIEW_RPC_TIMEOUT_SECONDS": "2",
    "INTERVIEW_BACKOFF_SECONDS": "0.5",
}


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition; fail, saying what for, when patience ends."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(0.05)


@dataclass
class Workers:
    """Starts and ends workers on one Redis database; reads their logs."""

    environment: dict[str, str]
    folder: Path
    client: Any  # redis-py types each answer as "maybe awaitable"
    stream: EventStream
    logs: list[Path] = field(default_factory=list)

    @contextmanager
    def running(self, *options: str, app: str = "worker", **settings: str) -> Iterator[subprocess.Popen[bytes]]:
        """A worker that has started to claim; killed at the end if it still runs."""
        log = self.folder / f"worker-{len(self.logs)}.log"
        self.logs.append(log)
        with log.open("wb") as output:
            worker = subprocess.Popen(
                [str(Path(sys.executable).parent / "celery"), "-A", app, "worker", *options],
                env={**os.environ, **QUICK, **self.environment, **settings},
                stdout=subprocess.DEVNULL,
                stderr=output,
            )
        try:
            wait_until(lambda: b"worker.started" in log.read_bytes(), "the worker has started")
            yield worker
        finally:
            worker.kill()
            worker.wait()

    def stop(self, worker: subprocess.Popen[bytes]) -> int:
        """SIGTERM; answer the exit status."""
        worker.send_signal(signal.SIGTERM)
        return worker.wait(PATIENCE_SECONDS)

    def wait_until_empty(self) -> None:
        """Wait until every entry has left the stream."""
        wait_until(lambda: self.stream.state().length == 0, "the stream is empty")

    def hold(self) -> HoldState | None:
        """The hold in force."""
        return read_hold(self.client, hold_key(STREAM))

    def logged(self, event: str) -> list[dict[str, Any]]:
        """All workers' log lines of one event name, in the order of the workers' start."""
        lines = [line for log in self.logs for line in log.read_text().splitlines() if line.startswith("{")]
        return [found for found in map(json.loads, lines) if found["event"] == event]


@contextmanager
def hanging_supabase(stack: Stack) -> Iterator[dict[str, str]]:
    """Settings of a Supabase that never answers."""
    rest = stack.environment["SUPABASE_REST_URL"]
    with Proxy(int(rest.rpartition(":")[2])).running() as proxy:
        proxy.mode = "black_hole"
        url = f"http://127.0.0.1:{proxy.port}"
        yield {"SUPABASE_URL": url, "SUPABASE_REST_URL": url}


@contextmanager
def workers_on(stack: Stack, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    """Workers on a Redis database of their own, emptied first; our own environment is theirs, too."""
    environment = stack.environment | {"REDIS_URL": stack.environment["REDIS_URL"].removesuffix("/0") + "/1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with connect(load_settings()) as client:
        client.flushdb()
        yield Workers(environment, folder, client, EventStream(client, STREAM))
