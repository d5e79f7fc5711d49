"""What an engine sees: latency from publish to commit, and engines that publish as fast as they can."""

import multiprocessing
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Final

from events import Event, Publisher, parse_event

POLL_SECONDS: Final = 0.002
BATCH: Final = 500
PATIENCE_SECONDS: Final = 600
LAST_SECONDS: Final = 60  # from the last event's publishing until it must be seen
WATCHED_PER_SECOND: Final = 150
SEEN: Final = "select event_id::text as id from public.interview_events where event_id = any (%s::uuid[])"


def latency_milliseconds(publisher: Publisher, database: Any, events: Sequence[Event], *, rate: float) -> list[float]:
    """Publish at a rate, and return p50, p95 and p99 of the time from XADD's call until the event is in the ledger.

    A listener polls the ledger; its period is part of each figure. It watches about WATCHED_PER_SECOND events a second,
    spread evenly over all, so that it does not compete with what it measures.
    """
    step = max(1, round(rate / WATCHED_PER_SECOND))
    sent: SimpleQueue[tuple[str, float]] = SimpleQueue()
    watched, times, done = len(events[::step]), list[float](), threading.Event()
    listener = threading.Thread(target=_listen, args=(database, sent, watched, times, done), daemon=True)
    listener.start()
    began = time.perf_counter()
    for number, event in enumerate(events):
        while (ahead := began + number / rate - time.perf_counter()) > 0:
            time.sleep(ahead)
        if number % step == 0:
            sent.put((str(event.id), time.perf_counter()))
        publisher.publish(event)
    listener.join(timeout=LAST_SECONDS)
    done.set()
    assert len(times) == watched, f"{watched - len(times)} events were not seen"
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return [cuts[49], cuts[94], cuts[98]]


def _listen(
    database: Any, sent: SimpleQueue[tuple[str, float]], watched: int, times: list[float], done: threading.Event
) -> None:
    """Add the milliseconds from sent to seen of each event, until all are there."""
    waiting: dict[str, float] = {}
    while len(times) < watched and not done.is_set():
        while not sent.empty():  # nobody else takes from it
            waiting.update([sent.get()])
        if waiting:
            rows = database.all(SEEN, list(waiting))
            now = time.perf_counter()
            times += [(now - waiting.pop(row["id"])) * 1000 for row in rows]
        time.sleep(POLL_SECONDS)


@contextmanager
def engines(url: str, stream: str, shares: Sequence[Sequence[bytes]]) -> Iterator[tuple[Any, list[Any]]]:
    """Processes, one a share, that have made their events, and publish them when the barrier falls; both are given."""
    spawned = multiprocessing.get_context("spawn")
    barrier = spawned.Barrier(len(shares) + 1)
    processes = [spawned.Process(target=_publish_all, args=(url, stream, share, barrier)) for share in shares]
    for process in processes:
        process.start()
    yield barrier, processes
    for process in processes:
        process.join(PATIENCE_SECONDS)
        assert process.exitcode == 0


def _publish_all(url: str, stream: str, raw: Sequence[bytes], barrier: Any) -> None:
    """As an engine that is never still: BATCH events a call."""
    events = [parse_event(each) for each in raw]
    with Publisher(url, stream=stream) as publisher:
        barrier.wait(PATIENCE_SECONDS)
        for start in range(0, len(events), BATCH):
            publisher.publish_many(events[start : start + BATCH])
