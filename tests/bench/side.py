"""A side: a checkout whose servers run, with the program that starts its workers."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.bench import costs
from tests.bench.checkout import OURS, ROOT, SHORT, environment_for_others
from worker.embedded import Stack
from worker.embedded.server import Server

NEEDED: Final = ("REDIS_URL", "SUPABASE_URL", "SUPABASE_SECRET_KEY", "DATABASE_URL")
STOP_SECONDS: Final = 30
THIS: Final = "this checkout"


@dataclass(frozen=True)
class Side:
    """Where a checkout is, the settings of its servers, and their process ids by name."""

    name: str
    root: Path
    bin: Path
    environment: Mapping[str, str]
    servers: Mapping[str, int]

    @contextmanager
    def running_worker(self, log: Path, *options: str, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
        """A worker as this checkout's users start it; stopped by SIGTERM at the end."""
        with log.open("wb") as output:
            worker = subprocess.Popen(
                [str(self.bin / "celery"), "-A", "worker", "worker", *options],
                cwd=self.root,
                env={**environment_for_others(), **self.environment, **settings},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            yield worker
        finally:
            worker.terminate()
            try:
                worker.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()


@contextmanager
def this_checkout(folder: Path) -> Iterator[Side]:
    """The checkout that this code is in, with servers of its own."""
    with Stack(folder, temporary=True) as stack:
        servers = costs.find_servers(stack.environment, os.getpid())
        yield Side(THIS, ROOT, Path(sys.executable).parent, stack.environment, servers)


@contextmanager
def other_checkout(root: Path, commit: str, folder: Path) -> Iterator[Side]:
    """Another commit that was built in `root`; its own `interviews up` starts its servers, as the SQL is its own."""
    folder.mkdir()
    folder.chmod(0o711)  # as root its Postgres runs as another user, who must get to its data
    log, program = folder / "up.log", root / ".venv" / "bin" / "interviews"
    log.touch(mode=0o600)  # it will hold the servers' passwords
    server = Server(
        name=f"interviews up of {commit[:SHORT]}",
        argv=[str(program), "up", "--data", str(folder / "data")],
        log=log,
        ready=lambda: printed_settings(log.read_text()) is not None,
        env=dict.fromkeys(OURS, ""),
        stop_signals=(signal.SIGINT, signal.SIGKILL),
    )
    server.start()
    try:
        environment = printed_settings(log.read_text())
        assert environment is not None
        assert server.process is not None
        servers = costs.find_servers(environment, server.process.pid)
        yield Side(commit[:SHORT], root, root / ".venv" / "bin", environment, servers)
    finally:
        server.stop()


def printed_settings(output: str) -> dict[str, str] | None:
    """The settings that `interviews up` has printed, None while some that we need are missing."""
    complete = [line for line in output.splitlines(keepends=True) if line.endswith("\n")]
    exports = [shlex.split(line)[1] for line in complete if line.startswith("export ")]
    settings = dict(each.split("=", 1) for each in exports)
    return settings if settings.keys() >= set(NEEDED) else None
