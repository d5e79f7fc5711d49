"""How a worker stops: one bit that its processes share, and an end to its blocking reads of Redis.

The bit is a byte of shared memory, mapped before the pool forks. No lock and no semaphore: a child killed at the wrong
moment could take those with it and hang the shutdown.
"""

import mmap
import time

import redis

SLICE_SECONDS = 0.1  # how soon a waiting task notices

_flag = mmap.mmap(-1, 1)


def stop() -> None:
    """Tell all processes of this worker; safe in a signal handler."""
    _flag[0] = 1


def resume() -> None:
    """Begin anew, in a process that starts a worker (or in a test)."""
    _flag[0] = 0


def stopping() -> bool:
    """Whether this worker is stopping."""
    return _flag[0] == 1


def wait(seconds: float) -> bool:
    """Sleep, but not through a stop; answer whether this worker is stopping."""
    deadline = time.monotonic() + seconds
    while not stopping() and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, SLICE_SECONDS))
    return stopping()


def wake(client: redis.Redis, name: str) -> None:
    """End the blocking read of each connection that bears this name. May raise redis.RedisError."""
    for each in client.client_list():
        if each["name"] == name:
            client.client_unblock(int(each["id"]))
