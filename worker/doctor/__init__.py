"""The doctor: one check for each thing that keeps events from becoming rows, and what mends it.

Nothing is changed: the RPCs that it calls are given no events, and Redis is only read. What cannot be checked because
something before it failed is left out.
"""

import time
from collections.abc import Callable, Iterator

import redis

from worker.doctor.broker import check_broker
from worker.doctor.environment import read_environment
from worker.doctor.finding import Finding, State
from worker.doctor.supabase_api import check_supabase
from worker.doctor.work import check_pool, check_work
from worker.settings import Settings, StreamSettings
from worker.stream import connect

__all__ = ["Finding", "State", "examine", "examine_environment"]

Clock = Callable[[], float]  # Unix time


def examine(settings: Settings, *, clock: Clock = time.time) -> Iterator[Finding]:
    """Run all checks but that of the settings themselves, one after the other; takes a second or two."""
    yield from _of_redis(settings, clock)
    yield from check_supabase(settings, clock)


def examine_environment(*, clock: Clock = time.time) -> Iterator[Finding]:
    """Read the settings from the environment, and run all checks that they allow."""
    environment = read_environment()
    yield from environment.findings
    if environment.for_redis is not None:
        yield from _of_redis(environment.for_redis, clock)
    if environment.for_supabase is not None:
        yield from check_supabase(environment.for_supabase, clock)


def _of_redis(settings: StreamSettings, clock: Clock) -> Iterator[Finding]:
    with connect(settings, "interviews-doctor") as client:
        try:
            reachable = yield from check_broker(settings, client, clock)
            if reachable:
                yield from check_work(settings, client)
                if isinstance(settings, Settings):
                    yield check_pool(settings, client)
        except redis.exceptions.NoPermissionError:
            look = "# run the doctor with a user of Redis that may read the keys of the workers"
            yield Finding("Redis user", "unknown", "this user of Redis may not look at the rest", look)
        except redis.RedisError as error:
            yield Finding("Redis", "failed", f"it ceased to answer ({type(error).__name__})", "# look at its log")
