"""What Prometheus reads of a worker: what its processes counted (worker.metrics), and gauges made when it asks.

Redis is asked at each scrape and given little time, Supabase at most once a minute by a thread of its own. Where one
of them is away its gauges are absent: no scrape fails of it, and none waits for Supabase.

This runs in threads of a process that forks. A process forked while a thread holds a lock that both use (a module's,
while it is imported, or a cached_property's, one for all instances before Python 3.12) would wait for it for ever. So
all that is imported or made once is made at the start, in the thread that forks.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from worker import metrics
from worker.database import Database
from worker.dlq import DeadLetters
from worker.errors import WorkerError
from worker.hold import hold_key, read_hold
from worker.logs import get_logger
from worker.metrics import HELP
from worker.settings import Settings
from worker.stream import EventStream

if TYPE_CHECKING:
    from prometheus_client import Metric

REDIS_SECONDS: Final = 2.0  # for one answer; a scrape may take 10 s by Prometheus' default
SUPABASE_SECONDS: Final = 60.0  # between two questions
KNOWN_SECONDS: Final = 180.0  # what Supabase said is told no longer than that

Numbers = Mapping[str, float]  # by the name of the metric

log = get_logger(__name__)


class Endpoint:
    """Serves this worker's metrics at every address of this machine, at INTERVIEW_METRICS_PORT."""

    def __init__(self, settings: Settings, queue: str, worker: Callable[[], Numbers]) -> None:
        """`queue` is Celery's; `worker()` answers what the main process knows. Raises OSError where it cannot serve."""
        from prometheus_client import CollectorRegistry, start_http_server
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
        from prometheus_client.multiprocess import MultiProcessCollector

        assert settings.metrics_port is not None
        registry = CollectorRegistry()
        if (folder := metrics.folder()) is not None:
            MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
        of_redis = OfRedis(settings, queue)
        of_supabase = OfSupabase(settings)

        def metric(name: str, number: float) -> "Metric":
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            return kind(name, HELP[name], value=number)

        registry.register(Gauges(metric, worker, of_redis.numbers, of_supabase.numbers))
        self._owner = os.getpid()
        self._server, _ = start_http_server(settings.metrics_port, registry=registry)

    def close(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()

    def leave(self) -> None:
        """Let go of the port in a process that was forked: it would hold it should it outlive this worker."""
        if os.getpid() != self._owner:
            self._server.server_close()


def serve(settings: Settings, queue: str, worker: Callable[[], Numbers]) -> Endpoint | None:
    """An Endpoint; None where there is to be none, or the port cannot be had: the worker works all the same."""
    if settings.metrics_port is None:
        return None
    try:
        endpoint = Endpoint(settings, queue, worker)
    except OSError as error:
        log.warning("metrics.not_served", port=settings.metrics_port, error=str(error))
        return None
    log.info("metrics.served", port=settings.metrics_port)
    return endpoint


class Gauges:
    """Makes metrics of what each of `sources` answers."""

    def __init__(self, metric: Callable[[str, float], "Metric"], *sources: Callable[[], Numbers]) -> None:
        self._metric = metric
        self._sources = sources

    def collect(self) -> Iterator["Metric"]:
        """What prometheus_client asks for at each scrape."""
        for source in self._sources:
            for name, number in source().items():
                yield self._metric(name, number)


class OfRedis:
    """How the stream, the queue and the hold stand now."""

    def __init__(self, settings: Settings, queue: str) -> None:
        client: Any = redis.Redis.from_url(
            settings.redis_url.get_secret_value(),
            socket_timeout=REDIS_SECONDS,
            socket_connect_timeout=REDIS_SECONDS,
            client_name="interview-metrics",
            retry=Retry(NoBackoff(), 1),  # for a connection that Redis has closed meanwhile
        )
        self._redis = client
        self._stream = EventStream(client, settings.stream)
        self._queue = queue

    def numbers(self) -> Numbers:
        """By metric; nothing but that Redis is away where it is."""
        try:
            stream = self._stream.state()
            return {
                "interview_redis_up": 1,
                "interview_stream_entries": stream.length,
                "interview_stream_claimed": stream.pending,
                "interview_stream_oldest_seconds": stream.oldest_seconds,
                "interview_messages_queued": self._redis.llen(self._queue),
                "interview_hold": read_hold(self._redis, hold_key(self._stream.key)) is not None,
            }
        except redis.RedisError:
            return {"interview_redis_up": 0}


class OfSupabase:
    """What waits in Postgres, as it was known last."""

    def __init__(self, settings: Settings) -> None:
        self._database = Database(settings)
        _ = self._database.client  # made here: see above
        self._lock = threading.Lock()
        self._next_at = 0.0  # infinite while a question is under way
        self._known: Numbers = {}
        self._known_at = -math.inf

    def numbers(self) -> Numbers:
        """By metric; nothing while nothing is known, or has been for a while. Never waits."""
        with self._lock:
            now = time.monotonic()
            if now >= self._next_at:
                self._next_at = math.inf
                threading.Thread(target=self._ask, name="ask-supabase", daemon=True).start()
            return self._known if now - self._known_at < KNOWN_SECONDS else {}

    def _ask(self) -> None:
        known: Numbers | None = None
        try:
            known = {
                "interview_dead_letters_open": sum(DeadLetters(self._database).counts()["open"].values()),
                "interview_ledger_waiting_events": self._database.count_waiting(),
            }
        except WorkerError as error:
            log.debug("metrics.supabase_away", error=str(error))  # the hold says so aloud
        finally:
            with self._lock:
                now = time.monotonic()
                self._next_at = now + SUPABASE_SECONDS
                if known is not None:
                    self._known, self._known_at = known, now
