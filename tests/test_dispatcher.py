"""The dispatcher on a real Redis, step by step: when it sends a message, when it does not, and what it costs."""

import os
import random
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Final

import pytest
import redis

from tests.database import Database, event
from tests.stories import assert_rows_equal_their_stories, crowd, encoded
from tests.worker_process import PATIENCE_SECONDS, STREAM, Workers, wait_until
from worker import slots, stopping
from worker.app import make_app
from worker.apply.context import Context
from worker.apply.drain import SUSPECT_DELIVERIES
from worker.apply.tasks import apply_events
from worker.hold import hold_key
from worker.queue.sender import Sender
from worker.settings import load_settings
from worker.slots import Slot, State
from worker.stream import GROUP, connect
from worker.supervisor import dispatcher as module
from worker.supervisor.dispatcher import Dispatcher

QUEUE: Final = "interview"
RECLAIM_MS: Final = 60_000
BLOCKED: Final = "a-tests-dispatcher"


@dataclass
class Scene:
    """A dispatcher, the messages that it sends, and what a slot does with them."""

    workers: Workers
    sent: list[float] = field(default_factory=list)
    drains: int = 0
    slots_there: int = 1
    stays_on_the_queue: bool = True
    fault: list[BaseException] = field(default_factory=list)  # raised instead of sending, one after the other

    def __post_init__(self) -> None:
        self.client = self.workers.client
        self.dispatcher = self.another(self.client)

    def another(self, client: Any) -> Dispatcher:
        return Dispatcher(
            load_settings(), client, send=self._send, slots_there=lambda: self.slots_there, drain=self._drain
        )

    def _send(self) -> None:
        if self.fault:
            raise self.fault.pop(0)
        self.sent.append(time.monotonic())
        if self.stays_on_the_queue:
            self.client.lpush(QUEUE, "a message")

    def _drain(self) -> None:
        self.drains += 1

    def publish(self, count: int = 1) -> None:
        self.workers.stream.add([b"{}"] * count)

    def claim(self, consumer: str, *, idle_ms: int = 0) -> None:
        """Claim all new entries, and leave them idle for so long."""
        claimed, _ = self.workers.stream.claim(consumer, 1000, block_ms=1)
        ids = [entry.id for entry in claimed]
        self.client.xclaim(STREAM, GROUP, consumer, 0, ids, idle=idle_ms, justid=True)

    def sent_in(self, steps: int) -> int:
        before = len(self.sent)
        for _ in range(steps):
            self.dispatcher.step()
        return len(self.sent) - before

    @contextmanager
    def running(self) -> Iterator[threading.Thread]:
        """The dispatcher in a thread, as in a worker; it has ended when this has."""
        with connect(load_settings(), BLOCKED) as client:
            self.dispatcher = self.another(client)
            thread = threading.Thread(target=self.dispatcher.run)
            thread.start()
            try:
                yield thread
            finally:
                stopping.stop()
                wait_until(lambda: self._ended(thread), "the dispatcher has ended")

    def _ended(self, thread: threading.Thread) -> bool:
        stopping.wake(self.client, BLOCKED)
        return not thread.is_alive()

    def blocked(self) -> int:
        return int(self.client.info("clients")["blocked_clients"])


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that finds nothing ends at once."""
    monkeypatch.setattr(module, "BLOCK_MS", 1)
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.0)


@pytest.fixture
def scene(workers: Workers, short_waits: None) -> Iterator[Scene]:
    stopping.resume()
    slots.begin_worker("test@here")
    workers.client.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
    yield Scene(workers)
    slots.begin_worker("test@here")
    stopping.resume()


def wait_for_a_turn(scene: Scene) -> None:
    wait_until(lambda: not scene.client.exists(f"{STREAM}:turn"), "the turn is over")


# ------------------------------------------------------------------------------------------------------- new events


def test_one_message_is_sent_for_any_number_of_events(scene: Scene) -> None:
    scene.publish(1000)
    assert scene.sent_in(steps=5) == 1
    assert scene.client.llen(QUEUE) == 1


def test_no_message_is_sent_while_nothing_is_undelivered(scene: Scene) -> None:
    assert scene.sent_in(steps=3) == 0
    scene.publish(3)
    scene.claim("somebody")
    assert scene.sent_in(steps=3) == 0
    assert scene.dispatcher.activity == "running"


def test_no_message_is_sent_while_one_waits(scene: Scene) -> None:
    """Whoever sent it: another worker did, or it was there before."""
    scene.client.lpush(QUEUE, "a message of another worker")
    scene.publish()
    assert scene.sent_in(steps=3) == 0
    scene.client.delete(QUEUE)
    wait_for_a_turn(scene)
    assert scene.sent_in(steps=1) == 1


def test_a_message_whose_task_claimed_nothing_is_followed_by_another(scene: Scene) -> None:
    """It was lost, or its process was killed: nothing remembers it but the stream."""
    scene.stays_on_the_queue = False
    scene.publish()
    for number in (1, 2, 3):
        wait_for_a_turn(scene)
        scene.dispatcher.step()
        assert len(scene.sent) == number


def test_no_message_is_sent_while_a_slot_is_busy(scene: Scene) -> None:
    """Its claims take the new events, too."""
    slot = Slot(0)
    scene.publish()
    for state in (State.WAITING, State.APPLYING, State.HOLDING):
        slot.step(state)
        assert scene.sent_in(steps=2) == 0
    slot.step(State.IDLE)
    assert scene.sent_in(steps=1) == 1


def test_a_slot_whose_process_was_killed_is_not_busy(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: dead.pid)
        Slot(0).step(State.APPLYING)
    scene.publish()
    assert scene.sent_in(steps=1) == 1


def test_the_dispatcher_waits_until_a_slot_has_begun(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would send a message for each look, before the first is read."""
    monkeypatch.setattr(module, "ANSWER_SECONDS", PATIENCE_SECONDS)
    monkeypatch.setattr(scene, "stays_on_the_queue", False)
    slot = Slot(0)
    scene.publish()
    stepping = threading.Thread(target=scene.dispatcher.step)
    stepping.start()
    wait_until(lambda: len(scene.sent) == 1, "the message is sent")
    assert stepping.is_alive()
    slot.step(State.WAITING)
    stepping.join(PATIENCE_SECONDS)
    assert not stepping.is_alive()
    assert len(scene.sent) == 1


# ------------------------------------------------------------------------------------------------- one slot or more


def test_a_full_claim_brings_another_slot_to_work(scene: Scene) -> None:
    scene.slots_there = 3
    Slot(0).step(State.APPLYING)
    slots.note_full_claim()
    assert scene.sent_in(steps=3) == 1
    scene.client.delete(QUEUE)
    assert scene.sent_in(steps=3) == 0  # one full claim, one more slot
    Slot(1).step(State.APPLYING)
    slots.note_full_claim()
    assert scene.sent_in(steps=1) == 1


def test_a_full_claim_brings_no_slot_to_work_where_none_is_free(scene: Scene) -> None:
    scene.slots_there = 2
    Slot(0).step(State.APPLYING)
    Slot(1).step(State.HOLDING)
    scene.publish(5)
    for _ in range(3):
        slots.note_full_claim()
        assert scene.sent_in(steps=1) == 0


def test_a_full_claim_brings_no_slot_to_work_while_a_message_waits(scene: Scene) -> None:
    scene.slots_there = 3
    Slot(0).step(State.APPLYING)
    scene.client.lpush(QUEUE, "a message")
    slots.note_full_claim()
    assert scene.sent_in(steps=3) == 0


def test_another_slot_needs_no_turn(scene: Scene) -> None:
    """The turn keeps idle workers apart; this worker knows that it has a free slot."""
    scene.client.set(f"{STREAM}:turn", 1)
    scene.slots_there = 2
    Slot(0).step(State.APPLYING)
    slots.note_full_claim()
    assert scene.sent_in(steps=1) == 1


# -------------------------------------------------------------------------------------------------- holds and stops


def test_no_message_is_sent_during_a_hold(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HOLD_SECONDS", 0.01)
    scene.client.set(hold_key(STREAM), "{}")
    scene.publish()
    assert scene.sent_in(steps=3) == 0
    assert (scene.dispatcher.activity, scene.dispatcher.undelivered_since) == ("holding", None)
    scene.client.delete(hold_key(STREAM))
    wait_for_a_turn(scene)
    assert scene.sent_in(steps=1) == 1
    assert scene.dispatcher.activity == "running"


@pytest.mark.parametrize("why", ["a full claim", "an idle entry"])
def test_nothing_else_sends_a_message_during_a_hold(scene: Scene, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    monkeypatch.setattr(module, "HOLD_SECONDS", 0.01)
    scene.client.set(hold_key(STREAM), "{}")
    scene.slots_there = 2
    if why == "a full claim":
        Slot(0).step(State.APPLYING)
        slots.note_full_claim()
    else:
        scene.publish()
        scene.claim("dead", idle_ms=RECLAIM_MS + 1)
    assert scene.sent_in(steps=3) == 0


def test_no_message_is_sent_by_a_worker_that_stops(scene: Scene) -> None:
    scene.publish()
    stopping.stop()
    scene.dispatcher.run()
    assert scene.sent == []


def test_a_dispatcher_that_waits_ends_when_it_is_woken(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_MS", 12_000)
    with scene.running():
        wait_until(lambda: scene.blocked() == 1, "it waits for an event")
    assert scene.sent == []


def test_an_event_that_comes_after_the_stop_is_left_to_others(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_MS", 12_000)
    with scene.running():
        wait_until(lambda: scene.blocked() == 1, "it waits for an event")
        stopping.stop()
        scene.publish()
    assert scene.sent == []


# ------------------------------------------------------------------------------------------------ what was left idle


def test_an_idle_entry_sends_a_message_though_nothing_is_new(scene: Scene) -> None:
    """And lets the next drain look for entries to reclaim, though it looked a moment ago."""
    scene.publish()
    scene.claim("dead", idle_ms=RECLAIM_MS + 1)
    assert scene.sent_in(steps=1) == 1
    assert slots.take_reclaim()


def test_an_entry_that_is_not_idle_for_long_enough_sends_none(scene: Scene) -> None:
    scene.publish()
    scene.claim("alive", idle_ms=RECLAIM_MS // 2)
    assert scene.sent_in(steps=3) == 0
    assert not slots.take_reclaim()


def test_an_idle_entry_is_looked_for_now_and_then(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times in the time after which it is reclaimed; a worker that is busy looks by itself."""
    clock = Clock(scene, monkeypatch)
    scene.dispatcher.step()
    scene.publish()
    scene.claim("dead", idle_ms=2 * RECLAIM_MS)
    began = clock.now
    while not scene.sent:
        scene.dispatcher.step()
    assert clock.now - began <= RECLAIM_MS / 1000 / 4 + 1


# -------------------------------------------------------------------------------------------------- several workers


@pytest.mark.parametrize("stays", [True, False], ids=["the message waits", "the message is taken at once"])
def test_of_sixteen_workers_that_an_event_wakes_few_send(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, stays: bool
) -> None:
    monkeypatch.setattr(module, "BLOCK_MS", 12_000)
    scene.stays_on_the_queue = stays
    clients = [connect(load_settings()) for _ in range(16)]
    dispatchers = [scene.another(client) for client in clients]
    for each in dispatchers:
        each._next_reclaim = time.monotonic() + 3600
    threads = [threading.Thread(target=each.step) for each in dispatchers]
    for thread in threads:
        thread.start()
    wait_until(lambda: scene.blocked() == len(threads), "all of them wait for an event")
    scene.publish()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    for client in clients:
        client.close()
    assert 1 <= len(scene.sent) <= 4


# ------------------------------------------------------------------------------------------------------ a full Redis


@contextmanager
def full(client: Any) -> Iterator[None]:
    client.config_set("maxmemory", "1")
    try:
        yield
    finally:
        client.config_set("maxmemory", "0")


@pytest.fixture
def draining(scene: Scene) -> Iterator[Scene]:
    """With what the dispatcher has in a worker: Celery's queue to send to, and a drain of its own."""
    settings = load_settings()
    context = Context(settings)
    drain = context.drain(slots.DISPATCHER)
    send = Sender(make_app(settings), apply_events).send

    def counting_drain() -> None:
        scene.drains += 1
        drain.run(suspects=False)

    scene.dispatcher = Dispatcher(settings, scene.client, send=send, slots_there=lambda: 1, drain=counting_drain)
    yield scene
    context.database.close()


def test_a_full_redis_makes_the_dispatcher_drain_by_itself(
    draining: Scene, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    """A full Redis refuses the turn and the message, and gives out and takes back what is in the stream."""
    events = crowd(user, rng, events=500)
    draining.workers.stream.add(encoded(events))
    with full(draining.client):
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            draining.publish()
        draining.dispatcher.step()
        activity: str = draining.dispatcher.activity
        assert activity == "redis full"
        while draining.workers.stream.state().length:
            draining.dispatcher.step()
        draining.dispatcher.step()
        activity = draining.dispatcher.activity
        assert activity == "running"
    assert draining.drains >= 1
    assert draining.client.llen(QUEUE) == 0
    assert_rows_equal_their_stories(database, events)


def test_a_full_redis_that_has_room_again_gets_messages_again(draining: Scene) -> None:
    draining.publish()
    with full(draining.client):
        draining.dispatcher.step()
    assert draining.client.llen(QUEUE) == 0
    draining.publish()
    draining.dispatcher.step()
    assert draining.client.llen(QUEUE) == 1


def test_the_dispatcher_never_applies_a_suspect(
    draining: Scene, database: Database, user: uuid.UUID, rng: random.Random
) -> None:
    """One could end the main process, and the worker with it; and a full Redis cannot count the attempt."""
    database.connection.execute("truncate public.interview_dead_letters")
    (suspect,) = encoded([event("answered", f"suspect-{user}", questions_answered=1)])
    innocent = crowd(user, rng, events=20)
    (entry_id,) = draining.workers.stream.add([suspect])
    draining.claim("dead")
    draining.client.xclaim(
        STREAM, GROUP, "dead", 0, [entry_id], idle=2 * RECLAIM_MS, retrycount=SUSPECT_DELIVERIES, justid=True
    )
    draining.workers.stream.add(encoded(innocent))
    with full(draining.client):
        draining.dispatcher.step()
        draining.dispatcher.step()
    assert_rows_equal_their_stories(database, innocent)
    assert database.ledger(f"suspect-{user}") == []
    (left,) = draining.client.xpending_range(STREAM, GROUP, "-", "+", 10)
    assert (left["message_id"].decode(), left["consumer"], left["times_delivered"]) == (
        entry_id,
        b"dead",
        SUSPECT_DELIVERIES,
    )


# --------------------------------------------------------------------------------------------------- what goes wrong


def test_a_missing_group_is_created(scene: Scene) -> None:
    """From the first entry on: events that were published before the first worker are there for it."""
    scene.client.flushdb()
    scene.dispatcher.step()
    (group,) = scene.client.xinfo_groups(STREAM)
    assert (group["name"], group["last-delivered-id"]) == (GROUP.encode(), b"0-0")
    scene.client.flushdb()
    scene.publish()
    assert scene.sent_in(steps=1) == 1
    assert [each["name"] for each in scene.client.xinfo_groups(STREAM)] == [GROUP.encode()]


def test_another_group_of_the_stream_is_not_ours(scene: Scene) -> None:
    scene.client.xgroup_destroy(STREAM, GROUP)
    scene.publish()
    scene.client.xgroup_create(STREAM, "somebody", id="$")
    assert scene.sent_in(steps=1) == 1


@pytest.mark.parametrize(
    "error",
    [
        redis.exceptions.ConnectionError("away"),
        redis.exceptions.ReadOnlyError("a replica"),
        OSError("no route"),
        RuntimeError("a fault of ours"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_goes_wrong_the_dispatcher_goes_on(scene: Scene, error: BaseException) -> None:
    scene.fault = [error] * 3
    scene.publish()
    with scene.running():
        wait_until(lambda: len(scene.sent) == 1, "the message is sent after all")


def test_redis_that_is_away_is_said_and_is_no_stall(scene: Scene) -> None:
    scene.fault = [redis.exceptions.ConnectionError("away")] * 10_000
    scene.publish()
    with scene.running():
        wait_until(lambda: scene.dispatcher.activity == "redis away", "it says so")
        scene.fault.clear()
        wait_until(lambda: scene.dispatcher.activity == "running", "it is well again")
    assert len(scene.sent) == 1


def test_undelivered_events_are_known_until_a_slot_begins(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pulse calls a stall: events wait, and no slot begins anything."""
    scene.publish()
    scene.dispatcher.step()
    since = scene.dispatcher.undelivered_since
    assert since is not None
    scene.dispatcher.step()
    assert scene.dispatcher.undelivered_since == since  # the message waits, and so do the events

    slot = Slot(0)
    slot.step(State.WAITING)
    scene.dispatcher.step()
    assert scene.dispatcher.undelivered_since is None

    monkeypatch.setattr(module, "PROGRESS_SECONDS", 0.0)
    scene.dispatcher.step()
    assert scene.dispatcher.undelivered_since is not None  # busy, with nothing begun since, and events wait
    slot.step(State.HOLDING)
    scene.dispatcher.step()
    assert scene.dispatcher.undelivered_since is None


# ------------------------------------------------------------------------------------------------------ what it costs


class Clock:
    """Lets a dispatcher's waits for an event pass at once, by a clock of their own."""

    def __init__(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module, "BLOCK_MS", 16_000)
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        stream = scene.dispatcher._stream
        wait_for_undelivered: Callable[..., bytes | None] = stream.wait_for_undelivered

        def wait(*, block_ms: int) -> bytes | None:
            found = wait_for_undelivered(block_ms=1)
            self.now += 0.0 if found else block_ms / 1000
            return found

        monkeypatch.setattr(stream, "wait_for_undelivered", wait)


def test_an_idle_dispatcher_needs_few_commands_a_minute(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(scene, monkeypatch)
    scene.dispatcher.step()
    scene.client.config_resetstat()
    ends_at = clock.now + 60
    while clock.now < ends_at:
        scene.dispatcher.step()
    stats = scene.client.info("commandstats")
    calls = {
        name: each["calls"] for name, each in stats.items() if not name.startswith(("cmdstat_info", "cmdstat_config"))
    }
    assert 0 < sum(calls.values()) < 20, calls


def test_a_busy_worker_has_a_dispatcher_that_asks_nothing(scene: Scene) -> None:
    Slot(0).step(State.APPLYING)
    scene.publish()
    scene.client.config_resetstat()
    for _ in range(20):
        scene.dispatcher.step()
    stats = scene.client.info("commandstats")
    assert [name for name in stats if not name.startswith(("cmdstat_info", "cmdstat_config"))] == []
