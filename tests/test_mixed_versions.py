"""A deployment, worker by worker: the SQL is new, some workers are old, and the engine may be newer than all."""

import io
import json
import random
import signal
import subprocess
import tarfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final

import pytest

from events.publisher import FIELD
from tests.database import Database, event
from tests.stories import Event, assert_rows_equal_their_stories, chunks, crowd, encoded, shuffled_with_repeats
from tests.worker_process import PATIENCE_SECONDS, STREAM, Workers, wait_until
from worker.dead_letters import original_bytes

OLD: Final = "86a3ace"  # the first commit whose worker anyone may still run
REPOSITORY: Final = Path(__file__).parent.parent
QUEUE: Final = "interview"

Worker = subprocess.Popen[bytes]
Start = Callable[..., AbstractContextManager[Worker]]

# Says which code it is, before it is a worker: an installed one must not win over the one that was asked for.
APP: Final = """
import json, sys
import billiard.pool, events, worker
billiard.pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT = 10  # 1 s: of twelve that end under load, two wait 30 s
from worker.celery import app
print(json.dumps({"event": "code", "files": [events.__file__, worker.__file__]}), file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="session")
def old_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the code of the old commit."""
    try:
        archive = subprocess.run(
            ["git", "-C", REPOSITORY, "archive", OLD, "events", "worker", "sql"], capture_output=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"no git checkout with commit {OLD}")
    folder = tmp_path_factory.mktemp("old_code")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    (folder / "old_worker.py").write_text(APP)
    return folder


@pytest.fixture
def old(workers: Workers, old_code: Path) -> Start:
    """Starts an old worker, as Workers.running starts a new one."""

    @contextmanager
    def start(*options: str, **settings: str) -> Iterator[Worker]:
        with pytest.MonkeyPatch.context() as patched:
            patched.chdir(old_code)
            starting = workers.running(
                "--without-mingle", *options, app="old_worker", PYTHONPATH=str(old_code), **settings
            )
            worker = starting.__enter__()
        try:
            files = [file for line in workers.logged("code") for file in line["files"]]
            assert [file for file in files if not Path(file).is_relative_to(old_code)] == []
            yield worker
        finally:
            starting.__exit__(None, None, None)

    return start


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # pytest shows it where the test fails
    return random.Random(seed)


@pytest.fixture(autouse=True)
def _no_letters_of_others(database: Database) -> None:
    database.connection.execute("truncate public.interview_dead_letters")


def of_a_later_contract(each: Event) -> Event:
    """With an attribute and data that no worker knows yet."""
    return each | {"dataschema": "https://engine.example/2", "data": each["data"] | {"mood": {"calm": 0.9}}}


def letters(database: Database) -> list[tuple[str, bytes]]:
    found = database.all("select reason, event from public.interview_dead_letters")
    return sorted((row["reason"], original_bytes(row["event"])) for row in found)


BAD: Final = {
    b'{"specversion": "1.0", "id"': "invalid_json",
    b"\xff\xfe not text": "invalid_json",
    json.dumps(event("answered", "a", questions_answered=-1)).encode(): "invalid_event",
    json.dumps(event("paused", "a")).encode(): "unsupported_type",
}


def test_an_old_and_a_new_worker_share_the_load_of_a_newer_engine_until_the_old_one_is_stopped(
    workers: Workers, old: Start, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    events = crowd(user, rng, events=5_000)
    sent = [of_a_later_contract(each) if rng.random() < 0.1 else each for each in events]
    raw = shuffled_with_repeats([*encoded(sent), *BAD], rng)
    settings = {"INTERVIEW_LOG_LEVEL": "DEBUG", "INTERVIEW_PACK_SIZE": "20"}

    with old("--hostname=old@%h", **settings) as one, workers.running("--hostname=new@%h", **settings) as two:
        for chunk in chunks(raw[: len(raw) // 2], 100):
            workers.stream.add(chunk)
        wait_until(lambda: packs_applied(workers, 0) > 0 and packs_applied(workers, 1) > 0, "both apply packs")
        one.send_signal(signal.SIGTERM)
        for chunk in chunks(raw[len(raw) // 2 :], 100):
            workers.stream.add(chunk)
        assert one.wait(PATIENCE_SECONDS) == 0
        workers.wait_until_empty()
        assert workers.stop(two) == 0

    assert_rows_equal_their_stories(database, events)
    assert letters(database) == sorted((reason, bad) for bad, reason in BAD.items())
    known = database.all("select payload ? 'mood' as known from public.interview_events where payload ? 'mood'")
    assert known == []  # what no worker knows of was left out, and the rest applied
    assert workers.client.xpending(STREAM, "workers")["pending"] == 0
    assert workers.client.llen(QUEUE) == 0
    assert workers.hold() is None


def packs_applied(workers: Workers, number: int) -> int:
    """By the worker that was started as this one."""
    return (workers.folder / f"worker-{number}.log").read_bytes().count(b'"pack.applied"')


@pytest.mark.parametrize("sender", ["old", "new"])
def test_a_pack_sent_by_a_worker_of_one_version_is_applied_by_one_of_the_other(
    workers: Workers, old: Start, database: Database, user: uuid.UUID, rng: random.Random, sender: str
) -> None:
    sends, applies = (old, workers.running) if sender == "old" else (workers.running, old)
    events = crowd(user, rng, events=50)
    with sends("--queues=nobodys") as worker:  # it claims and sends as ever, and applies nothing
        publish_at_one_moment(workers, [*encoded(events), *BAD])
        wait_until(lambda: workers.client.llen(QUEUE) == 1, "the pack is in Celery's queue")
        assert workers.stop(worker) == 0
    assert workers.stream.state().length == len(events) + len(BAD)

    with applies(INTERVIEW_RECLAIM_SECONDS="3600") as worker:  # so that the events come in that pack and in no other
        workers.wait_until_empty()
        assert workers.stop(worker) == 0

    assert_rows_equal_their_stories(database, events)
    assert letters(database) == sorted((reason, bad) for bad, reason in BAD.items())


def publish_at_one_moment(workers: Workers, raw: list[bytes]) -> None:
    with workers.client.pipeline(transaction=True) as pipeline:
        for each in raw:
            pipeline.xadd(STREAM, {FIELD: each})
        pipeline.execute()
