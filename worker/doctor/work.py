"""The work: the stream, the queue, the workers, and what holds them."""

import time
from collections.abc import Iterator
from shlex import quote
from typing import Any, Final

import redis

from worker.dead_share import DeadShare
from worker.doctor.finding import Finding
from worker.doctor.redis_cli import redis_cli
from worker.errors import Misconfigured
from worker.hold import hold_key, read_hold
from worker.settings import Settings, StreamSettings
from worker.stream import GROUP
from worker.worker_state import WorkerState, WorkerStates

SMALL_POOL: Final = 10  # connections of PostgREST on Supabase's small plans


def check_work(settings: StreamSettings, client: redis.Redis) -> Iterator[Finding]:
    """Check the keys, the workers and the hold. May raise redis.RedisError."""
    stream, cli = settings.stream, redis_cli(settings)
    events = _length(client, "xlen", stream)
    yield _counted("stream", stream, events, "events") if events is not None else _other("stream", stream, cli)
    if events is not None:
        yield check_group(client, stream, cli)
    messages = _length(client, "llen", settings.queue)
    yield (
        _counted("Celery queue", settings.queue, messages, "messages")
        if messages is not None
        else _other("Celery queue", settings.queue, cli)
    )
    yield check_workers(client, stream, events or 0)
    latch = check_dead_share(client, stream)
    yield latch
    yield check_hold(client, stream, latched=latch.state == "failed")


def check_group(client: redis.Redis, key: str, cli: str) -> Finding:
    """Is the group there, and does it still have to come to the oldest entry, or know who holds it?"""
    check = "consumer group"
    server: Any = client
    try:
        oldest = server.xrange(key, count=1)
        server.xinfo_consumers(key, GROUP)  # an operator may look at these, and not at groups
        groups = server.xinfo_groups(key)
    except redis.exceptions.NoPermissionError:
        return Finding(check, "ok", f"{GROUP} is there")
    except redis.ResponseError:
        return Finding(check, "ok", f"{GROUP} is not there yet: the first worker makes it")
    (group,) = (each for each in groups if each["name"] == GROUP.encode())
    if oldest and _passed_over(server, key, oldest[0][0], group["last-delivered-id"]):
        told = f"{GROUP} has passed over entries from {oldest[0][0].decode()} on: no worker will ever get them"
        remedy = f"# they come again, and what was applied stays as it is:\n{cli} XGROUP SETID {quote(key)} {GROUP} 0"
        return Finding(check, "failed", told, remedy)
    return Finding(check, "ok", f"{GROUP}, {group['pending']} entries claimed")


def _passed_over(server: Any, key: str, entry: bytes, last_delivered: bytes) -> bool:
    """Whether an entry was delivered, is in nobody's hands, and is still there: the group was made or moved by hand."""
    if _ordered(entry) > _ordered(last_delivered):
        return False
    return not server.xpending_range(key, GROUP, entry, entry, 1) and bool(server.xrange(key, entry, entry))


def _ordered(entry_id: bytes) -> tuple[int, ...]:
    return tuple(int(part) for part in entry_id.split(b"-"))


def check_workers(client: redis.Redis, key: str, events: int) -> Finding:
    """Is somebody at work, and does nobody stand still?"""
    check, alive = "workers", WorkerStates(client, key).alive()
    stalled = [state for state in alive.values() if state.state.startswith("stalled")]
    if stalled:
        return Finding(check, "failed", "; ".join(map(_stalled, stalled)), "\n".join(map(_restart, stalled)))
    if alive:
        return Finding(check, "ok", f"{len(alive)} alive, {sum(state.packs for state in alive.values())} packs so far")
    if events:
        told = f"none runs, and {events} events wait"
        return Finding(check, "failed", told, "celery -A worker worker")
    return Finding(check, "ok", "none runs, and nothing waits ('celery -A worker worker' starts one)")


def _stalled(worker: WorkerState) -> str:
    return f"{worker.hostname} is {worker.state}"


def _restart(worker: WorkerState) -> str:
    host = _one_line(worker.hostname.rpartition("@")[2])
    return f"# on {host} (or restart its container); its events are taken over:\nkill -TERM {worker.pid}"


def _one_line(told: str) -> str:
    """What others wrote must stay within its comment: a remedy is pasted in a shell."""
    return " ".join(told.split())


def check_dead_share(client: redis.Redis, key: str) -> Finding:
    """Did too many events become dead letters?"""
    try:
        DeadShare(client, key).check()
    except Misconfigured as closed:
        return Finding(
            "dead share",
            "failed",
            f"all workers hold: {closed}",
            "# which, and why: interviews dlq list\n"
            "# mend or roll back what was deployed, then go on (--accept 60: let them die):\n"
            "interviews resume",
        )
    return Finding("dead share", "ok", "no flood of dead letters")


def check_hold(client: redis.Redis, key: str, *, latched: bool) -> Finding:
    """Do the workers wait, and for whom?"""
    hold = read_hold(client, hold_key(key))
    if hold is None:
        return Finding("hold", "ok", "none")
    told = f"for {time.time() - hold.since:.0f} s: {hold.reason}"
    if hold.remedy is None or latched:
        return Finding("hold", "unknown", told, "# it ends by itself when its cause does; see the other checks")
    return Finding(
        "hold", "failed", told, f"# {_one_line(hold.remedy)}\n# then it ends by itself; see the other checks"
    )


def check_pool(settings: Settings, client: redis.Redis) -> Finding:
    """Workers that wait for a connection of PostgREST get PGRST003 and hold. It does not tell how many it has."""
    check, workers = "PostgREST pool", max(1, len(WorkerStates(client, settings.stream).alive()))
    wanted = workers * settings.concurrency
    told = f"{wanted} calls at once at most ({workers} x INTERVIEW_CONCURRENCY {settings.concurrency})"
    if wanted <= SMALL_POOL:
        return Finding(check, "ok", told)
    return Finding(
        check,
        "unknown",
        f"{told}; PostgREST does not tell its pool, {SMALL_POOL} on small plans",
        f"# have a pool of {wanted} or more (Supabase: Project Settings, Data API), or start all workers with:\n"
        f"export INTERVIEW_CONCURRENCY={max(1, SMALL_POOL // workers)}",
    )


def _length(client: redis.Redis, command: str, key: str) -> int | None:
    """How long a key's value is (0: there is none), None where it is of another type."""
    try:
        return int(getattr(client, command)(key))
    except redis.ResponseError as error:
        if not str(error).startswith("WRONGTYPE"):
            raise
        return None


def _counted(check: str, key: str, length: int, unit: str) -> Finding:
    return Finding(check, "ok", f"{key}, {length} {unit}")


def _other(check: str, key: str, cli: str) -> Finding:
    """It holds something of another type."""
    remedy = f"# out of the way with it; who writes it?\n{cli} RENAMENX {quote(key)} {quote(f'{key}:moved')}"
    return Finding(check, "failed", f"{key} holds something else: no event gets through", remedy)
