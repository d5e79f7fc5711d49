"""The state of each slot of a worker, in memory that its processes share.

A slot is a process of the pool, or a thread of a pool of threads, and drains the stream in one task at a time. Each
slot writes its own row; the dispatcher and the pulse, in the main process, read them all. A lock is not needed, as each
number is eight bytes and written in one step, and would be a danger: a process that is killed while it holds one never
gives it back.

Times are of time.monotonic(), which all processes of a machine share.
"""

import mmap
import os
import time
import uuid
from collections.abc import Iterator
from enum import IntEnum
from typing import Final

ROWS: Final = 1024
DISPATCHER: Final = ROWS - 1  # the slot of the main process, for a full Redis
_PID, _STATE, _STEPPED_AT, _PACKS, _WIDTH = range(5)
_FULL, _RECLAIM, _FLAGS = range(3)  # flags, stored after the rows

_memory = memoryview(mmap.mmap(-1, 8 * (ROWS * _WIDTH + _FLAGS))).cast("d")
_all_rows = [_memory[first : first + _WIDTH] for first in range(0, ROWS * _WIDTH, _WIDTH)]
_flags = _memory[ROWS * _WIDTH :]
_worker_id = ""


class State(IntEnum):
    """What a slot does. WAITING: for new events."""

    IDLE = 0
    WAITING = 1
    APPLYING = 2
    HOLDING = 3


class Slot:
    """One slot's own row; `number` tells it from the worker's other slots."""

    def __init__(self, number: int) -> None:
        self._row = _all_rows[number % ROWS]
        self.begin()

    def begin(self) -> None:
        """Take the row over: the process that had it before has ended."""
        self._row[_STATE] = State.IDLE
        self._row[_PID] = os.getpid()

    def step(self, state: State) -> None:
        """Note what this slot begins to do now."""
        self._row[_STEPPED_AT] = time.monotonic()
        self._row[_STATE] = state

    def count_pack(self) -> None:
        """Note that this slot has finished a pack."""
        self._row[_PACKS] += 1


def begin_worker(hostname: str) -> None:
    """Begin anew, in the main process of a worker (or in a test), before its pool starts."""
    global _worker_id
    _worker_id = f"{hostname}-{uuid.uuid4().hex[:12]}"  # another one at every start
    for number in range(len(_memory)):
        _memory[number] = 0.0


def worker_id() -> str:
    """This worker's id; the name of each of its consumers begins with it."""
    return _worker_id


def new_consumer() -> str:
    """A name for a consumer of this worker."""
    return f"{_worker_id}-{uuid.uuid4().hex[:6]}"


def worker_of(consumer: str) -> str:
    """The id of the worker whose consumer this is."""
    return consumer.rpartition("-")[0]


def busy() -> int:
    """How many slots drain the stream."""
    return sum(1 for row in _rows() if row[_STATE] != State.IDLE and _alive(int(row[_PID])))


def holding() -> bool:
    """Whether a slot waits for the end of a hold."""
    return any(row[_STATE] == State.HOLDING and _alive(int(row[_PID])) for row in _rows())


def stepped_at() -> float:
    """When a slot last began something; 0.0 where none ever has."""
    return max(row[_STEPPED_AT] for row in _rows())


def packs() -> int:
    """How many packs the worker's slots have finished."""
    return int(sum(row[_PACKS] for row in _rows()))


def note_full_claim() -> None:
    """Note that a claim came back full: another slot would find work, too."""
    _flags[_FULL] = 1.0


def take_full_claim() -> bool:
    """Whether a claim has come back full since the last call."""
    full, _flags[_FULL] = _flags[_FULL] != 0.0, 0.0
    return full


def ask_to_reclaim() -> None:
    """Let the next drain look for entries to reclaim, though it looked a moment ago."""
    _flags[_RECLAIM] = 1.0


def take_reclaim() -> bool:
    """Whether someone has asked to reclaim since the last call."""
    asked, _flags[_RECLAIM] = _flags[_RECLAIM] != 0.0, 0.0
    return asked


def _rows() -> Iterator["memoryview[float]"]:
    """The rows that have been taken: those of the pool, whose numbers begin at 0, and the dispatcher's."""
    for row in _all_rows:
        if not row[_PID]:
            break
        yield row
    yield _all_rows[DISPATCHER]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:  # it has ended, and perhaps another user's process has its id
        return False
    return True
