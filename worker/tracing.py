"""Traces: an event's `traceparent` goes on through its pack to the RPC, where OpenTelemetry is installed and set up.

Off until a process calls set_up and finds OpenTelemetry's own settings in its environment; while it is off, nothing of
OpenTelemetry is imported here and each function returns at once. The provider is this module's own, not the global one.

Spans hold numbers, names and types: no id of a person or session, no event, no error's message. Of an event's trace
context only `traceparent` is read: `tracestate` is free text.
"""

import atexit
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from worker.logs import get_logger

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Link, Tracer

SPAN: Final = "interview.apply_events"
MAX_LINKS: Final = 128  # of one pack, as the SDK's own default
FLUSH_SECONDS: Final = 2.0  # at the end of a process; a collector that is away must not use up the worker's grace
SERVICE: Final = "interview-worker"  # unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES says another

log = get_logger(__name__)


@dataclass(frozen=True)
class Tracing:
    """Where spans go, and the stream that they tell of."""

    provider: "TracerProvider"
    tracer: "Tracer"
    stream: str


_tracing: Tracing | None = None  # of this process
_lock = threading.Lock()  # the threads of a pool begin at once


def set_up(stream: str) -> None:
    """Trace from now on, in this process, where the environment asks for it; call it after the fork."""
    with _lock:
        if _tracing is not None or not _wanted(os.environ):
            return
        try:
            provider = _exporting_provider()
        except ImportError:
            log.warning("traces.off", why="OpenTelemetry is not installed", next="install interview-worker[otel]")
        except (ValueError, OSError) as error:
            log.warning("traces.off", why=type(error).__name__, next="look at the OTEL_ settings")
        else:
            use(provider, stream)
            atexit.register(shut_down)


def use(provider: "TracerProvider", stream: str) -> None:
    """Trace with this provider."""
    global _tracing
    _tracing = Tracing(provider, provider.get_tracer("worker.tracing"), stream)


def shut_down() -> None:
    """Export what is left, for FLUSH_SECONDS at most, and trace no more."""
    global _tracing
    tracing, _tracing = _tracing, None
    if tracing is None:
        return
    flush = threading.Thread(target=tracing.provider.shutdown, name="traces", daemon=True)
    flush.start()
    flush.join(FLUSH_SECONDS)


def _wanted(environment: Mapping[str, str]) -> bool:
    """Whether OpenTelemetry's own variables ask for traces over OTLP."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporters = {each.strip() for each in environment.get("OTEL_TRACES_EXPORTER", "").split(",")} - {""}
    if exporters:
        if unknown := exporters - {"otlp", "none"}:
            log.warning("traces.exporter_unknown", exporters=sorted(unknown), known=["otlp", "none"])
        return "otlp" in exporters
    return any(environment.get(f"OTEL_EXPORTER_OTLP_{name}") for name in ("ENDPOINT", "TRACES_ENDPOINT"))


def _exporting_provider() -> "TracerProvider":
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": SERVICE}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # shut_down does it, and in time
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


# ----------------------------------------------------------------------------------------------------------- spans


def pack_span(events: int, traceparents: Iterable[str | None]) -> AbstractContextManager[None]:
    """A pack of so many events is applied; `traceparents` as they came, None or wrong for an event without a trace."""
    return nullcontext() if _tracing is None else _pack_span(_tracing, events, traceparents)


def rpc_span(rpc: str) -> AbstractContextManager[None]:
    """An RPC of this name is called."""
    return nullcontext() if _tracing is None else _rpc_span(_tracing, rpc)


def inject(headers: MutableMapping[str, str]) -> None:
    """Add the `traceparent` of the span that is running, where one is."""
    if _tracing is not None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        TraceContextTextMapPropagator().inject(headers)


@contextmanager
def _pack_span(tracing: Tracing, events: int, traceparents: Iterable[str | None]) -> Iterator[None]:
    from opentelemetry.trace import SpanKind

    context, links = _origin(traceparents)
    attributes = {
        "messaging.system": "redis",
        "messaging.destination.name": tracing.stream,
        "messaging.batch.message_count": events,
    }
    with _span(tracing, SPAN, kind=SpanKind.CONSUMER, context=context, links=links, attributes=attributes):
        yield


@contextmanager
def _rpc_span(tracing: Tracing, rpc: str) -> Iterator[None]:
    from opentelemetry.trace import SpanKind

    with _span(tracing, rpc, kind=SpanKind.CLIENT):
        yield


@contextmanager
def _span(tracing: Tracing, name: str, **options: Any) -> Iterator[None]:
    """A span that tells of an error by its type only: a message may quote an event."""
    from opentelemetry.trace import StatusCode

    with tracing.tracer.start_as_current_span(
        name, record_exception=False, set_status_on_exception=False, **options
    ) as span:
        try:
            yield
        except BaseException as error:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(StatusCode.ERROR)
            raise


def _origin(traceparents: Iterable[str | None]) -> tuple["Context", list["Link"]]:
    """Of one traced event its context, to go on with; of several a new trace, and a link to each."""
    from opentelemetry.context import Context
    from opentelemetry.trace import Link, get_current_span
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    extract = TraceContextTextMapPropagator().extract
    told = Counter(filter(None, traceparents))
    spans = {each: get_current_span(extract({"traceparent": each}, Context())).get_span_context() for each in told}
    traced = {each: span for each, span in spans.items() if span.is_valid}
    if sum(told[each] for each in traced) == 1:
        return extract({"traceparent": next(iter(traced))}, Context()), []
    return Context(), [Link(span) for span in list(traced.values())[:MAX_LINKS]]
