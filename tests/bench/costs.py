"""What the work costs: CPU by process, memory, and commands to Redis."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import click
import psutil

MEBIBYTE: Final = 1 << 20
SERVERS: Final = {"Redis": "REDIS_URL", "PostgREST": "SUPABASE_URL", "Postgres": "DATABASE_URL"}
WORKER: Final = ("worker, main process", "worker, pool")


@dataclass(frozen=True)
class Spent:
    """What was spent while something was done."""

    seconds: float
    cpu_seconds: Mapping[str, float]  # by process
    redis_commands: int

    def cpu_of(self, names: Iterable[str]) -> float:
        return sum(self.cpu_seconds[name] for name in names)


def find_servers(environment: Mapping[str, str], parent: int) -> dict[str, int]:
    """The process ids of the servers, found among a process' children by the port that each listens on."""
    listening = {
        connection.laddr.port: child.pid
        for child in psutil.Process(parent).children()
        for connection in child.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    ports = {name: urlsplit(environment[variable]).port for name, variable in SERVERS.items()}
    if missing := [name for name, port in ports.items() if port not in listening]:
        raise click.ClickException(f"no process of {parent} listens on the port of {', '.join(missing)}")
    return {name: listening[port] for name, port in ports.items()}


def family(pid: int) -> list[psutil.Process]:
    """A process and its children."""
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def cpu_seconds(servers: Mapping[str, int], workers: Iterable[int]) -> dict[str, float]:
    """CPU seconds so far, by process; those of children that have ended are their parent's."""
    families = [family(worker) for worker in workers]
    groups = dict(
        zip(WORKER, ([main for main, *_ in families], [each for _, *pool in families for each in pool]), strict=True)
    )
    groups |= {name: family(pid) for name, pid in servers.items()}
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
