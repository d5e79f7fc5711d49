"""What can go wrong in the worker, named by what it does about it.

WorkerError
├── SettingsError         say it in one line, exit with status 2
├── Unavailable           hold: claim nothing, dead-letter nothing, probe with backoff, resume by itself
│   └── Misconfigured     hold likewise, and say which command or SQL mends it
├── RefusedCall           one event makes the whole call fail: halve the pack until it stands alone, then dead-letter it
├── PackGivenBack         the worker stops, or held for too long: leave the pack to the next worker
└── RedisFull             drain the stream without Celery's queue, until there is room

worker.database translates what HTTP answers, and worker.queue a full Redis; the cause is kept. Other errors of Redis
pass as redis.RedisError: the dispatcher and the drain log them and go on.
Any other exception ends the task; its entries stay claimed and come again.
"""

MAX_RETRY_AFTER = 60.0  # seconds: nobody's wish makes us sleep for a day


class WorkerError(Exception):
    """Any error of this package."""


class SettingsError(WorkerError):
    """A setting is wrong or missing; the message is one line and says what to do."""


class Unavailable(WorkerError):
    """Supabase cannot take events now; `retry_after` is its own wish, in seconds."""

    def __init__(self, reason: str, *, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after = min(retry_after, MAX_RETRY_AFTER)


class Misconfigured(Unavailable):
    """Supabase refuses us until a person mends something; `remedy` says what."""

    def __init__(self, reason: str, *, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


class RefusedCall(WorkerError):
    """The database failed on this call's data; `detail` holds a code and no data."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail


class PackGivenBack(WorkerError):
    """This worker will not apply the pack; the stream hands it out again."""


class RedisFull(WorkerError):
    """Redis has reached its maxmemory, and refuses what is to be put in."""
