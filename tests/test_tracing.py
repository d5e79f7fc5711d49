"""A trace goes on from the event to the RPC, tells nothing of a person, and costs nothing where nobody asked for it."""

import json
import random
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from events import Publisher, Started
from tests.conftest import Leaks
from tests.stories import EMAIL, JOB_DESCRIPTION, RESUME, crowd, encoded
from tests.worker_process import STREAM, Workers
from worker import tracing
from worker.database import Database
from worker.errors import Unavailable
from worker.settings import load_settings
from worker.stream import GROUP

ROOT = Path(__file__).parent.parent
SECRET = "the answer of a candidate"
# Redis' client imports OpenTelemetry itself where it is installed, for metrics of its own; so we look who imports.
APPLY = """
import builtins, json, sys

importers, real = set(), builtins.__import__

def watched(name, globals=None, *rest, **named):
    if name.partition(".")[0] == "opentelemetry":
        importers.add(globals["__name__"].partition(".")[0])
    return real(name, globals, *rest, **named)

builtins.__import__ = watched
from worker import slots
from worker.apply.context import process_context
from worker.outcomes import Outcomes
from worker.stream import EventStream, connect
context = process_context()
with connect(context.settings) as client:
    EventStream(client, context.settings.stream).add([sys.argv[1].encode()])
    slots.begin_worker("test")
    context.drain(0).run()
    outcomes = Outcomes(client, context.settings.stream).last_minute()
exporter = [name for name in sys.modules if name.startswith("opentelemetry.exporter")]
print(json.dumps([outcomes, sorted(importers & {"events", "worker"}), bool(exporter)]))
"""


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    """The spans of this process that have ended."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(provider, STREAM)
    yield exporter
    tracing.shut_down()


@pytest.fixture
def collector() -> Iterator["Collector"]:
    """An OpenTelemetry collector, as far as a worker sees one."""
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        yield collector
        collector.shutdown()
        thread.join()


class Collector(ThreadingHTTPServer):
    """Keeps the bytes that it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.received: list[bytes] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def spans(self) -> dict[str, Any]:
        requests = [ExportTraceServiceRequest.FromString(each) for each in self.received]
        return {
            span.name: span
            for request in requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        }


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        self.server.received.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing."""


def drawn(rng: random.Random) -> tuple[str, str, str]:
    """A trace's id, a span's, and the traceparent that tells of both."""
    trace, span = f"{rng.getrandbits(128) | 1:032x}", f"{rng.getrandbits(64) | 1:016x}"
    return trace, span, f"00-{trace}-{span}-01"


def hexadecimal(trace_id: int) -> str:
    return f"{trace_id:032x}"


def only(spans: InMemorySpanExporter) -> ReadableSpan:
    (span,) = spans.get_finished_spans()
    return span


def started(user: uuid.UUID, rng: random.Random, traceparent: str | None = None) -> Started:
    return Started.new(
        f"session-{uuid.UUID(int=rng.getrandbits(128))}",
        traceparent=traceparent,
        user_id=user,
        email=EMAIL,
        resume_filename=RESUME,
        job_description_filename=JOB_DESCRIPTION,
    )


# ------------------------------------------------------------------------------------------------- parents and links


def test_a_pack_with_one_traced_event_goes_on_with_its_trace(spans: InMemorySpanExporter, rng: random.Random) -> None:
    trace, parent, traceparent = drawn(rng)

    with tracing.pack_span(3, [None, traceparent, None]):
        pass

    span = only(spans)
    assert span.parent is not None
    assert (hexadecimal(span.parent.trace_id), f"{span.parent.span_id:016x}") == (trace, parent)
    assert hexadecimal(span.context.trace_id) == trace
    assert (span.name, span.kind, span.links) == ("interview.apply_events", SpanKind.CONSUMER, ())
    assert span.attributes == {
        "messaging.system": "redis",
        "messaging.destination.name": STREAM,
        "messaging.batch.message_count": 3,
    }


def test_a_pack_with_several_traced_events_is_a_trace_of_its_own_that_links_to_each_once(
    spans: InMemorySpanExporter, rng: random.Random
) -> None:
    traced = [drawn(rng) for _ in range(3)]

    with tracing.pack_span(7, [*(each[2] for each in traced), traced[0][2], None, "", "not a traceparent"]):
        pass

    span = only(spans)
    assert span.parent is None
    assert [hexadecimal(each.context.trace_id) for each in span.links] == [trace for trace, _, _ in traced]


def test_two_events_of_one_trace_are_one_link(spans: InMemorySpanExporter, rng: random.Random) -> None:
    trace, _, traceparent = drawn(rng)

    with tracing.pack_span(2, [traceparent, traceparent]):
        pass

    assert only(spans).parent is None
    assert [hexadecimal(each.context.trace_id) for each in only(spans).links] == [trace]


def test_no_pack_links_to_more_than_128_events(spans: InMemorySpanExporter, rng: random.Random) -> None:
    with tracing.pack_span(500, [drawn(rng)[2] for _ in range(500)]):
        pass

    assert len(only(spans).links) == tracing.MAX_LINKS == 128


@pytest.mark.parametrize("wrong", ["", SECRET, "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "ff-1-2-3"])
def test_a_wrong_traceparent_is_no_trace_and_is_told_nowhere(spans: InMemorySpanExporter, wrong: str) -> None:
    with tracing.pack_span(1, [wrong]):
        pass

    span = only(spans)
    assert (span.parent, span.links) == (None, ())
    assert SECRET not in span.to_json()


def test_an_error_is_told_by_its_type_and_never_by_its_words(spans: InMemorySpanExporter) -> None:
    with pytest.raises(Unavailable), tracing.pack_span(1, []), tracing.rpc_span("apply_interview_events"):
        raise Unavailable(SECRET)

    for span in spans.get_finished_spans():
        assert span.attributes is not None
        assert span.attributes["error.type"] == "Unavailable"
        assert (span.status.status_code, span.status.description, span.events) == (StatusCode.ERROR, None, ())
        assert SECRET not in span.to_json()


def test_the_call_of_supabase_carries_the_span_of_the_rpc(
    workers: Workers, spans: InMemorySpanExporter, user: uuid.UUID, rng: random.Random
) -> None:
    trace, _, traceparent = drawn(rng)
    database = Database(load_settings())
    sent: list[httpx.Request] = []
    client = database.client.options.httpx_client
    assert client is not None
    client.event_hooks = {**client.event_hooks, "request": [*client.event_hooks["request"], sent.append]}

    with tracing.pack_span(1, [traceparent]):
        (answer,) = database.apply_events([started(user, rng, traceparent)])
    database.count_waiting()  # part of no span
    database.close()

    rpc, pack = spans.get_finished_spans()
    assert answer["outcome"] == "applied"
    assert (rpc.name, rpc.kind, rpc.parent) == ("apply_interview_events", SpanKind.CLIENT, pack.context)
    assert sent[0].headers["traceparent"] == f"00-{trace}-{rpc.context.span_id:016x}-01"
    assert "traceparent" not in sent[1].headers


# --------------------------------------------------------------------------------------------------- a real worker's


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_the_trace_of_a_published_event_goes_on_to_the_rpc_and_tells_nothing_of_a_person(
    workers: Workers, collector: Collector, user: uuid.UUID, rng: random.Random, leaks: Leaks, pool: str
) -> None:
    trace, parent, traceparent = drawn(rng)
    event = started(user, rng, traceparent)

    with workers.running(
        INTERVIEW_POOL=pool,
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        NO_PROXY="127.0.0.1",
        OTEL_BSP_SCHEDULE_DELAY="60000",
    ) as worker:
        with Publisher() as publisher:
            publisher.publish(event)
        workers.wait_until_empty()
        assert workers.stop(worker) == 0  # which exports what is left

    spans = collector.spans()
    pack, rpc = spans["interview.apply_events"], spans["apply_interview_events_summary"]
    assert (pack.trace_id.hex(), pack.parent_span_id.hex()) == (trace, parent)
    assert (rpc.trace_id.hex(), rpc.parent_span_id) == (trace, pack.span_id)
    exported = b"".join(collector.received)
    assert b"interview-worker" in exported
    assert leaks.in_text(exported) == []
    assert not [told for told in (event.subject, str(event.id), str(user)) if told.encode() in exported]


def test_a_collector_that_is_away_hurts_no_event(workers: Workers, user: uuid.UUID, rng: random.Random) -> None:
    with workers.running(OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1", NO_PROXY="127.0.0.1") as worker:
        workers.stream.add(encoded(crowd(user, rng, events=100)))
        workers.wait_until_empty()
        assert workers.stop(worker) == 0


# ------------------------------------------------------------------------------------------------------ who asks for it


def applied_in_a_fresh_process(workers: Workers, event: bytes, **settings: str) -> Any:
    """The outcomes, who of us has imported OpenTelemetry, and whether its exporter was loaded."""
    workers.client.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
    done = subprocess.run(
        [sys.executable, "-c", APPLY, event],
        cwd=ROOT,
        env={**workers.environment, **settings},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("settings", [{}, {"OTEL_TRACES_EXPORTER": "none"}])
def test_without_the_settings_a_pack_is_applied_and_we_import_nothing_of_opentelemetry(
    workers: Workers, user: uuid.UUID, rng: random.Random, settings: dict[str, str]
) -> None:
    event = started(user, rng, drawn(rng)[2]).to_json()

    assert applied_in_a_fresh_process(workers, event, **settings) == [{"applied": 1}, [], False]


def test_with_them_the_worker_imports_it_and_the_engines_package_does_not(
    workers: Workers, user: uuid.UUID, rng: random.Random
) -> None:
    event = started(user, rng, drawn(rng)[2]).to_json()
    told = applied_in_a_fresh_process(workers, event, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1")

    assert told == [{"applied": 1}, ["worker"], True]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, False),
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, False),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "true"}, False),
    ],
)
def test_opentelemetrys_own_settings_decide_whether_there_are_traces(settings: dict[str, str], wanted: bool) -> None:
    assert tracing._wanted(settings) is wanted


def test_where_opentelemetry_is_not_installed_the_log_says_so_and_nothing_is_traced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)

    tracing.set_up(STREAM)

    headers: dict[str, str] = {}
    assert tracing._tracing is None
    with tracing.pack_span(1, [None]), tracing.rpc_span("apply_interview_events"):
        tracing.inject(headers)
    assert headers == {}
