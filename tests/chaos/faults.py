"""The faults: each strikes, lasts a moment, and is mended."""

import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import psutil
import redis

from tests.chaos.proxy import Mode
from tests.chaos.theatre import Theatre

Fault = Callable[[Theatre], None]


def _moment(theatre: Theatre, longest: float = 2.0) -> None:
    """A random moment passes: the fault lasts, whatever the system does meanwhile."""
    time.sleep(theatre.rng.uniform(0.1, longest))


def kill_worker(theatre: Theatre) -> None:
    worker = theatre.any_worker()
    worker.kill()
    theatre.replace(worker)


def kill_child(theatre: Theatre) -> None:
    """A pool process of a worker that is under way, as the kernel does when memory is short.

    (A worker whose pool cannot start ends, and it is for Compose or Kubernetes to start it again.)
    """
    with suppress(psutil.NoSuchProcess):
        children = psutil.Process(theatre.any_ready_worker().pid).children()
        if children:
            theatre.rng.choice(children).kill()


def terminate_worker(theatre: Theatre) -> None:
    worker = theatre.any_worker()
    worker.terminate()
    theatre.replace(worker)


def stop_and_continue_worker(theatre: Theatre) -> None:
    """Longer than the reclaim time now and then: it wakes up and finds its work done by others."""
    worker = theatre.any_worker()
    worker.send_signal(signal.SIGSTOP)
    _moment(theatre, 8.0)
    worker.send_signal(signal.SIGCONT)


def restart_redis(theatre: Theatre) -> None:
    theatre.stack.redis.stop()
    _moment(theatre)
    theatre.stack.redis.start()
    theatre.set_memory_limit()


def pause_redis(theatre: Theatre) -> None:
    theatre.redis().client_pause(int(theatre.rng.uniform(100, 3000)))


def readonly_redis(theatre: Theatre) -> None:
    client = theatre.redis()
    client.replicaof("127.0.0.1", 1)  # of a master that is not there: it keeps its data and refuses writes
    _moment(theatre)
    client.replicaof("NO", "ONE")


def full_redis(theatre: Theatre) -> None:
    theatre.redis().config_set("maxmemory", "1mb")
    _moment(theatre)
    theatre.set_memory_limit()


def fill_redis(theatre: Theatre) -> None:
    """Filled with a backlog, and from then on nobody lifts the limit: it must drain by itself."""
    with theatre.paused_workers():
        theatre.fill_redis()
        _moment(theatre)


def restart_postgres(theatre: Theatre) -> None:
    theatre.stack.postgres.stop()
    _moment(theatre)
    theatre.stack.postgres.start()


def crash_postgres(theatre: Theatre) -> None:
    process = theatre.stack.postgres.process
    assert process is not None
    process.send_signal(signal.SIGQUIT)  # immediate: it recovers from its log
    process.wait()
    _moment(theatre)
    theatre.stack.postgres.start()


def kill_postgrest(theatre: Theatre) -> None:
    theatre.stack.postgrest.kill()
    _moment(theatre)
    theatre.stack.postgrest.start()


def _network(mode: Mode, *, to: str) -> Fault:
    def strike(theatre: Theatre) -> None:
        proxy = theatre.redis_proxy if to == "redis" else theatre.rest_proxy
        proxy.mode = mode
        _moment(theatre, 6.0 if mode == "black_hole" else 2.0)
        proxy.mode = "pass"

    return strike


FAULTS: Final[dict[str, Fault]] = {
    "worker: kill -9": kill_worker,
    "worker: kill -9 of a pool process": kill_child,
    "worker: SIGTERM": terminate_worker,
    "worker: SIGSTOP, SIGCONT": stop_and_continue_worker,
    "Redis: restart": restart_redis,
    "Redis: CLIENT PAUSE": pause_redis,
    "Redis: READONLY": readonly_redis,
    "Redis: out of memory": full_redis,
    "Redis: full, and never relieved": fill_redis,
    "Redis: network delays": _network("delay", to="redis"),
    "Redis: network resets": _network("reset", to="redis"),
    "Redis: network black hole": _network("black_hole", to="redis"),
    "Redis: replies cut": _network("cut_replies", to="redis"),
    "Postgres: restart": restart_postgres,
    "Postgres: immediate stop": crash_postgres,
    "PostgREST: kill -9": kill_postgrest,
    "PostgREST: network delays": _network("delay", to="rest"),
    "PostgREST: network resets": _network("reset", to="rest"),
    "PostgREST: network black hole": _network("black_hole", to="rest"),
    "PostgREST: replies cut": _network("cut_replies", to="rest"),
}


def mend(theatre: Theatre) -> None:
    """Whatever a fault that was interrupted may have left."""
    theatre.redis_proxy.mode = theatre.rest_proxy.mode = "pass"
    with suppress(redis.RedisError):
        theatre.set_memory_limit()


def in_random_order(rng: random.Random, times: int, names: list[str]) -> list[str]:
    """Each fault about equally often."""
    drawn = [names[number % len(names)] for number in range(times)]
    rng.shuffle(drawn)
    return drawn
