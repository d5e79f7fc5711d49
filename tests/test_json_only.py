"""A worker reads JSON and nothing else: what would run code where it is unpickled is on its queue, and does not run."""

import base64
import json
import os
import pickle
import random
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.database import Database
from tests.stories import assert_rows_equal_their_stories, crowd, encoded
from tests.worker_process import Workers, wait_until

QUEUE = "interview"
REMOTE_CONTROL = "/1.celery.pidbox"  # Celery's channel, of the database that the tests use
PICKLE = "application/x-python-serialize"


class Marking:
    """Unpickling it makes a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._file),)


def message(body: bytes, *, content_type: str, encoding: str = "binary", **headers: Any) -> bytes:
    """As a Celery that is set to pickle puts it on the queue."""
    task_id = str(uuid.uuid4())
    return json.dumps(
        {
            "body": base64.b64encode(body).decode(),
            "content-type": content_type,
            "content-encoding": encoding,
            "headers": {"lang": "py", "task": "interview.apply_events", "id": task_id, "root_id": task_id, **headers},
            "properties": {
                "correlation_id": task_id,
                "reply_to": str(uuid.uuid4()),
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": QUEUE},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": str(uuid.uuid4()),
            },
        }
    ).encode()


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "unpickled"


@pytest.fixture
def body(marker: Path) -> bytes:
    """A task's arguments, and its poison; it works."""
    pickled = pickle.dumps([[Marking(marker)], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    pickle.loads(pickled)
    marker.rmdir()
    return pickled


def test_a_pickle_on_the_queue_is_not_unpickled_and_the_worker_lives_on(
    workers: Workers, database: Database, user: uuid.UUID, body: bytes, marker: Path, rng: random.Random
) -> None:
    events = crowd(user, rng, events=10)
    with workers.running() as worker:
        workers.client.lpush(
            QUEUE,
            message(body, content_type=PICKLE),
            message(body, content_type="pickle"),
            message(body, content_type="application/json", encoding="utf-8"),
            message(body, content_type=PICKLE, compression="application/x-gzip"),
            message(body, content_type="application/x-yaml", encoding="utf-8"),
            body,
        )
        wait_until(lambda: workers.client.llen(QUEUE) == 0, "the worker has taken them")
        workers.stream.add(encoded(events))
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    assert_rows_equal_their_stories(database, events)
    assert not marker.exists()


def test_a_pickle_for_the_remote_control_is_not_unpickled_and_the_worker_lives_on(
    workers: Workers,
    database: Database,
    user: uuid.UUID,
    rng: random.Random,
    body: bytes,
    marker: Path,
    tmp_path: Path,
) -> None:
    events = crowd(user, rng, events=10)
    with workers.running() as worker:
        wait_until(lambda: heard_by(workers, message(body, content_type=PICKLE)) > 0, "the worker hears its channel")
        log = tmp_path / "worker-0.log"
        wait_until(lambda: marker.exists() or "Can't decode message" in log.read_text(), "the worker has looked at it")
        workers.stream.add(encoded(events))
        workers.wait_until_empty()
        assert workers.stop(worker) == 0
    assert_rows_equal_their_stories(database, events)
    assert not marker.exists()


def heard_by(workers: Workers, command: bytes) -> int:
    return int(workers.client.publish(REMOTE_CONTROL, command))
