"""Messages on the Celery queue that nobody should have put there: none ends a worker, and no event vanishes.

One that Celery cannot read becomes a dead letter. One with arguments for `interview.apply_events`, as workers sent them
before events were claimed by the task, is ignored: its events are in the stream.
"""

import base64
import json
import pickle
import random
import uuid
from datetime import UTC, datetime
from typing import Any

import pytest
from celery import Celery

from tests.database import Database
from tests.stories import assert_rows_equal_their_stories, crowd, encoded
from tests.worker_process import Workers, wait_until
from worker.app import make_app
from worker.dead_letters import original_bytes
from worker.queue.messages import fault
from worker.settings import load_settings
from worker.stream import GROUP

QUEUE = "interview"
TASK = "interview.apply_events"
EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
PICKLED = base64.b64encode(pickle.dumps([])).decode()
Message = dict[str, Any]


def message(body: object = None, *, task: str = "interview.purge") -> Message:
    """A message as Celery 5 writes it (its message protocol 2, in kombu's envelope)."""
    task_id = str(uuid.uuid4())
    return {
        "body": encoded_body([[], {}, EMBED] if body is None else body),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {
            "lang": "py", "task": task, "id": task_id, "shadow": None, "eta": None, "expires": None,
            "group": None, "group_index": None, "retries": 0, "timelimit": [None, None], "root_id": task_id,
            "parent_id": None, "argsrepr": "()", "kwargsrepr": "{}", "origin": "gen1@host",
            "ignore_result": True, "replaced_task_nesting": 0, "stamped_headers": None, "stamps": {},
        },
        "properties": {
            "correlation_id": task_id, "reply_to": str(uuid.uuid4()), "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": QUEUE}, "priority": 0,
            "body_encoding": "base64", "delivery_tag": str(uuid.uuid4()),
        },
    }  # fmt: skip


def encoded_body(body: object) -> str:
    return base64.b64encode(json.dumps(body).encode()).decode()


def changed(**values: object) -> bytes:
    """A message with other values; `headers__eta` is `eta` in its headers, None deletes."""
    told = message()
    for path, value in values.items():
        *folders, name = path.split("__")
        place = told
        for folder in folders:
            place = place[folder]
        place[name.replace("_", "-") if not folders and "_" in name else name] = value
    return json.dumps(told).encode()


def for_our_task(*args: object, **headers: object) -> bytes:
    """A message for the task that takes no arguments."""
    sent = message([args, {}, EMBED], task=TASK)
    sent["headers"] |= headers
    return json.dumps(sent).encode()


UNREADABLE: dict[str, bytes] = {
    "not JSON": b"hello",
    "not UTF-8": b"\xff\xfe\x00",
    "nothing": b"",
    "no object": b"[1, 2]",
    "a number": b"7",
    "no envelope": b"{}",
    "an envelope of nothing": b'{"body": "", "headers": {}, "properties": {}}',
    "a body that is not base64": changed(body="%%%"),
    "a body that is not JSON": changed(body=base64.b64encode(b"hello").decode()),
    "a body of another shape": changed(body=encoded_body({"a": 1})),
    "a pickle": changed(body=PICKLED, content_type="application/x-python-serialize"),
    "another content type": changed(content_type="application/x-yaml"),
    "no content type": changed(content_type=None),
    "another encoding": changed(content_encoding="latin-9"),
    "an unknown task": changed(headers__task="interview.unheard_of"),
    "no task": changed(headers__task=None),
    "an eta that is no time": changed(headers__eta="tomorrow"),
    "an expiry that is no time": changed(headers__expires="never"),
    "headers of another kind": changed(headers=[1]),
    "retries that are no number": changed(headers__retries="many"),
    "no id": changed(headers__id=None),
    "a compression that nobody has": changed(headers__compression="application/x-zap"),
    "properties of another kind": changed(properties="none"),
    "no delivery tag": changed(properties__delivery_tag=None),
    "no delivery info": changed(properties__delivery_info=None),
    "a body in another encoding": changed(properties__body_encoding="rot13"),
    "arguments that the task does not take": changed(body=encoded_body([[1, 2, 3], {"a": 1}, None])),
}  # fmt: skip

IGNORED: dict[str, bytes] = {
    "a pack of a worker of before": for_our_task("celery@old-1234", "eJyLNtQ1VNJRijbQMYgFACbAA7k="),
    "a pack of the worker before that": for_our_task("old", {"ids": ["1-1"], "events": ["{}"], "alone": False}),
    "a pack that is none": for_our_task("old", "events"),
    "one argument": for_our_task(None),
    "a named argument": json.dumps(message([[], {"pack": "AAAA"}, EMBED], task=TASK)).encode(),
    "arguments that are no list": json.dumps(message({"a": 1}, task=TASK)).encode(),
    "an eta that is no time": for_our_task("old", eta="tomorrow"),
    "a task id that is no text": for_our_task("old", id=7),
    "a pickle": json.dumps(
        message(task=TASK) | {"body": PICKLED, "content-type": "application/x-python-serialize"}
    ).encode(),
    "a body that is not base64": json.dumps(message(task=TASK) | {"body": "%%%"}).encode(),
    "no properties": json.dumps(message(task=TASK) | {"properties": None}).encode(),
}


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Celery:
    for name in ("REDIS_URL", "SUPABASE_URL", "SUPABASE_SECRET_KEY"):
        monkeypatch.setenv(name, "redis://x" if name == "REDIS_URL" else "https://x")
    app = make_app(load_settings())
    app.loader.import_default_modules()
    return app


@pytest.mark.parametrize("raw", UNREADABLE.values(), ids=UNREADABLE)
def test_a_message_that_celery_cannot_read_has_a_fault(app: Celery, raw: bytes) -> None:
    assert fault(raw, app.tasks)


def test_what_celery_itself_writes_has_no_fault(app: Celery, workers: Workers) -> None:
    sender = make_app(load_settings())
    sender.send_task(TASK)
    sender.send_task("interview.purge", eta=datetime.now(UTC), expires=60)
    messages = workers.client.lrange(QUEUE, 0, -1)
    assert [fault(raw, app.tasks) for raw in messages] == [None, None]


def test_no_unreadable_message_ends_a_worker_or_vanishes(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    database.connection.execute("truncate public.interview_dead_letters")
    events = crowd(user, rng, events=100)
    with workers.running() as worker:
        for raw in UNREADABLE.values():
            workers.client.lpush(QUEUE, raw)
        workers.stream.add(encoded(events))
        wait_until(lambda: workers.client.llen(QUEUE) == 0, "the queue is empty")
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    assert_rows_equal_their_stories(database, events)
    letters = database.all("select event from public.interview_dead_letters")
    assert sorted(original_bytes(letter["event"]) for letter in letters) == sorted(UNREADABLE.values())
    assert len(workers.logged("message.unreadable")) == len(UNREADABLE)


def test_messages_with_arguments_for_our_task_are_ignored(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    """Whether Celery can read them or not: nothing of them goes to the stream, and the log says so once for each."""
    database.connection.execute("truncate public.interview_dead_letters")
    events = crowd(user, rng, events=100)
    workers.client.config_resetstat()
    with workers.running() as worker:
        workers.client.lpush(QUEUE, *IGNORED.values())
        wait_until(lambda: len(workers.logged("message.ignored")) == len(IGNORED), "each is ignored")
        workers.stream.add(encoded(events))
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    assert_rows_equal_their_stories(database, events)
    assert workers.client.info("commandstats")["cmdstat_xadd"]["calls"] == len(events)
    assert database.all("select event from public.interview_dead_letters") == []
    assert len(workers.logged("message.ignored")) == len(IGNORED)
    assert workers.logged("message.unreadable") == []


def test_events_that_an_old_worker_sent_in_a_message_are_applied(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    """Their message is ignored; the stream knows that the old worker had claimed them, and a new one reclaims them."""
    events = crowd(user, rng, events=20)
    ids = workers.stream.add(encoded(events))
    workers.client.xgroup_create(workers.stream.key, GROUP, id="0")
    workers.client.xreadgroup(GROUP, "celery@old-1234", {workers.stream.key: ">"}, count=len(ids))
    pack = {"ids": ids, "events": [raw.decode() for raw in encoded(events)], "alone": False}
    workers.client.lpush(QUEUE, for_our_task("celery@old-1234", pack))
    with workers.running() as worker:
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    assert_rows_equal_their_stories(database, events)
    assert workers.logged("message.ignored") != []
    assert sum(each["events"] for each in workers.logged("drain.reclaimed")) == len(events)


def test_an_unreadable_message_outlives_a_redis_that_takes_no_more(workers: Workers, database: Database) -> None:
    database.connection.execute("truncate public.interview_dead_letters")
    with workers.running() as worker:
        workers.client.lpush(QUEUE, b"{}")
        wait_until(lambda: bool(database.all("select from public.interview_dead_letters")), "the worker is ready")
        workers.wait_until_empty()
        try:
            with workers.client.pipeline(transaction=True) as pipeline:
                pipeline.lpush(QUEUE, b"hello").config_set("maxmemory", "1").execute()
            wait_until(lambda: len(workers.logged("message.unreadable")) == 2, "the message has been taken")
            assert workers.stream.state().length == 0
        finally:
            workers.client.config_set("maxmemory", "0")
        wait_until(lambda: len(database.all("select from public.interview_dead_letters")) == 2, "it is a dead letter")
        assert workers.stop(worker) == 0


def test_an_event_put_on_the_celery_queue_by_mistake_is_applied(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    events = crowd(user, rng, events=10)
    with workers.running() as worker:
        workers.client.rpush(QUEUE, *encoded(events))
        wait_until(lambda: workers.client.llen(QUEUE) == 0, "the queue is empty")
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    assert_rows_equal_their_stories(database, events)


def test_no_value_in_a_message_ends_a_worker(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    """Every header and property with values of every kind: those that pass must be such as Celery can read."""
    kinds: list[object] = [None, True, 7, -1.5, "", "text", [], [1], {}, {"a": 1}]
    places = [(part, name) for part in ("headers", "properties") for name in message()[part]]
    events = crowd(user, rng, events=100)
    with workers.running(INTERVIEW_DEAD_SHARE_LIMIT="1") as worker:
        for part, name in places:
            workers.client.lpush(QUEUE, *(changed(**{f"{part}__{name}": kind}) for kind in kinds))
        workers.stream.add(encoded(events))
        wait_until(lambda: workers.client.llen(QUEUE) == 0, "the queue is empty")
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    assert_rows_equal_their_stories(database, events)
