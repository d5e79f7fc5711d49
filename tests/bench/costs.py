"""What the work costs: CPU by process, memory, and what a worker does that has nothing to do."""

from contextlib import suppress
from typing import Any, Final

import psutil

from worker.embedded import Stack

MEBIBYTE: Final = 1 << 20


def family(pid: int) -> list[psutil.Process]:
    """A process and its children."""
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def cpu_seconds(stack: Stack, worker: int) -> dict[str, float]:
    """CPU seconds so far, by process; those of children that have ended are their parent's."""
    main, *pool = family(worker)
    servers = {"Redis": stack.redis, "PostgREST": stack.postgrest, "Postgres": stack.postgres}
    groups = {"worker, main process": [main], "worker, pool": pool}
    groups |= {name: family(server.process.pid) for name, server in servers.items() if server.process is not None}
    return {name: sum(map(_cpu_seconds, group)) for name, group in groups.items()}


def _cpu_seconds(process: psutil.Process) -> float:
    with suppress(psutil.NoSuchProcess):  # it ended just now
        return float(sum(process.cpu_times()[:4]))
    return 0.0


def memory_mebibytes(worker: int) -> float:
    """Private memory of a worker with its pool, in MiB."""
    return float(sum(each.memory_full_info().uss for each in family(worker))) / MEBIBYTE


def redis_commands(client: Any) -> int:
    """Commands that Redis has executed."""
    return int(client.info("stats")["total_commands_processed"])
