"""The dispatcher: sends a message to Celery's queue when events wait and no slot of this worker is busy.

One thread in every worker's main process. It claims nothing and remembers nothing: a message that is lost is sent
again, and a spare one finds an empty stream. Only while Redis is full, and refuses the message, it drains the stream
itself.
"""

import math
import random
import time
from collections.abc import Callable
from typing import Any, Final, Literal

import redis

from worker import slots, stopping
from worker.errors import RedisFull
from worker.hold import hold_key
from worker.logs import get_logger
from worker.queue.sender import QUEUE_AWAY
from worker.retry import Backoff
from worker.settings import Settings
from worker.stream import EventStream

BLOCK_MS: Final = 16_000  # longest wait for an event: shorter than the client's SOCKET_TIMEOUT_SECONDS
POLL_SECONDS: Final = 0.005  # between two looks at busy slots
HOLD_SECONDS: Final = 0.5  # between two looks at a hold
TURN_MS: Final = 50  # after one worker has sent, the other idle workers send nothing for this long
MAX_PAUSE_SECONDS: Final = 2.0  # longest pause after an event that another worker handled
RESEND_SECONDS: Final = 1.0  # send even out of turn when events have waited for longer
ANSWER_SECONDS: Final = 0.25  # longest wait for a slot to begin, after a message
PROGRESS_SECONDS: Final = 5.0  # busy slots that have begun nothing for so long are looked at

Activity = Literal["running", "holding", "redis away", "redis full"]

log = get_logger(__name__)


class Dispatcher:
    """Sends messages until the worker stops.

    `send()` puts a message on Celery's queue; it may raise what QUEUE_AWAY names, and RedisFull. `slots_there()`
    returns the number of slots. `drain()` drains the stream for some seconds, in this thread.

    For the pulse: `activity` is what the worker does; `turned` is when the dispatcher last began a step;
    `undelivered_since` is when it first saw undelivered entries that no slot has done anything about, None where there
    are none. Both are times of time.monotonic().
    """

    def __init__(
        self,
        settings: Settings,
        client: redis.Redis,
        *,
        send: Callable[[], None],
        slots_there: Callable[[], int],
        drain: Callable[[], None],
    ) -> None:
        self._redis: Any = client
        self._stream = EventStream(client, settings.stream)
        self._queue = settings.queue
        self._hold_key = hold_key(settings.stream)
        self._turn_key = f"{settings.stream}:turn"
        self._send = send
        self._slots_there = slots_there
        self._drain = drain
        self._backoff = Backoff(base=0.1, cap=settings.backoff_seconds)
        self._reclaim_ms = int(settings.reclaim_seconds * 1000)
        self._reclaim_every = settings.reclaim_seconds / 4
        self._next_reclaim = 0.0
        self._needless = 0  # events in a row that woke this dispatcher needlessly
        self.activity: Activity = "running"
        self.turned = time.monotonic()
        self.undelivered_since: float | None = None

    def run(self) -> None:
        """Dispatch until the worker stops; whatever goes wrong, wait and go on."""
        failures = 0
        while not stopping.stopping():
            try:
                self.step()
            except redis.exceptions.OutOfMemoryError:
                self._drain_here()  # Redis is too full even for the consumer group
                continue
            except QUEUE_AWAY as error:
                self.activity, self.undelivered_since = "redis away", None
                if not failures:
                    log.warning("dispatcher.redis_away", error=f"{type(error).__name__}: {error}")
            except Exception:
                log.exception("dispatcher.failed")  # a bug of ours: log it, and keep dispatching
            else:
                if failures:
                    log.warning("dispatcher.resumed", failures=failures)
                    failures = 0
                continue
            failures += 1
            stopping.wait(self._backoff.seconds(failures, random.random()))  # noqa: S311 - jitter, not a secret

    def step(self) -> None:
        """Send a message where one is due, or wait a moment."""
        self.turned = time.monotonic()
        if busy := slots.busy():
            self._watch_busy_slots(busy)
        elif self._reclaim_due():
            slots.ask_to_reclaim()
            self._dispatch()
        elif (entry_id := self._stream.wait_for_undelivered(block_ms=self._block_ms())) is not None:
            self.undelivered_since = self.undelivered_since or time.monotonic()
            self._dispatch(entry_id)
        else:
            self.activity, self.undelivered_since = "running", None
            self._needless = 0

    def _watch_busy_slots(self, busy: int) -> None:
        if slots.take_full_claim() and busy < self._slots_there():
            self._dispatch(another=True)
            return
        holding = slots.holding()
        self.activity = "holding" if holding else "running"
        if self.turned - slots.stepped_at() < PROGRESS_SECONDS or holding:
            self.undelivered_since = None
        elif self.undelivered_since is None and self._stream.wait_for_undelivered(block_ms=0) is not None:
            self.undelivered_since = self.turned
        stopping.wait(POLL_SECONDS)

    def _block_ms(self) -> int:
        """How long to wait for an event: not past the next look for entries to reclaim."""
        return max(1, min(BLOCK_MS, math.ceil((self._next_reclaim - time.monotonic()) * 1000)))

    def _reclaim_due(self) -> bool:
        """Whether an entry is to be reclaimed; nobody would notice while no events come."""
        if time.monotonic() < self._next_reclaim:
            return False
        self._next_reclaim = time.monotonic() + self._reclaim_every
        return bool(self._stream.idle(idle_ms=self._reclaim_ms, count=1))

    def _dispatch(self, entry_id: bytes | None = None, *, another: bool = False) -> None:
        """Send a message, unless a hold is in force or one waits already; `another`: for one more slot of this worker.

        An event (`entry_id`) wakes all idle workers. The first one to take the turn sends the message, unless a slot
        that was waiting for more has claimed the event already. The others pause, each time for longer.
        """
        if entry_id is not None and self._stream.is_delivered(entry_id):
            self.undelivered_since = None
            self._pause()
            return
        held, waiting, turn = self._check_queue(skip_turn=another or self._is_overdue())
        if stopping.stopping():
            return
        if held:
            self.activity, self.undelivered_since = "holding", None
            stopping.wait(HOLD_SECONDS)
        elif waiting and another:
            stopping.wait(TURN_MS / 1000)
        elif waiting or not turn:
            self._pause()
        else:
            self._needless = 0
            busy = slots.busy()
            try:
                self._send()
            except RedisFull:
                self._drain_here()
            else:
                self.activity = "running"
                self._wait_for_more_than(busy)

    def _pause(self) -> None:
        """Wait before the next look: an event woke this dispatcher, and it was not needed."""
        seconds = min(MAX_PAUSE_SECONDS, TURN_MS / 1000 * 2**self._needless)
        self._needless = min(self._needless + 1, 10)
        stopping.wait(random.uniform(0.5, 1.0) * seconds)  # noqa: S311 - jitter, not a secret

    def _is_overdue(self) -> bool:
        since = self.undelivered_since
        return since is not None and time.monotonic() - since > RESEND_SECONDS

    def _check_queue(self, *, skip_turn: bool) -> tuple[bool, bool, bool]:
        """Whether a hold is in force, whether a message waits on the queue, and whether it is our turn to send.

        `skip_turn`: take no turn, send in any case.
        """
        with self._redis.pipeline(transaction=False) as pipeline:
            pipeline.exists(self._hold_key)
            pipeline.llen(self._queue)
            if not skip_turn:
                pipeline.set(self._turn_key, 1, nx=True, px=TURN_MS)
            held, waiting, *turn = pipeline.execute(raise_on_error=False)
        for answer in (held, waiting):
            if isinstance(answer, Exception):
                raise answer
        # A full or read-only Redis refuses the turn. Send anyway: the error of `send` tells which of the two it is.
        return bool(held), bool(waiting), skip_turn or isinstance(turn[0], Exception) or bool(turn[0])

    def _wait_for_more_than(self, busy: int) -> None:
        deadline = time.monotonic() + ANSWER_SECONDS
        while time.monotonic() < deadline and slots.busy() <= busy:
            if stopping.wait(POLL_SECONDS / 2):
                return

    def _drain_here(self) -> None:
        """Make room: a full Redis takes no message, and takes events out as ever."""
        if self.activity != "redis full":
            log.warning("dispatcher.redis_full", next="it drains by itself; see 'interviews status'")
        self.activity = "redis full"
        self._drain()
