"""The stream and the intake on a real Redis: claims, reclaims, suspects, poison."""

from collections.abc import Iterator

import pytest

from tests.database import Database as Rows
from tests.database import event
from tests.stories import encoded
from tests.worker_process import Workers
from worker import stopping
from worker.apply import MAX_ATTEMPTS_ALONE, Applier
from worker.database import Database
from worker.dead_share import DeadShare
from worker.hold import Hold
from worker.intake import PACK_BYTES, SUSPECT_DELIVERIES, Intake
from worker.pack import Pack
from worker.settings import load_settings
from worker.stream import EventStream

NOW = 1  # milliseconds: shorter than any round trip


@pytest.fixture
def stream(workers: Workers) -> EventStream:
    workers.stream.ensure_group()
    return workers.stream


@pytest.fixture
def applier(workers: Workers) -> Iterator[Applier]:
    database = Database(load_settings())
    hold = Hold(workers.client, workers.stream.key, backoff_seconds=1, rpc_timeout_seconds=5, hold_seconds=60)
    yield Applier(database, workers.stream, hold, DeadShare(workers.client, workers.stream.key))
    database.close()


def deliveries(workers: Workers, stream: EventStream) -> list[tuple[bytes, int]]:
    pending = workers.client.xpending_range(stream.key, "workers", "-", "+", 100)
    return [(each["consumer"], each["times_delivered"]) for each in pending]


def test_events_published_before_the_first_worker_are_claimed(workers: Workers) -> None:
    workers.stream.add([b"early"])
    workers.stream.ensure_group()
    workers.stream.ensure_group()  # harmless
    assert [entry.event for entry in workers.stream.claim_new("a", 10, block_ms=1)] == [b"early"]


def test_what_a_dead_worker_held_is_claimed_by_another_with_its_number_of_deliveries(stream: EventStream) -> None:
    stream.add([b"1", b"2", b"3"])
    (first,) = stream.claim_new("dead", 1, block_ms=1)
    stream.claim_new("alive", 2, block_ms=1)
    assert stream.claim_idle("heir", 10, idle_ms=60_000) == []
    reclaimed = stream.claim_idle("heir", 10, idle_ms=0)
    assert [(entry.event, entry.deliveries) for entry in reclaimed] == [(b"1", 2), (b"2", 2), (b"3", 2)]
    assert reclaimed[0].id == first.id


def test_what_a_dead_worker_held_is_found_behind_thousands_that_others_hold(stream: EventStream) -> None:
    ids = stream.add([b"1"] * 5000)
    stream.claim_new("alive", 5000, block_ms=1)
    stream.give_back("dead", ids[-1:], idle_ms=60_000)
    assert [entry.id for entry in stream.claim_idle("heir", 10, idle_ms=30_000)] == ids[-1:]


def test_a_claim_kept_fresh_is_not_taken_and_counts_no_delivery(workers: Workers, stream: EventStream) -> None:
    stream.add([b"1"] * 2500)  # more than one page
    stream.claim_new("holder", 2500, block_ms=1)
    workers.client.xclaim(stream.key, "workers", "holder", 0, _ids(workers, stream), idle=60_000, justid=True)
    stream.keep("holder")
    assert stream.claim_idle("other", 10, idle_ms=30_000) == []
    assert set(deliveries(workers, stream)) == {(b"holder", 1)}


def test_what_is_given_back_is_claimed_by_another_at_once(stream: EventStream) -> None:
    stream.add([b"1"])
    (entry,) = stream.claim_new("stopping", 1, block_ms=1)
    stream.give_back("stopping", [entry.id], idle_ms=60_000)
    assert [each.id for each in stream.claim_idle("next", 1, idle_ms=60_000)] == [entry.id]


def test_done_takes_entries_and_their_claims_away(workers: Workers, stream: EventStream) -> None:
    ids = stream.add([b"1", b"2"])
    stream.claim_new("a", 2, block_ms=1)
    stream.count_attempt(ids[0])
    stream.done(ids, attempted=True)
    state = stream.state()
    assert (state.length, state.pending) == (0, 0)
    assert stream.count_attempt(ids[0]) == 1  # the old count went with the entry


def test_an_entry_deleted_by_hand_is_no_more_handed_out(workers: Workers, stream: EventStream) -> None:
    ids = stream.add([b"1", b"2"])
    stream.claim_new("a", 2, block_ms=1)
    workers.client.xdel(stream.key, ids[0])
    assert [entry.event for entry in stream.claim_idle("b", 10, idle_ms=0)] == [b"2"]
    assert stream.state().pending == 1


def test_consumers_that_ended_are_forgotten_but_never_one_that_holds_something(
    workers: Workers, stream: EventStream
) -> None:
    stream.add([b"1", b"2"])
    stream.claim_new("holds", 1, block_ms=1)
    (last,) = stream.claim_new("ended", 1, block_ms=1)
    stream.done([last.id])
    assert stream.forget_consumers(idle_ms=60_000) == 0
    assert stream.forget_consumers(idle_ms=-1) == 1
    assert [each["name"] for each in workers.client.xinfo_consumers(stream.key, "workers")] == [b"holds"]


def test_a_group_that_went_with_a_flush_is_made_again(workers: Workers) -> None:
    sent: list[Pack] = []
    settings = load_settings()

    def send(pack: Pack) -> None:
        sent.append(pack)
        if len(sent) == 1:
            workers.client.flushdb()
            workers.stream.add([b"after the flush"])
        else:
            stopping.stop()

    workers.stream.add([b"before"])
    stopping.resume()
    try:
        Intake(settings, workers.client, "a", send=send, queue_length=lambda: 0, taken=lambda: 0).run()
    finally:
        stopping.resume()
    assert [pack.events for pack in sent] == [(b"before",), (b"after the flush",)]


def test_a_suspect_is_sent_alone_and_becomes_poison_when_it_ends_badly_again(
    workers: Workers, stream: EventStream, database: Rows, applier: Applier
) -> None:
    database.connection.execute("truncate public.interview_dead_letters")
    (raw,) = encoded([event("answered", "suspect", questions_answered=1)])
    stream.add([raw, b"innocent"])
    stream.claim_new("dead", 2, block_ms=1)
    innocent = _ids(workers, stream)[1]
    for _ in range(SUSPECT_DELIVERIES - 1):
        stream.claim_idle("dead too", 1, idle_ms=0)
        stream.give_back("dead too", [innocent], idle_ms=0)

    sent: list[Pack] = []
    intake = Intake(load_settings(), workers.client, "a", send=sent.append, queue_length=lambda: 0, taken=lambda: 0)
    stream.give_back("dead too", _ids(workers, stream), idle_ms=3_600_000)
    intake.step()
    assert [(pack.events, pack.alone) for pack in sent] == [((b"innocent",), False), ((raw,), True)]

    for _ in range(MAX_ATTEMPTS_ALONE):  # attempts that ended with their process
        stream.count_attempt(sent[1].entry_ids[0])
    applier.apply(sent[1])
    (letter,) = database.dead_letters("suspect")
    assert (letter["reason"], letter["event"]) == ("poison", raw.decode())
    assert stream.state().length == 1


def test_an_event_that_was_applied_after_all_is_no_poison(
    workers: Workers, stream: EventStream, database: Rows, applier: Applier
) -> None:
    user = database.create_user()
    started = event("started", f"slow-{user}", user_id=str(user), email="e@example.com")
    database.apply(started)
    (entry_id,) = stream.add(encoded([started]))
    for _ in range(MAX_ATTEMPTS_ALONE):
        stream.count_attempt(entry_id)
    outcomes = applier.apply(Pack((entry_id,), tuple(encoded([started])), alone=True))
    assert outcomes == {"duplicate": 1}
    assert database.dead_letters(started["subject"]) == []


def test_large_events_travel_in_smaller_packs_and_few_of_them_are_claimed_at_once(
    workers: Workers, stream: EventStream
) -> None:
    large, small = b"x" * (PACK_BYTES // 4 + 1), b"y"
    sent: list[Pack] = []
    intake = Intake(load_settings(), workers.client, "a", send=sent.append, queue_length=lambda: 0, taken=lambda: 0)

    def packs_of_a_step() -> list[tuple[bytes, ...]]:
        sent.clear()
        intake.step()
        return [pack.events for pack in sent]

    stream.add([large] * 8)
    assert packs_of_a_step() == [(large,) * 3, (large,) * 3, (large,) * 2]  # who could know?
    stream.add([large] * 4 + [small] * 100)
    assert packs_of_a_step() == [(large,) * 3]
    assert packs_of_a_step() == [(large, small, small)]
    (few,) = packs_of_a_step()  # by the mean of the three before
    assert 3 < len(few) < 98
    assert packs_of_a_step() == [(small,) * (98 - len(few))]


def test_the_intake_stands_still_while_the_queue_is_full(workers: Workers, stream: EventStream) -> None:
    stream.add([b"1"])
    sent: list[Pack] = []
    intake = Intake(load_settings(), workers.client, "a", send=sent.append, queue_length=lambda: 1000, taken=lambda: 0)
    intake.step()
    assert sent == []
    assert stream.state().pending == 0


def test_few_events_wait_for_a_free_slot_and_travel_with_those_that_come_meanwhile(
    workers: Workers, stream: EventStream
) -> None:
    settings = load_settings()
    sent: list[Pack] = []
    taken = 0
    intake = Intake(settings, workers.client, "a", send=sent.append, queue_length=lambda: 0, taken=lambda: taken)

    def sent_in_a_step() -> list[tuple[bytes, ...]]:
        sent.clear()
        intake.step()
        return [pack.events for pack in sent]

    stream.add([b"1"])
    taken = settings.concurrency
    assert sent_in_a_step() == [(b"1",)]  # nothing is known yet of how many come
    stream.add([b"2"])
    assert sent_in_a_step() == []
    stream.add([b"3"])
    assert sent_in_a_step() == []
    taken -= 1
    assert sent_in_a_step() == [(b"2", b"3")]

    taken += 1
    stream.add([b"x"] * (settings.pack_size + 2))
    assert sent_in_a_step() == []
    intake._lingers_until = 0.0  # a second later
    assert sent_in_a_step() == [(b"x",) * settings.pack_size]
    assert sent_in_a_step() == [(b"x",) * 2]  # behind a full pack nothing waits


def _ids(workers: Workers, stream: EventStream) -> list[str]:
    return [entry_id.decode() for entry_id, _ in workers.client.xrange(stream.key)]
