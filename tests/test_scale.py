"""Workers come and go under load: nothing is lost, all of them work, and nobody takes what another still holds."""

import random
import threading
import uuid
from collections import Counter
from contextlib import ExitStack

from tests.database import Database
from tests.stories import Event, assert_rows_equal_their_stories, crowd, encoded
from tests.worker_process import Workers, wait_until

CHUNK = 50
BACKLOG = 1_000
PACK = 50
PATIENT = {"INTERVIEW_RECLAIM_SECONDS": "60", "INTERVIEW_PACK_SIZE": str(PACK), "INTERVIEW_LOG_LEVEL": "DEBUG"}


def test_workers_scale_from_one_to_four_and_back_under_load(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    events: list[Event] = []
    enough = threading.Event()

    def publish() -> None:
        while not enough.wait(0.005):
            if workers.stream.state().length < BACKLOG:
                events.extend(story := crowd(user, rng, events=CHUNK))
                workers.stream.add(encoded(story))

    engine = threading.Thread(target=publish, daemon=True)
    with ExitStack() as running:
        first = running.enter_context(workers.running(**PATIENT))
        engine.start()
        others = [running.enter_context(workers.running("-n", f"worker-{n}@here", **PATIENT)) for n in range(3)]
        wait_until(lambda: len(packs_by_worker(workers)) == 4, "all four work")
        assert [workers.stop(each) for each in others] == [0, 0, 0]
        alone = packs_by_worker(workers)["worker-0.log"]
        wait_until(lambda: packs_by_worker(workers)["worker-0.log"] > alone + 10, "the first works on by itself")
        enough.set()
        engine.join()
        workers.wait_until_empty()
        assert workers.stop(first) == 0

    print("packs by worker:", packs_by_worker(workers))
    assert_rows_equal_their_stories(database, events)
    reclaimed = sum(each["events"] for each in workers.logged("drain.reclaimed"))
    assert reclaimed <= len(others) * PACK  # what each had claimed and not yet sent, and gave back


def packs_by_worker(workers: Workers) -> Counter[str]:
    """How many packs each worker has applied, by its log."""
    return Counter({log.name: told for log in workers.logs if (told := log.read_text().count('"pack.applied"'))})
