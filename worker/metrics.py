"""Prometheus metrics: all of them, each with the operator's question as its help text; labels are bounded, never an id.

Off until a worker calls set_up, and then what counts here does nothing. Each process that applies packs counts in
files of its own, in one folder (prometheus_client's multiprocess mode), and the main process adds them up when it is
asked (worker.scrape). So what a killed process has counted is neither lost nor counted again; an event whose process
is killed between the commit and the count is counted once, as a duplicate, when it comes again. Counting never hurts
the work: a process that cannot write its files says so once, and counts no more.
"""

import atexit
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, Final, ParamSpec

from worker.errors import Misconfigured, RefusedCall, Unavailable
from worker.logs import get_logger

if TYPE_CHECKING:
    from prometheus_client import Counter, Histogram

P = ParamSpec("P")

HELP: Final = {
    # counted by the processes that apply packs
    "interview_events_applied_total": "How many events were applied?",
    "interview_events_duplicate_total": "How many events came again, and changed nothing?",
    "interview_events_waiting_total": "How many events came before their session's start, and were put to wait for it?",
    "interview_events_dead_again_total": "How many events failed again that were open dead letters already?",
    "interview_events_dead_lettered_total": "How many events became dead letters, and why?",
    "interview_event_lag_seconds": "How old are events, by their own time, when they are applied?",
    "interview_pack_events": "How many events make a pack?",
    "interview_rpc_seconds": "How long do Supabase's RPCs take, and how do they end?",
    # known to the main process
    "interview_worker_stalled": "Does this worker stand still though there is work (1)?",
    "interview_worker_packs_total": "How many packs has this worker finished?",
    # asked of Redis at each scrape, and absent while it is away
    "interview_redis_up": "Does Redis answer this worker (1)?",
    "interview_stream_entries": "How many events are in the stream, claimed or not?",
    "interview_stream_claimed": "How many events of the stream has a worker claimed?",
    "interview_stream_oldest_seconds": "How long has the oldest event been in the stream (0: there is none)?",
    "interview_messages_queued": "How many messages wait on Celery's queue?",
    "interview_hold": "Is a hold in force (1), so that nothing is applied?",
    # asked of Supabase now and then, and absent while it is ill
    "interview_dead_letters_open": "How many dead letters are open?",
    "interview_ledger_waiting_events": "How many events wait in the ledger for the start of their session?",
}
LAG_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 300, 900, 3600, 14400, 86400)
PACK_EVENTS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
RPC_SECONDS: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
RPCS: Final = ("apply_interview_events_summary", "record_dead_interview_events")
STATUSES: Final = ("ok", "unavailable", "misconfigured", "refused")
SPACE_BYTES: Final = 1 << 20  # several times what the files of one process take

log = get_logger(__name__)


@dataclass(frozen=True)
class Metrics:
    """What is counted; `outcomes` by the names that worker.outcomes lists, but for the reasons."""

    outcomes: Mapping[str, "Counter"]
    dead_lettered: "Counter"  # by reason
    lag_seconds: "Histogram"
    pack_events: "Histogram"
    rpc_seconds: "Histogram"  # by rpc and status


_metrics: Metrics | None = None  # of this process
_folder: str | None = None  # of this worker
_owner: int | None = None  # its main process


def set_up(reasons: Iterable[str]) -> None:
    """Count from now on, in this process and in those that it forks later; `reasons` are those of dead letters."""
    global _metrics, _folder, _owner
    if _folder is not None:
        return
    try:
        _folder, _owner = tempfile.mkdtemp(prefix="interview-metrics-"), os.getpid()
        atexit.register(clean_up)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = _folder  # which prometheus_client reads when it is first imported
        _require_space(_folder)
        _metrics = _make(reasons)
    except OSError as error:
        log.warning("metrics.off", error=str(error))


def _make(reasons: Iterable[str]) -> Metrics:
    """All metrics, each series at 0: where the first count made it, Prometheus would not see it rise."""
    from prometheus_client import CollectorRegistry, Counter, Histogram

    registry = CollectorRegistry()  # of nobody: worker.scrape reads the files

    def counter(name: str, *labels: str) -> Counter:
        return Counter(name, HELP[name], labels, registry=registry)

    def histogram(name: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(name, HELP[name], labels, buckets=buckets, registry=registry)

    metrics = Metrics(
        outcomes={
            "applied": counter("interview_events_applied_total"),
            "duplicate": counter("interview_events_duplicate_total"),
            "waiting": counter("interview_events_waiting_total"),
            "again": counter("interview_events_dead_again_total"),
        },
        dead_lettered=counter("interview_events_dead_lettered_total", "reason"),
        lag_seconds=histogram("interview_event_lag_seconds", LAG_SECONDS),
        pack_events=histogram("interview_pack_events", PACK_EVENTS),
        rpc_seconds=histogram("interview_rpc_seconds", RPC_SECONDS, "rpc", "status"),
    )
    for reason in reasons:
        metrics.dead_lettered.labels(reason)
    for rpc in RPCS:
        for status in STATUSES:
            metrics.rpc_seconds.labels(rpc, status)
    return metrics


def folder() -> str | None:
    """Where this worker's processes keep their counts; None where nothing is counted."""
    return _folder if _metrics is not None else None


def clean_up() -> None:
    """Remove the folder, at the end of the process that made it."""
    if _folder is not None and os.getpid() == _owner:
        shutil.rmtree(_folder, ignore_errors=True)


def _require_space(path: str) -> None:
    """Raise OSError on a full disk: a process that writes to a mapped file there is killed (SIGBUS)."""
    if shutil.disk_usage(path).free < SPACE_BYTES:
        raise OSError(f"no space in {tempfile.gettempdir()}")


# ---------------------------------------------------------------------------------------------------------- counting


def _harmless(count: Callable[Concatenate[Metrics, P], None]) -> Callable[P, None]:
    """Nothing where metrics are off; where the files fail, they are off from then on."""

    @wraps(count)
    def counted(*args: P.args, **kwargs: P.kwargs) -> None:
        global _metrics
        if _metrics is None:
            return
        try:
            count(_metrics, *args, **kwargs)
        except OSError as error:
            _metrics = None
            log.warning("metrics.off", error=str(error))

    return counted


@_harmless
def begin_process(metrics: Metrics) -> None:
    """Make the files of a process that was just forked, and find out whether that can be done."""
    _require_space(os.environ["PROMETHEUS_MULTIPROC_DIR"])
    metrics.outcomes["applied"].inc(0)


@_harmless
def count_pack(metrics: Metrics, events: int) -> None:
    """A pack of so many events came to its end."""
    metrics.pack_events.observe(events)


@_harmless
def count_outcomes(metrics: Metrics, outcomes: Mapping[str, int]) -> None:
    """So many events had these outcomes (see worker.outcomes)."""
    for outcome, count in outcomes.items():
        (metrics.outcomes.get(outcome) or metrics.dead_lettered.labels(outcome)).inc(count)


@_harmless
def count_lag(metrics: Metrics, times: Iterable[datetime]) -> None:
    """Events of these times were applied just now. (An engine's clock may be ahead of ours: no lag is below 0.)"""
    now = time.time()
    for each in times:
        metrics.lag_seconds.observe(max(0.0, now - each.timestamp()))


@contextmanager
def timed_rpc(rpc: str) -> Iterator[None]:
    """Time a call of one of RPCS, and see how it ends."""
    began = time.perf_counter()
    try:
        yield
    except Unavailable as ill:
        _count_rpc(rpc, "misconfigured" if isinstance(ill, Misconfigured) else "unavailable", began)
        raise
    except RefusedCall:
        _count_rpc(rpc, "refused", began)
        raise
    _count_rpc(rpc, "ok", began)


@_harmless
def _count_rpc(metrics: Metrics, rpc: str, status: str, began: float) -> None:
    metrics.rpc_seconds.labels(rpc, status).observe(time.perf_counter() - began)
