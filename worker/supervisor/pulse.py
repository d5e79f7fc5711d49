"""The pulse: every few seconds it looks whether the worker works, and says so.

While all is well it touches the heartbeat file, which says that this process works, whatever its servers do. It also
writes the worker's state for `interviews status`. If the pulse itself should end, both fall silent, and that is the
alarm.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import redis

from worker import slots, stopping
from worker.logs import get_logger
from worker.settings import Settings
from worker.stream import SOCKET_TIMEOUT_SECONDS
from worker.supervisor.dispatcher import Dispatcher
from worker.worker_state import WorkerState, WorkerStates

PULSE_SECONDS: Final = 10.0
DISPATCHER_SECONDS: Final = 4 * SOCKET_TIMEOUT_SECONDS  # no step of the dispatcher takes longer, whatever Redis does
STALL_FACTOR: Final = 12  # RPC timeouts without a step of any slot: even a pack that is halved takes less

log = get_logger(__name__)


class Pulse:
    """Watches the dispatcher, which `dispatcher()` returns, started again where it died."""

    def __init__(
        self, settings: Settings, client: redis.Redis, hostname: str, dispatcher: Callable[[], Dispatcher]
    ) -> None:
        self.stalled = False
        self._dispatcher = dispatcher
        self._states = WorkerStates(client, settings.stream)
        self._hostname = hostname
        self._started = time.time()
        self._heartbeat_file = settings.heartbeat_file
        self._stall_seconds = STALL_FACTOR * settings.rpc_timeout_seconds

    def run(self) -> None:
        """Look until the worker stops."""
        try:
            self._states.forget_the_silent()
        except Exception:
            log.exception("pulse.failed")  # the next worker to start forgets them
        while not stopping.stopping():
            try:
                self.check()
            except Exception:
                log.exception("pulse.failed")
            stopping.wait(PULSE_SECONDS)
        with suppress(redis.RedisError):
            self._states.forget(slots.worker_id())

    def check(self) -> None:
        """Touch the heartbeat file unless something stands still, and write the state."""
        dispatcher = self._dispatcher()
        trouble = self._trouble(dispatcher)
        if trouble is None and self._heartbeat_file is not None:
            self._heartbeat_file.touch()
        if trouble is not None and not self.stalled:
            log.error("worker.stalled", why=trouble, next="restart this worker: its events are taken over")
        self.stalled = trouble is not None
        state = WorkerState(
            hostname=self._hostname,
            pid=os.getpid(),
            started_at=self._started,
            told_at=time.time(),
            state=f"stalled: {trouble}" if trouble else dispatcher.activity,
            packs=slots.packs(),
        )
        with suppress(redis.RedisError):  # the dispatcher says so
            self._states.tell(slots.worker_id(), state)

    def _trouble(self, dispatcher: Dispatcher) -> str | None:
        """What stands still and should not; Redis or Supabase being away is no fault of ours."""
        now = time.monotonic()
        stepped_at = slots.stepped_at()
        if (still := now - max(dispatcher.turned, stepped_at)) > DISPATCHER_SECONDS:
            return f"the dispatcher has stood still for {still:.0f} s"
        since = dispatcher.undelivered_since
        if since is not None and (still := now - max(since, stepped_at)) > self._stall_seconds:
            return f"events wait, and no process of this worker has done anything for {still:.0f} s"
        return None
