"""The hold: while Supabase is ill nobody claims, nothing is dead-lettered, and one task of all workers probes.

The hold is one Redis key, made by the first task that fails (the prober), which says since when and why. It is
a lease: the prober renews it with every probe and deletes it when Supabase is well; should the prober die, it
lapses, and the next task to fail becomes the prober. Nobody claims while the key is there.
"""

import json
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeVar

import redis

from worker import stopping
from worker.errors import Misconfigured, PackGivenBack, Unavailable
from worker.logs import get_logger
from worker.retry import Backoff
from worker.settings import Settings

T = TypeVar("T")

POLL_SECONDS: Final = 1.0  # at most, between two looks of a task that waits for the prober (full jitter)
LEASE_MARGIN_SECONDS: Final = 10.0

RESUMES: Final = "none: it resumes by itself"

log = get_logger(__name__)


@dataclass(frozen=True)
class HoldState:
    """Why nothing is applied, since when (Unix time), and what mends it where a person must."""

    reason: str
    since: float
    remedy: str | None = None


class Hold:
    """Runs calls to Supabase through its outages. One per process."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        self._redis: Any = client
        self._key = hold_key(settings.stream)
        self._backoff = Backoff(base=0.2, cap=settings.backoff_seconds)
        self._lease_seconds = settings.backoff_seconds + settings.rpc_timeout_seconds + LEASE_MARGIN_SECONDS
        self._hold_seconds = settings.hold_seconds

    def run(self, call: Callable[[], T], *, waiting: Callable[[], None] = lambda: None) -> T:
        """Call until Supabase takes it; meanwhile call `waiting`, every second or more often.

        Raises PackGivenBack when the worker stops meanwhile or the outage outlasts `hold_seconds`, and whatever
        `call` raises besides Unavailable.
        """
        try:
            return call()
        except Unavailable as ill:
            return self._run_through_outage(call, ill, waiting)

    def _run_through_outage(self, call: Callable[[], T], ill: Unavailable, waiting: Callable[[], None]) -> T:
        began, attempt, probing = time.monotonic(), 0, False
        while True:
            probing = self._renew(ill) if probing else self._begin(ill)
            wait = self._backoff.seconds(attempt, random.random())  # noqa: S311 - jitter, not a secret
            attempt += 1
            pause = max(wait, ill.retry_after)
            stopped = _pause(pause, waiting) if probing else self._wait_for_prober(waiting)
            if stopped or time.monotonic() - began > self._hold_seconds:
                if probing:
                    self._hand_over()
                raise PackGivenBack(ill.reason)
            try:
                result = call()
            except Unavailable as still:
                ill = still
                continue
            except BaseException:
                self._end(probing)  # it answered, be it with a refusal
                raise
            self._end(probing)
            return result

    def _begin(self, ill: Unavailable) -> bool:
        """Become the prober unless there is one; answer whether we are."""
        state = _state(ill, since=time.time())
        try:
            first = bool(self._redis.set(self._key, json.dumps(asdict(state)), nx=True, px=self._lease_ms(ill)))
        except redis.RedisError:
            return True  # Redis is away too: probe for ourselves
        if first:
            log.warning("hold.began", reason=state.reason, remedy=state.remedy or RESUMES)
        return first

    def _renew(self, ill: Unavailable) -> bool:
        """Go on as the prober, telling what is the matter now."""
        try:
            before = read_hold(self._redis, self._key)
            if before is None:
                return self._begin(ill)
            now = _state(ill, since=before.since)
            self._redis.set(self._key, json.dumps(asdict(now)), px=self._lease_ms(ill))
        except redis.RedisError:
            return True
        if now.remedy != before.remedy:
            log.warning("hold.changed", reason=now.reason, remedy=now.remedy or RESUMES)
        return True

    def _lease_ms(self, ill: Unavailable) -> int:
        return int((self._lease_seconds + ill.retry_after) * 1000)

    def _wait_for_prober(self, waiting: Callable[[], None]) -> bool:
        """Wait until the hold is over or its prober is gone; return whether the worker is stopping."""
        while not _pause(random.random() * POLL_SECONDS, waiting):  # noqa: S311 - jitter, not a secret
            try:
                if not self._redis.exists(self._key):
                    return False
            except redis.RedisError:
                return False
        return True

    def _end(self, probing: bool) -> None:
        if not probing:
            return
        try:
            state = read_hold(self._redis, self._key)
            self._redis.delete(self._key)
        except redis.RedisError:
            return  # it lapses by itself
        if state is not None:
            log.warning("hold.ended", reason=state.reason, seconds=round(time.time() - state.since, 1))

    def _hand_over(self) -> None:
        """Let another worker's task probe at once."""
        try:
            self._redis.delete(self._key)
        except redis.RedisError:
            return
        log.warning("hold.handed_over")


def _pause(seconds: float, waiting: Callable[[], None]) -> bool:
    """Wait, calling `waiting` every POLL_SECONDS; return whether the worker is stopping."""
    deadline = time.monotonic() + seconds
    while True:
        waiting()
        left = deadline - time.monotonic()
        if stopping.wait(min(left, POLL_SECONDS)) or left <= POLL_SECONDS:
            return stopping.stopping()


def _state(ill: Unavailable, *, since: float) -> HoldState:
    return HoldState(ill.reason, since, ill.remedy if isinstance(ill, Misconfigured) else None)


def hold_key(stream: str) -> str:
    """The Redis key of the hold, beside its stream."""
    return f"{stream}:hold"


def read_hold(client: redis.Redis, key: str) -> HoldState | None:
    """The hold that is in force, None where all is well. Raises redis.RedisError."""
    raw: Any = client.get(key)
    if not raw:
        return None
    fields = json.loads(raw)  # perhaps of a worker of another version
    return HoldState(fields["reason"], fields["since"], fields.get("remedy"))
