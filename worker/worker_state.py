"""How each worker fares, as it says itself every few seconds: one field a worker, in one Redis hash."""

import time
from typing import Any, Final

import redis
from pydantic import BaseModel, ConfigDict

SILENT_SECONDS: Final = 30.0  # three words missed: it is gone
FORGET_SECONDS: Final = 3600.0


class WorkerState(BaseModel):
    """`state` is what its dispatcher knows of it, or "stalled: " and why. Times are Unix times, in seconds."""

    model_config = ConfigDict(frozen=True)

    hostname: str
    pid: int
    started_at: float
    told_at: float
    state: str
    packs: int  # finished since its start


class WorkerStates:
    """What all workers of one stream tell. Each method may raise redis.RedisError."""

    def __init__(self, client: redis.Redis, stream: str) -> None:
        self._redis: Any = client
        self._key = f"{stream}:workers"

    def tell(self, worker: str, state: WorkerState) -> None:
        """Tell how this worker fares."""
        self._redis.hset(self._key, worker, state.model_dump_json())

    def forget(self, worker: str) -> None:
        """This worker ends."""
        self._redis.hdel(self._key, worker)

    def forget_the_silent(self) -> None:
        """Remove what workers told that were killed long ago."""
        for worker, state in self._all().items():
            if time.time() - state.told_at > FORGET_SECONDS:
                self.forget(worker)

    def alive(self) -> dict[str, WorkerState]:
        """By worker, those that told of themselves just now."""
        return {name: state for name, state in self._all().items() if time.time() - state.told_at < SILENT_SECONDS}

    def _all(self) -> dict[str, WorkerState]:
        records = self._redis.hgetall(self._key)
        return {worker.decode(): WorkerState.model_validate_json(raw) for worker, raw in records.items()}
