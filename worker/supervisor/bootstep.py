"""The bootstep that starts and ends what the main process does beside Celery."""

import threading
from contextlib import suppress
from typing import Any

import redis
from celery import bootsteps
from celery.signals import worker_process_init, worker_shutting_down

from worker import metrics, slots, stopping
from worker.apply.context import Context
from worker.apply.drain import Drain
from worker.apply.tasks import apply_events
from worker.dead_letters import REASONS
from worker.logs import get_logger
from worker.queue.options import set_worker_options
from worker.queue.pool import slots_of
from worker.queue.sender import Sender
from worker.scrape import Endpoint, serve
from worker.settings import Settings, load_settings
from worker.stream import connect
from worker.supervisor.dispatcher import BLOCK_MS, Dispatcher
from worker.supervisor.pulse import Pulse
from worker.supervisor.shutdown import Shutdown

log = get_logger(__name__)


class Supervisor(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """Starts after the pool and stops before it: no message is sent while the pool finishes its tasks."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        set_worker_options(worker)
        stopping.resume()
        slots.begin_worker(worker.hostname)
        settings = load_settings()
        if settings.metrics_port is not None:
            metrics.set_up(REASONS)  # before the pool forks
            worker_process_init.connect(self._begin_process, weak=False)
        self._shutdown = Shutdown(settings.grace_seconds)
        worker_shutting_down.connect(self._shutdown.begin, weak=False)
        self._threads: list[threading.Thread] = []
        self._endpoint: Endpoint | None = None

    def start(self, worker: Any) -> None:
        """Start the dispatcher and the pulse, and serve the metrics."""
        self._settings: Settings = load_settings()
        self._redis = connect(self._settings)
        self._worker = worker
        self._drain = _own_drain(self._settings)
        self._start_dispatcher()
        self._pulse = Pulse(self._settings, self._redis, worker.hostname, self._living_dispatcher)
        pulse = threading.Thread(target=self._pulse.run, name="pulse", daemon=True)
        pulse.start()
        self._threads = [self._dispatcher_thread, pulse]
        self._endpoint = serve(self._settings, self._settings.queue, self._numbers)
        log.info("worker.started", worker=slots.worker_id(), stream=self._settings.stream)

    def stop(self, worker: Any) -> None:
        """Stop claiming, and join the threads; the pool stops after this."""
        stopping.stop()
        if not self._threads:
            return
        with suppress(redis.RedisError):  # then their blocking reads time out
            stopping.wake(self._redis, slots.worker_id())
        if self._endpoint is not None:
            self._endpoint.close()
        for thread in self._threads:
            thread.join(timeout=BLOCK_MS / 1000 + 1)

    terminate = stop

    def _start_dispatcher(self) -> None:
        self._dispatcher = Dispatcher(
            self._settings,
            connect(self._settings, slots.worker_id()),
            send=Sender(self._worker.app, apply_events).send,
            slots_there=lambda: slots_of(self._worker),
            drain=lambda: self._drain.run(suspects=False),
        )
        self._dispatcher_thread = threading.Thread(target=self._dispatcher.run, name="dispatcher", daemon=True)
        self._dispatcher_thread.start()

    def _living_dispatcher(self) -> Dispatcher:
        """The dispatcher, started again where its thread has died."""
        if not self._dispatcher_thread.is_alive() and not stopping.stopping():
            log.error("dispatcher.died", next="it is started again; report it")
            self._start_dispatcher()
        return self._dispatcher

    def _begin_process(self, **_: Any) -> None:
        """In a process of the pool that was just forked."""
        metrics.begin_process()
        if self._endpoint is not None:
            self._endpoint.leave()

    def _numbers(self) -> dict[str, float]:
        """What this process knows, by metric."""
        return {"interview_worker_stalled": self._pulse.stalled, "interview_worker_packs_total": slots.packs()}


def _own_drain(settings: Settings) -> Drain:
    """A drain for the main process, while Redis is full.

    Its client of Supabase is made now, in the thread that forks: a process that is forked while another thread makes
    one could wait for that thread's locks for ever.
    """
    context = Context(settings)
    context.warm_up()
    return context.drain(slots.DISPATCHER)
