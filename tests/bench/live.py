"""What an engine sees: latency from publish to commit, and engines that publish as fast as they can."""

import multiprocessing
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from events import Event, Publisher, parse_event

POLL_SECONDS: Final = 0.002
BATCH: Final = 500
PATIENCE_SECONDS: Final = 600
SEEN: Final = "select event_id::text as id from public.interview_events where event_id = any (%s::uuid[])"


def latency_milliseconds(publisher: Publisher, database: Any, events: Sequence[Event], *, rate: float) -> list[float]:
    """Publish at a rate, and answer p50, p95 and p99 of the time from XADD's call to `applied_at`'s commit.

    Events carry the time of their making; Postgres' clock is ours. What is measured ends when the row is visible, so a
    listener polls the ledger; its period is part of each figure.
    """
    sent: dict[str, float] = {}
    seen: dict[str, float] = {}
    done = threading.Event()

    def listen() -> None:
        while len(seen) < len(events) and not done.is_set():
            waiting = [each for each in list(sent) if each not in seen]
            if waiting:
                rows = database.all(SEEN, waiting)
                now = time.perf_counter()
                seen.update({row["id"]: now for row in rows})
            time.sleep(POLL_SECONDS)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    began = time.perf_counter()
    for number, event in enumerate(events):
        while (ahead := began + number / rate - time.perf_counter()) > 0:
            time.sleep(ahead)
        sent[str(event.id)] = time.perf_counter()
        publisher.publish(event)
    listener.join(timeout=60)
    done.set()
    times = sorted((seen[each] - sent[each]) * 1000 for each in seen)
    assert len(times) == len(events), f"{len(events) - len(times)} events were not seen"
    cuts = statistics.quantiles(times, n=100)
    return [cuts[49], cuts[94], cuts[98]]


@contextmanager
def engines(shares: Sequence[Sequence[bytes]]) -> Iterator[Any]:
    """Processes, one a share, that have made their events, and publish them when the barrier that this gives falls."""
    spawned = multiprocessing.get_context("spawn")
    barrier = spawned.Barrier(len(shares) + 1)
    processes = [spawned.Process(target=_publish_all, args=(share, barrier)) for share in shares]
    for process in processes:
        process.start()
    yield barrier
    for process in processes:
        process.join(PATIENCE_SECONDS)
        assert process.exitcode == 0


def _publish_all(raw: Sequence[bytes], barrier: Any) -> None:
    """As an engine that is never still: BATCH events a call."""
    events = [parse_event(each) for each in raw]
    with Publisher() as publisher:
        barrier.wait(PATIENCE_SECONDS)
        for start in range(0, len(events), BATCH):
            publisher.publish_many(events[start : start + BATCH])
