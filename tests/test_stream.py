"""The stream on a real Redis: claims and their sizes, what was left idle, claims kept and given back, attempts."""

from collections.abc import Iterator

import pytest
import redis

from tests.worker_process import Workers
from worker.stream import PACK_BYTES, SLICE, Entry, EventStream

LONG = 60_000  # milliseconds


@pytest.fixture
def stream(workers: Workers) -> EventStream:
    workers.stream.wait_for_undelivered(block_ms=0)  # makes the group
    return workers.stream


@pytest.fixture
def full_redis(workers: Workers) -> Iterator[None]:
    """Redis at its maxmemory once the test sets it: give it its memory back."""
    yield
    workers.client.config_set("maxmemory", 0)


def claim(stream: EventStream, consumer: str, count: int) -> list[Entry]:
    return stream.claim(consumer, count, block_ms=1).entries


def pending(workers: Workers, stream: EventStream) -> list[tuple[bytes, int]]:
    found = workers.client.xpending_range(stream.key, "workers", "-", "+", 10_000)
    return [(each["consumer"], each["times_delivered"]) for each in found]


def leave_idle(workers: Workers, stream: EventStream, consumer: str, ids: list[str]) -> None:
    """As if the consumer had not touched them for an hour; counts no delivery."""
    workers.client.xclaim(stream.key, "workers", consumer, 0, ids, idle=3_600_000, justid=True)


def test_events_published_before_the_first_worker_are_claimed(workers: Workers) -> None:
    workers.stream.add([b"early"])
    assert workers.stream.wait_for_undelivered(block_ms=0)
    assert [entry.event for entry in claim(workers.stream, "a", 10)] == [b"early"]
    assert not workers.stream.wait_for_undelivered(block_ms=0)


def test_a_claim_makes_a_group_that_went_with_a_flush(workers: Workers, stream: EventStream) -> None:
    workers.client.flushdb()
    workers.stream.add([b"after the flush"])
    assert stream.idle(idle_ms=LONG, count=1) == []
    assert stream.forget_consumers(idle_ms=LONG) == 0
    assert [entry.event for entry in claim(stream, "a", 10)] == [b"after the flush"]


def test_a_claim_of_many_small_entries_is_as_large_as_asked(stream: EventStream) -> None:
    stream.add([b"x"] * 1000)
    entries, full = stream.claim("a", 500, block_ms=1)
    assert (len(entries), full) == (500, True)
    entries, full = stream.claim("a", 501, block_ms=1)
    assert (len(entries), full) == (500, False)


def test_a_claim_of_large_entries_ends_after_a_few_slices(stream: EventStream) -> None:
    large = b"x" * (PACK_BYTES // SLICE + 1)
    stream.add([large] * (2 * SLICE))
    entries, full = stream.claim("a", 500, block_ms=1)
    assert (len(entries), full) == (SLICE, True)
    stream.add([b"small"] * SLICE + [large] * (3 * SLICE))
    stream.claim("a", 500, block_ms=1)
    entries, full = stream.claim("a", 500, block_ms=1)
    assert (len(entries), full) == (2 * SLICE, True)  # small ones before them change nothing


def test_reclaimed_large_entries_end_after_a_few_slices_too(workers: Workers, stream: EventStream) -> None:
    ids = stream.add([b"x" * (PACK_BYTES // SLICE + 1)] * (2 * SLICE))
    claim(stream, "dead", 500)
    claim(stream, "dead", 500)
    leave_idle(workers, stream, "dead", ids)
    entries, full = stream.reclaim("heir", stream.idle(idle_ms=LONG, count=500), idle_ms=LONG)
    assert (len(entries), full) == (SLICE, True)
    assert len(stream.idle(idle_ms=LONG, count=500)) == SLICE  # the rest is open to all


def test_what_a_dead_consumer_held_is_reclaimed_with_its_number_of_deliveries(
    workers: Workers, stream: EventStream
) -> None:
    ids = stream.add([b"1", b"2", b"3"])
    claim(stream, "dead", 1)
    claim(stream, "alive", 2)
    assert stream.idle(idle_ms=LONG, count=10) == []
    leave_idle(workers, stream, "dead", ids[:1])
    idle = stream.idle(idle_ms=LONG, count=10)
    assert idle == [(ids[0], 1)]
    assert stream.reclaim("heir", idle, idle_ms=LONG).entries == [Entry(ids[0], b"1", 2)]
    assert stream.reclaim("late heir", idle, idle_ms=LONG).entries == []
    assert pending(workers, stream) == [(b"heir", 2), (b"alive", 1), (b"alive", 1)]


def test_what_a_dead_consumer_held_is_found_behind_thousands_of_others(workers: Workers, stream: EventStream) -> None:
    ids = stream.add([b"1"] * 5000)
    claim(stream, "alive", 5000)
    leave_idle(workers, stream, "dead", ids[-1:])
    assert [each.id for each in stream.idle(idle_ms=LONG, count=10)] == ids[-1:]


def test_a_claim_kept_fresh_is_not_idle_and_counts_no_delivery(workers: Workers, stream: EventStream) -> None:
    ids = stream.add([b"1"] * 2500)  # more than one page
    entries = claim(stream, "holder", 2500)
    leave_idle(workers, stream, "holder", ids)
    assert stream.refresh("holder", entries, min_idle_ms=LONG, held=False) == set(ids)
    assert stream.idle(idle_ms=LONG, count=10) == []
    assert set(pending(workers, stream)) == {(b"holder", 1)}


def test_a_refresh_takes_nothing_from_another_consumer(workers: Workers, stream: EventStream) -> None:
    ids = stream.add([b"1", b"2"])
    entries = claim(stream, "slow", 2)
    leave_idle(workers, stream, "slow", ids)
    stream.reclaim("heir", stream.idle(idle_ms=LONG, count=1), idle_ms=LONG)
    assert stream.refresh("slow", entries, min_idle_ms=LONG, held=False) == {ids[1]}
    assert pending(workers, stream) == [(b"heir", 2), (b"slow", 1)]


def test_a_delivery_that_was_held_is_not_counted(workers: Workers, stream: EventStream) -> None:
    stream.add([b"1", b"2"])
    entries = claim(stream, "holder", 2)
    stream.refresh("holder", entries, min_idle_ms=0, held=True)
    stream.refresh("holder", entries, min_idle_ms=0, held=True)
    assert pending(workers, stream) == [(b"holder", 0)] * 2
    stream.refresh("holder", entries, min_idle_ms=0, held=False)
    assert pending(workers, stream) == [(b"holder", 1)] * 2


def test_what_is_given_back_is_idle_at_once_and_not_counted(workers: Workers, stream: EventStream) -> None:
    ids = stream.add([b"1"])
    entries = claim(stream, "stopping", 1)
    stream.give_back("stopping", entries, idle_ms=LONG)
    assert stream.idle(idle_ms=LONG, count=10) == [(ids[0], 0)]


def test_what_another_has_reclaimed_is_not_given_back(workers: Workers, stream: EventStream) -> None:
    ids = stream.add([b"1"])
    entries = claim(stream, "slow", 1)
    leave_idle(workers, stream, "slow", ids)
    stream.reclaim("heir", stream.idle(idle_ms=LONG, count=1), idle_ms=LONG)
    stream.give_back("slow", entries, idle_ms=LONG)
    assert pending(workers, stream) == [(b"heir", 2)]
    assert stream.idle(idle_ms=LONG, count=10) == []


def test_acknowledged_entries_are_gone_with_their_claims_and_attempts(workers: Workers, stream: EventStream) -> None:
    ids = stream.add([b"1", b"2"])
    claim(stream, "a", 2)
    assert stream.attempt(ids[0]).count() == 1
    stream.acknowledge(ids, attempted=True, then=lambda pipeline: pipeline.incr("counted"))
    state = stream.state()
    assert (state.length, state.pending) == (0, 0)
    assert workers.client.get("counted") == b"1"
    assert stream.attempt(ids[0]).count() == 1  # the old count went with the entry


@pytest.mark.usefixtures("full_redis")
def test_a_full_redis_gives_events_out_and_lets_them_go(workers: Workers, stream: EventStream) -> None:
    ids = stream.add([b"1", b"2", b"3"])
    claim(stream, "dead", 1)
    leave_idle(workers, stream, "dead", ids[:1])
    workers.client.config_set("maxmemory", 1)
    with pytest.raises(redis.exceptions.OutOfMemoryError):
        stream.add([b"4"])

    assert stream.wait_for_undelivered(block_ms=0)
    entries = claim(stream, "a", 2)
    entries += stream.reclaim("a", stream.idle(idle_ms=LONG, count=5), idle_ms=LONG).entries
    stream.refresh("a", sorted(entries), min_idle_ms=0, held=True)
    assert stream.forget_consumers(idle_ms=-1) == 0  # though "dead" could be forgotten
    with pytest.raises(redis.exceptions.OutOfMemoryError):
        stream.attempt(ids[0]).count()
    stream.acknowledge([entry.id for entry in entries], then=lambda pipeline: pipeline.incr("not counted"))

    state = stream.state()
    assert (state.length, state.pending) == (0, 0)
    assert workers.client.get("not counted") is None


@pytest.mark.usefixtures("full_redis")
def test_a_full_redis_without_a_group_gives_events_out_and_lets_them_go(workers: Workers) -> None:
    """The first worker ever starts when Redis is full already."""
    workers.stream.add([b"1", b"2", b"3"])
    workers.client.config_set("maxmemory", 1)
    entries, full = workers.stream.claim("a", 2, block_ms=1)
    assert ([entry.event for entry in entries], full) == ([b"1", b"2"], False)
    workers.stream.acknowledge([entry.id for entry in entries])
    assert [entry.event for entry in workers.stream.claim("a", 2, block_ms=1).entries] == [b"3"]
    workers.client.config_set("maxmemory", 0)
    assert [entry.event for entry in workers.stream.claim("a", 2, block_ms=1).entries] == [b"3"]  # claimed now
    assert workers.stream.state().pending == 1


def test_an_entry_deleted_by_hand_is_no_more_handed_out(workers: Workers, stream: EventStream) -> None:
    ids = stream.add([b"1", b"2"])
    claim(stream, "a", 2)
    workers.client.xdel(stream.key, ids[0])
    leave_idle(workers, stream, "a", ids)
    idle = stream.idle(idle_ms=LONG, count=10)
    assert [entry.event for entry in stream.reclaim("b", idle, idle_ms=LONG).entries] == [b"2"]
    assert stream.state().pending == 1


def test_consumers_that_ended_are_forgotten_but_never_one_that_holds_something(
    workers: Workers, stream: EventStream
) -> None:
    stream.add([b"1", b"2"])
    claim(stream, "holds", 1)
    (last,) = claim(stream, "ended", 1)
    stream.acknowledge([last.id])
    assert stream.forget_consumers(idle_ms=LONG) == 0
    assert stream.forget_consumers(idle_ms=-1) == 1
    assert [each["name"] for each in workers.client.xinfo_consumers(stream.key, "workers")] == [b"holds"]


def test_an_attempt_counts_once_and_not_when_it_is_withdrawn(stream: EventStream) -> None:
    first, second = stream.attempt("1-1"), stream.attempt("1-1")
    assert [first.count(), first.count(), second.count()] == [1, 1, 2]
    second.withdraw()
    assert [first.count(), second.count()] == [1, 2]
