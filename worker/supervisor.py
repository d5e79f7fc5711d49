"""The bootstep of a worker's main process: runs the intake, watches it, and sees to it that the worker ends.

Two threads: the intake moves events, the pulse looks after it every few seconds. While all is well the pulse touches
the heartbeat file, which says that this process works, whatever its servers do; it also tells how the worker fares,
for `interviews status`. If the pulse itself should end, both fall silent, and that is the alarm.
"""

import inspect
import os
import select
import signal
import threading
import time
import uuid
from contextlib import suppress
from typing import Any, Final

import billiard
import redis
from celery import bootsteps
from celery.signals import task_received, worker_process_init, worker_shutting_down
from celery.worker.state import reserved_requests
from kombu.asynchronous import get_event_loop

from worker import metrics, stopping
from worker.dead_letters import REASONS
from worker.intake import BLOCK_MS, REDIS_AWAY, Intake
from worker.logs import get_logger
from worker.pack import Pack
from worker.scrape import Endpoint, serve
from worker.settings import Settings, load_settings
from worker.stream import SOCKET_TIMEOUT_SECONDS, connect
from worker.tasks import apply_events
from worker.transport import Transport
from worker.worker_state import WorkerState, WorkerStates

PULSE_SECONDS: Final = 10.0
BRPOP_SECONDS: Final = 10  # longest wait for a message: kombu's second would be 60 commands of Redis a minute
CELERY_HEARTBEAT_SECONDS: Final = 30
INTAKE_SECONDS: Final = 4 * SOCKET_TIMEOUT_SECONDS  # no step of the intake takes longer, whatever Redis does
STALL_FACTOR: Final = 12  # RPC timeouts without a pack taken from the queue: even a pack that is halved takes less

log = get_logger(__name__)


class Supervisor(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """Starts with the pool and stops before it, so that the pool drains after the last pack was claimed."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        Transport.brpop_timeout = BRPOP_SECONDS
        # Workers need not know each other; Flower may know them, at fewer of Redis' commands than one every 2 s.
        worker.options.update(without_gossip=True, without_mingle=True)
        worker.options["heartbeat_interval"] = worker.options.get("heartbeat_interval") or CELERY_HEARTBEAT_SECONDS
        stopping.resume()
        if load_settings().metrics_port is not None:
            metrics.set_up(REASONS)  # before the pool forks
            worker_process_init.connect(self._begin_process, weak=False)
        worker_shutting_down.connect(self._stop_in_time, weak=False)
        task_received.connect(self._pack_received, weak=False)
        self._threads: list[threading.Thread] = []
        self._endpoint: Endpoint | None = None
        self._asked = False

    def start(self, worker: Any) -> None:
        """Start both threads, and serve the metrics."""
        self._settings: Settings = load_settings()
        self._hostname = worker.hostname
        self._consumer = f"{worker.hostname}-{uuid.uuid4().hex[:12]}"  # another one at every start
        self._started, self._packs, self._received = time.time(), 0, time.monotonic()
        self._stalled = False
        self._redis = connect(self._settings)
        self._states = WorkerStates(self._redis, self._settings.stream)
        self._app = worker.app
        self._queue = worker.app.conf.task_default_queue
        self._start_intake()
        pulse = threading.Thread(target=self._pulse, name="pulse", daemon=True)
        pulse.start()
        self._threads = [self._intake_thread, pulse]
        self._endpoint = serve(self._settings, self._queue, self._numbers)
        log.info("intake.started", consumer=self._consumer, stream=self._settings.stream)

    def stop(self, worker: Any) -> None:
        """Stop claiming and wait for the threads; the pool drains after us."""
        stopping.stop()
        if not self._threads:
            return
        with suppress(redis.RedisError):  # then it wakes by itself
            stopping.wake(self._redis, self._consumer)
        if self._endpoint is not None:
            self._endpoint.close()
        for thread in self._threads:
            thread.join(timeout=BLOCK_MS / 1000 + 1)
        _finish_writes()

    terminate = stop

    def _start_intake(self) -> None:
        client = connect(self._settings, self._consumer)

        producer: Any = None  # kept from pack to pack: to connect for each would take a third of this process' time

        def send(pack: Pack) -> None:
            nonlocal producer
            producer = producer or self._app.amqp.Producer(self._app.connection_for_write())
            told = f"<{len(pack.events)} events>"  # instead of their content, where Celery shows arguments
            arguments = (self._consumer, pack.to_message())
            try:
                apply_events.apply_async(arguments, argsrepr=told, retry=False, producer=producer)
            except Exception:
                broken, producer = producer, None
                with suppress(*REDIS_AWAY):
                    broken.connection.release()
                raise

        def queue_length() -> int:
            length: Any = client.llen(self._queue)
            return int(length)

        self._intake = Intake(
            self._settings,
            client,
            self._consumer,
            send=send,
            queue_length=queue_length,
            taken=lambda: len(reserved_requests),
        )
        self._intake_thread = threading.Thread(target=self._intake.run, name="intake", daemon=True)
        self._intake_thread.start()

    # ------------------------------------------------------------------------------------------------ the pulse

    def _pulse(self) -> None:
        with suppress(redis.RedisError):  # then the next worker does
            self._states.forget_the_silent()
        while not stopping.stopping():
            try:
                self._look()
            except Exception:
                log.exception("pulse.failed")
            stopping.wait(PULSE_SECONDS)
        with suppress(redis.RedisError):
            self._states.forget(self._consumer)

    def _look(self) -> None:
        """Restart an intake that died, touch the heartbeat file unless something stands still, tell the state."""
        if not self._intake_thread.is_alive() and not stopping.stopping():
            log.error("intake.died", next="it is started again; report it")
            self._start_intake()
        trouble = self._trouble()
        if trouble is None and self._settings.heartbeat_file is not None:
            self._settings.heartbeat_file.touch()
        if trouble is not None and not self._stalled:
            log.error("worker.stalled", why=trouble, next="restart this worker: its events are taken over")
        self._stalled = trouble is not None
        state = WorkerState(
            hostname=self._hostname,
            pid=os.getpid(),
            started_at=self._started,
            told_at=time.time(),
            state=f"stalled: {trouble}" if trouble else self._intake.activity,
            packs=self._packs,
        )
        with suppress(redis.RedisError):  # the intake says so
            self._states.tell(self._consumer, state)

    def _trouble(self) -> str | None:
        """What stands still and should not; Redis or Supabase being away is no fault of ours."""
        now = time.monotonic()
        if (still := now - self._intake.turned) > INTAKE_SECONDS:
            return f"the intake has stood still for {still:.0f} s"
        since = self._intake.waiting_since
        if since is not None and (still := now - max(since, self._received)) > self._stall_seconds:
            return f"packs wait on the queue, and this worker has taken none for {still:.0f} s"
        return None

    @property
    def _stall_seconds(self) -> float:
        return STALL_FACTOR * self._settings.rpc_timeout_seconds

    def _pack_received(self, **_: Any) -> None:
        self._packs += 1
        self._received = time.monotonic()

    def _begin_process(self, **_: Any) -> None:
        """In a process of the pool that was just forked."""
        metrics.begin_process()
        if self._endpoint is not None:
            self._endpoint.leave()

    def _numbers(self) -> dict[str, float]:
        """What this process knows, by metric."""
        return {"interview_worker_stalled": self._stalled, "interview_worker_packs_total": self._packs}

    # -------------------------------------------------------------------------------------------------- the end

    def _stop_in_time(self, **_: Any) -> None:
        """SIGTERM: stop claiming before anything else stops, and be gone when the grace is over; again: be gone now."""
        stopping.stop()
        seconds, why = (0.0, "asked twice") if self._asked else (load_settings().grace_seconds, "the grace is over")
        self._asked = True
        end = threading.Timer(seconds, _end_now, (why,))
        end.daemon = True
        end.start()


def _finish_writes() -> None:
    """Write out the packs that are half in a pipe (64 KiB) to a process of the pool.

    At a warm shutdown Celery 5.7 closes the pool before it flushes it, and then forgets such a write: the mark of the
    end follows half a pack, and the process waits for the rest. What still writes is a generator among the event loop's
    writers; there is none in a pool of threads.
    """
    hub = get_event_loop()
    writers = hub.writers.items() if hub else ()
    writing = {fd: writer[0] for fd, writer in writers if writer and inspect.isgenerator(writer[0])}
    while writing:
        _, writable, _ = select.select([], list(writing), [])  # where a process hangs, until the grace is over
        for fd in writable:
            try:
                next(writing[fd])
            except (StopIteration, OSError):  # all is written, or the process is gone
                del writing[fd]


def _end_now(why: str) -> None:
    """End this worker, whatever it does: its entries stay claimed, and another claims them."""
    log.error("worker.ended_at_once", why=why)
    for child in billiard.active_children():
        with suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
    metrics.clean_up()
    os._exit(1)
