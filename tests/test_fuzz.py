"""Ten thousand malformed events among ten thousand good ones: each bad one dies alone, whole and explained.

INTERVIEW_TEST_SEED=… repeats a run: each prints its seed.
"""

import json
import os
import random
import subprocess
import uuid
from collections import Counter
from typing import Final

import psutil
import pytest

from events import parse_event
from tests.database import Database
from tests.malformed import FULL_DATA, Entry, as_json, malformed, unexpected, whole
from tests.stories import Event, assert_rows_equal_their_stories, crowd
from tests.worker_process import Workers
from worker.dead_letters import original_bytes

BAD: Final = 10_000
GOOD: Final = 10_000
CHUNK: Final = 500  # entries in one round trip
MAX_GROWTH: Final = 4 * 2**20  # bytes, or 400 for each of 10,000 events, which are longer
CALM: Final = 2_000  # good events, after which no pack of large ones is in memory

SETTINGS: Final = {
    "INTERVIEW_RECLAIM_SECONDS": "60",  # no pack comes twice, so that each letter counts its events
    "INTERVIEW_RPC_TIMEOUT_SECONDS": "10",
    "INTERVIEW_DEAD_SHARE_LIMIT": "1",  # so many letters are no sign of a bad deploy here
    "MALLOC_MMAP_THRESHOLD_": "131072",  # glibc's own start value, kept: what is freed goes back and is not counted
}


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get("INTERVIEW_TEST_SEED") or random.randrange(2**32))
    print(f"INTERVIEW_TEST_SEED={seed}")  # pytest shows it where the test fails
    return random.Random(seed)


def mixed(good: list[Event], rng: random.Random) -> list[Entry]:
    """The good events and as many malformed ones, some of them twice, in random order."""
    sessions = sorted({event["subject"] for event in good})
    bad = malformed(len(good) * BAD // GOOD, sessions, rng)
    entries = [unexpected(event, rng) for event in good] + bad + rng.sample(bad, len(bad) // 100)
    rng.shuffle(entries)
    return entries


def publish(workers: Workers, entries: list[Entry]) -> None:
    for start in range(0, len(entries), CHUNK):
        pipeline = workers.client.pipeline(transaction=False)
        for entry in entries[start : start + CHUNK]:
            pipeline.xadd(workers.stream.key, entry.fields)
        pipeline.execute()


def resident(worker: subprocess.Popen[bytes]) -> int:
    """Bytes of memory that the worker's processes have."""
    main = psutil.Process(worker.pid)
    return sum(process.memory_info().rss for process in (main, *main.children(recursive=True)))


def letters(database: Database) -> Counter[tuple[str, bytes]]:
    """How often which event died of what, by the open letters."""
    found = database.all("select reason, event, attempts from public.interview_dead_letters where status = 'open'")
    counted = [((row["reason"], original_bytes(row["event"])), row["attempts"]) for row in found]
    assert len({letter for letter, _ in counted}) == len(counted)  # one open row for each
    return Counter(dict(counted))


def first(some: Counter[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """A few to show."""
    return [(reason, raw[:200]) for reason, raw in list(some)[:5]]


def ledger_size(database: Database) -> int:
    return int(database.one("select count(*) as n from public.interview_events")["n"])


@pytest.mark.parametrize("kind", FULL_DATA)
def test_what_is_broken_was_good_before(kind: str) -> None:
    event = whole(kind, "session_1", random.Random(0))

    assert json.loads(parse_event(as_json(event), strict=True).to_json()) == event


def test_malformed_events_die_alone_and_whole_each_of_its_reason_and_the_good_ones_are_applied(
    workers: Workers, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    database.connection.execute("truncate public.interview_dead_letters")
    ledger_before = ledger_size(database)
    good = crowd(user, rng, events=GOOD)
    halves = [mixed(half, rng) for half in (good[: GOOD // 2], good[GOOD // 2 :])]
    memory = []

    with workers.running(**SETTINGS) as worker:
        for half in halves:
            publish(workers, half)
            workers.wait_until_empty()
            publish(workers, [entry for entry in half if not entry.reason][:CALM])  # repeats
            workers.wait_until_empty()
            memory.append(resident(worker))
        assert workers.stop(worker) == 0

    bad = Counter((entry.reason, entry.kept) for half in halves for entry in half if entry.reason)
    assert bad.total() >= BAD
    found = letters(database)
    assert (first(bad - found), first(found - bad)) == ([], [])  # what is missing, what is there in its stead
    assert_rows_equal_their_stories(database, good)
    assert ledger_size(database) - ledger_before == len(good)
    assert memory[1] - memory[0] < MAX_GROWTH, f"memory is not flat: {memory} bytes after each half"
