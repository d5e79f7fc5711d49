"""The intake: moves events from the stream to Celery's queue, a pack at a time, as fast as they are applied.

One thread in every worker's main process, a bootstep of Celery's. It only moves: it parses nothing, so no event
can hurt it. It stands still while the queue is full, while Supabase is ill, and while the worker stops.
"""

import random
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import redis
from celery import bootsteps
from celery.signals import worker_shutting_down
from kombu.exceptions import OperationalError

from worker import stopping
from worker.hold import hold_key, read_hold
from worker.logs import get_logger
from worker.pack import Pack
from worker.retry import Backoff
from worker.settings import Settings, load_settings
from worker.stream import Entry, EventStream, connect
from worker.tasks import apply_events

BLOCK_MS: Final = 5000  # longest wait for a first event
FULL_SECONDS: Final = 0.005  # between two looks at a full queue
HOLD_SECONDS: Final = 0.5  # between two looks at a hold
PACKS_QUEUED_PER_SLOT: Final = 2  # enough that no slot idles; the rest waits in the stream, open to all
SUSPECT_DELIVERIES: Final = 3  # an entry delivered more often is applied alone
IDLE_CONSUMER_FACTOR: Final = 10  # reclaim times after which the name of an ended worker is forgotten
REDIS_AWAY: Final = (redis.RedisError, OperationalError, OSError)

log = get_logger(__name__)


class Intake:
    """Claims entries and sends them as packs until `stopping`.

    `send(pack)` puts a pack on Celery's queue, `queue_length()` counts those that wait there; both may raise
    what REDIS_AWAY names, and are tried again for ever.
    """

    def __init__(
        self,
        settings: Settings,
        client: redis.Redis,
        consumer: str,
        *,
        send: Callable[[Pack], None],
        queue_length: Callable[[], int],
    ) -> None:
        self.consumer = consumer
        self._settings = settings
        self._redis = client
        self._stream = EventStream(client, settings.stream)
        self._send = send
        self._queue_length = queue_length
        self._backoff = Backoff(base=0.1, cap=settings.backoff_seconds)
        self._reclaim_ms = int(settings.reclaim_seconds * 1000)
        self._next_reclaim = 0.0
        self._unsent: list[Pack] = []

    def run(self) -> None:
        """Move events until the worker stops; whatever goes wrong, wait and go on."""
        failures = 0
        while not stopping.stopping():
            try:
                self._stream.ensure_group()
                if failures:
                    log.warning("intake.resumed", failures=failures)
                    failures = 0
                while not stopping.stopping():
                    self.step()
            except REDIS_AWAY as error:
                if not failures:
                    log.warning("intake.redis_away", error=f"{type(error).__name__}: {error}")
            except Exception:
                log.exception("intake.failed")  # a fault of ours: say it, and do not leave the worker without intake
            failures += 1
            stopping.wait(self._backoff.seconds(failures, random.random()))  # noqa: S311 - jitter, not a secret
        self._give_back()

    def step(self) -> None:
        """Move one pack, or wait a moment where there is none or no room for one."""
        if self._unsent:
            self._send_all()
        elif read_hold(self._redis, hold_key(self._settings.stream)) is not None:
            self._stream.keep(self.consumer)
            stopping.wait(HOLD_SECONDS)
        elif self._queue_length() >= PACKS_QUEUED_PER_SLOT * self._settings.concurrency:
            stopping.wait(FULL_SECONDS)
        else:
            self._unsent = _packs(self._claim())
            self._send_all()

    def _claim(self) -> list[Entry]:
        count = self._settings.pack_size
        if time.monotonic() >= self._next_reclaim:
            entries = self._stream.claim_idle(self.consumer, count, idle_ms=self._reclaim_ms)
            if entries:
                log.info("intake.reclaimed", events=len(entries))
                return entries  # and look again at once: there may be more
            self._stream.forget_consumers(idle_ms=IDLE_CONSUMER_FACTOR * self._reclaim_ms)
            self._next_reclaim = time.monotonic() + self._settings.reclaim_seconds / 4
        block_ms = min(BLOCK_MS, int(self._settings.reclaim_seconds * 250))
        return self._stream.claim_new(self.consumer, count, block_ms=max(1, block_ms))

    def _send_all(self) -> None:
        while self._unsent and not stopping.stopping():
            self._send(self._unsent[0])
            del self._unsent[0]

    def _give_back(self) -> None:
        """Let another worker claim at once what we claimed and did not send."""
        for pack in self._unsent:
            try:
                self._stream.give_back(self.consumer, pack.entry_ids, idle_ms=self._reclaim_ms)
            except redis.RedisError:
                return  # claimed by another after the reclaim time


def _packs(entries: list[Entry]) -> list[Pack]:
    """One pack of the entries that are no suspects, and one for each suspect."""
    suspects = [entry for entry in entries if entry.deliveries > SUSPECT_DELIVERIES]
    others = [entry for entry in entries if entry.deliveries <= SUSPECT_DELIVERIES]
    packs = [Pack((entry.id,), (entry.event,), alone=True) for entry in suspects]
    if others:
        packs.insert(0, Pack(tuple(e.id for e in others), tuple(e.event for e in others)))
    return packs


class IntakeStep(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """Runs the intake from the pool's start until the worker's stop, which it precedes."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **options: Any) -> None:
        super().__init__(worker, **options)
        stopping.resume()
        worker_shutting_down.connect(_stop_at_once)
        self._thread: threading.Thread | None = None

    def start(self, worker: Any) -> None:
        """Start the thread."""
        self._settings: Settings = load_settings()
        self._consumer = f"{worker.hostname}-{uuid.uuid4().hex[:12]}"  # another one at every start
        client = connect(self._settings, self._consumer)
        queue = worker.app.conf.task_default_queue

        def send(pack: Pack) -> None:
            told = f"<{len(pack.events)} events>"  # instead of their content, where Celery shows arguments
            apply_events.apply_async((self._consumer, pack.to_message()), argsrepr=told, retry=False)

        def queue_length() -> int:
            return int(client.llen(queue))

        intake = Intake(self._settings, client, self._consumer, send=send, queue_length=queue_length)
        self._thread = threading.Thread(target=intake.run, name="intake", daemon=True)
        self._thread.start()
        log.info("intake.started", consumer=self._consumer, stream=self._settings.stream)

    def stop(self, worker: Any) -> None:
        """Stop claiming and wait for the thread; the pool drains after us."""
        stopping.stop()
        if self._thread is None or not self._thread.is_alive():
            return
        with suppress(redis.RedisError):  # then it wakes by itself
            EventStream(connect(self._settings), self._settings.stream).wake(self._consumer)
        self._thread.join(timeout=BLOCK_MS / 1000 + 1)

    terminate = stop


def _stop_at_once(**_: Any) -> None:
    """SIGTERM: stop claiming before anything else stops."""
    stopping.stop()
