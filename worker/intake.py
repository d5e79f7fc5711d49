"""The intake: moves events from the stream to Celery's queue, a pack at a time, as fast as they are applied.

One thread in every worker's main process, which worker.supervisor starts and watches. It only moves: it parses
nothing, so no event can hurt it. It stands still while the queue is full, while Supabase is ill, and while the worker
stops.
"""

import random
import time
from collections.abc import Callable
from typing import Final, Literal

import redis
from kombu.exceptions import OperationalError

from worker import stopping
from worker.hold import hold_key, read_hold
from worker.logs import get_logger
from worker.pack import Pack
from worker.retry import Backoff
from worker.settings import Settings
from worker.stream import Entry, EventStream

BLOCK_MS: Final = 10_000  # longest wait for a first event; each ends in three commands of Redis
FULL_SECONDS: Final = 0.005  # between two looks at a full queue
LINGER_SECONDS: Final = 1.0  # longest wait for a free slot before few events are claimed
LINGER_POLL_SECONDS: Final = 0.002
HOLD_SECONDS: Final = 0.5  # between two looks at a hold
PACKS_QUEUED_PER_SLOT: Final = 2  # enough that no slot idles; the rest waits in the stream, open to all
PACK_BYTES: Final = 4 << 20  # of a pack's events at most: 500 of the largest would be 125 MiB in one RPC
SUSPECT_DELIVERIES: Final = 3  # an entry delivered more often is applied alone
IDLE_CONSUMER_FACTOR: Final = 10  # reclaim times after which the name of an ended worker is forgotten
REDIS_AWAY: Final = (redis.RedisError, OperationalError, OSError)

Activity = Literal["running", "holding", "redis away"]

log = get_logger(__name__)


class Intake:
    """Claims entries and sends them as packs until `stopping`.

    `send(pack)` puts a pack on Celery's queue, `queue_length()` counts those that wait there; both may raise
    what REDIS_AWAY names, and are tried again for ever. `taken()` counts the packs that this worker has taken from the
    queue and not finished. `activity` says what it does, `turned` when it last began a step, `waiting_since` since when
    packs have been waiting on the queue (all by time.monotonic).
    """

    def __init__(
        self,
        settings: Settings,
        client: redis.Redis,
        consumer: str,
        *,
        send: Callable[[Pack], None],
        queue_length: Callable[[], int],
        taken: Callable[[], int],
    ) -> None:
        self.consumer = consumer
        self._settings = settings
        self._redis = client
        self._stream = EventStream(client, settings.stream)
        self._send = send
        self._queue_length = queue_length
        self._taken = taken
        self._backoff = Backoff(base=0.1, cap=settings.backoff_seconds)
        self._reclaim_ms = int(settings.reclaim_seconds * 1000)
        self._next_reclaim = self._next_forgetting = 0.0
        self._unsent: list[Pack] = []
        self._count = settings.pack_size  # entries to claim next: fewer while they are large
        self._lingers_until = 0.0
        self.activity: Activity = "running"
        self.turned = time.monotonic()
        self.waiting_since: float | None = None

    def run(self) -> None:
        """Move events until the worker stops; whatever goes wrong, wait and go on."""
        failures = 0
        while not stopping.stopping():
            self.turned = time.monotonic()
            try:
                self._stream.ensure_group()
                if failures:
                    log.warning("intake.resumed", failures=failures)
                    failures = 0
                while not stopping.stopping():
                    self.step()
            except REDIS_AWAY as error:
                self.activity = "redis away"
                self.waiting_since = None
                if not failures:
                    log.warning("intake.redis_away", error=f"{type(error).__name__}: {error}")
            except Exception:
                log.exception("intake.failed")  # a fault of ours: say it, and do not leave the worker without intake
            failures += 1
            stopping.wait(self._backoff.seconds(failures, random.random()))  # noqa: S311 - jitter, not a secret
        self._give_back()

    def step(self) -> None:
        """Move one pack, or wait a moment where there is none or no room for one."""
        self.turned = time.monotonic()
        if self._unsent:
            self._send_all()
        elif self.turned < self._lingers_until and self._taken() >= self._settings.concurrency:
            stopping.wait(LINGER_POLL_SECONDS)  # what comes meanwhile travels in the same pack
        elif read_hold(self._redis, hold_key(self._settings.stream)) is not None:
            self.activity = "holding"
            self.waiting_since = None
            self._stream.keep(self.consumer)
            stopping.wait(HOLD_SECONDS)
        elif self._full():
            stopping.wait(FULL_SECONDS)
        else:
            self._unsent = _packs(self._claim_what_fits())
            self._send_all()

    def _full(self) -> bool:
        """Whether enough packs wait on the queue; notes since when any do."""
        length = self._queue_length()
        self.activity = "running"
        self.waiting_since = (self.waiting_since or self.turned) if length else None
        return length >= PACKS_QUEUED_PER_SLOT * self._settings.concurrency

    def _claim_what_fits(self) -> list[Entry]:
        """Claim a pack's entries; note whether more of them wait, and how large they are."""
        entries = self._claim()
        few = len(entries) < self._count
        self._lingers_until = time.monotonic() + LINGER_SECONDS if few else 0.0
        if entries:
            mean = max(1, sum(len(entry.event) for entry in entries) // len(entries))
            self._count = min(self._settings.pack_size, max(1, PACK_BYTES // mean))
        return entries

    def _claim(self) -> list[Entry]:
        now = time.monotonic()
        if now >= self._next_reclaim:
            entries = self._stream.claim_idle(self.consumer, self._count, idle_ms=self._reclaim_ms)
            if entries:
                log.info("intake.reclaimed", events=len(entries))
                return entries  # and look again at once: there may be more
            self._next_reclaim = now + self._settings.reclaim_seconds / 4
        if now >= self._next_forgetting:
            self._stream.forget_consumers(idle_ms=IDLE_CONSUMER_FACTOR * self._reclaim_ms)
            self._next_forgetting = now + self._settings.reclaim_seconds
        block_ms = min(BLOCK_MS, int(self._settings.reclaim_seconds * 250))
        return self._stream.claim_new(self.consumer, self._count, block_ms=max(1, block_ms))

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
    """Packs of PACK_BYTES at most, of the entries that are no suspects, and one pack for each suspect."""
    packs: list[list[Entry]] = []
    size = 0
    for entry in entries:
        if entry.deliveries <= SUSPECT_DELIVERIES:
            if not packs or size + len(entry.event) > PACK_BYTES:
                packs.append([])
                size = 0
            packs[-1].append(entry)
            size += len(entry.event)
    suspects = [Pack((each.id,), (each.event,), alone=True) for each in entries if each.deliveries > SUSPECT_DELIVERIES]
    return [Pack(tuple(each.id for each in pack), tuple(each.event for each in pack)) for pack in packs] + suspects
