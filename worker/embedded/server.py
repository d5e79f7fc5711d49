"""One server process: started, found ready, stopped, and never left behind."""

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

READY_SECONDS = 60.0
STOP_SECONDS = 15.0
_PR_SET_PDEATHSIG = 1


class StackError(Exception):
    """The embedded stack cannot be had; the message is one line and says what to do."""


@dataclass
class Server:
    """A child process in a session of its own, so that Ctrl-C reaches it through us and in our order.

    `ready` is called until it returns True; what it raises counts as "not yet".
    `stop_signals` are sent one after the other, each with `STOP_SECONDS` to work.
    """

    name: str
    argv: Sequence[str]
    log: Path
    ready: Callable[[], bool]
    env: dict[str, str] = field(default_factory=dict)
    user: str | None = None
    stop_signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGKILL)
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start and wait until ready; raise StackError with the log's last line otherwise."""
        try:
            self._spawn()
        except OSError as error:
            raise StackError(f"{self.name} cannot be started: {error}") from error
        self._wait_until_ready()

    def _spawn(self) -> None:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(  # noqa: S603 - our own argument list, no shell
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.env},
                user=self.user,
                group=None if self.user is None else primary_group(self.user),
                extra_groups=None if self.user is None else [],
                start_new_session=True,
                preexec_fn=self._die_with_parent,
                cwd="/",
            )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not self._is_ready():
            if self.process is None or self.process.poll() is not None:
                raise StackError(f"{self.name} ended at its start: {self._last_line()} (see {self.log})")
            if time.monotonic() > deadline:
                self.stop()
                raise StackError(f"{self.name} was not ready after {READY_SECONDS:.0f} s (see {self.log})")
            time.sleep(0.02)

    def stop(self) -> None:
        """Stop, harder with every signal; harmless when it does not run."""
        for number in self.stop_signals:
            if self.process is None or self.process.poll() is not None:
                break
            self.process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        self.process = None

    def kill(self) -> None:
        """End at once, as a crash would (for tests of recovery)."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _is_ready(self) -> bool:
        try:
            return self.ready()
        except Exception:  # noqa: BLE001 - not up yet, in whatever way its client says so
            return False

    def _last_line(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()
        return lines[-1] if lines else "it printed nothing"

    def _die_with_parent(self) -> None:
        """Let the kernel stop it when we are killed with -9 (Linux only)."""
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, self.stop_signals[0])


def primary_group(user: str) -> int:
    """The group id of a system user."""
    import pwd

    return pwd.getpwnam(user).pw_gid


def free_port(wanted: int | None = None, *, but: Collection[int] = ()) -> int:
    """A free TCP port of 127.0.0.1: the wanted one where it is free, else any `but` these.

    Below those that the system gives to outgoing connections: one of them could take it before its server does. Drawn
    from the system's randomness: a seeded program beside us, as a test run, would draw the same.
    """
    for port in (*([wanted] if wanted else []), *random.SystemRandom().sample(range(20_000, 32_000), 100), 0):
        if port in but:
            continue
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise StackError("no free TCP port on 127.0.0.1")
