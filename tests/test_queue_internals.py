"""The canary: what worker/queue/ relies on in Celery, kombu and billiard is there, and works as it expects.

Each test names what breaks without them, and the place upstream. Paths are those of https://github.com/celery/celery,
…/kombu and …/billiard. Where one fails after an upgrade, keep the older version until worker/queue/ is mended (the
bounds are in pyproject.toml).
"""

import ast
import inspect
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import MagicMock

import billiard
import billiard.pool
import pytest
from celery import Celery
from celery.concurrency.base import BasePool
from celery.concurrency.prefork import TaskPool
from celery.utils.log import current_process_index
from celery.worker.autoscale import Autoscaler
from celery.worker.components import Consumer
from celery.worker.consumer.gossip import Gossip
from celery.worker.consumer.heart import Heart
from celery.worker.consumer.mingle import Mingle
from kombu.pidbox import Mailbox
from kombu.transport import redis as kombu_redis
from kombu.transport import virtual

from tests.worker_process import Workers
from worker.app import make_app
from worker.queue.options import BRPOP_SECONDS, HEARTBEAT_SECONDS, set_worker_options
from worker.queue.pool import RESULT_TRIES, pool_processes, shorten_the_end_of_pool_processes, slots_of
from worker.queue.transport import Channel, Transport
from worker.settings import load_settings

ROOT: Final = Path(__file__).parent.parent
INTERNALS: Final = ("billiard", "kombu.transport", "kombu.asynchronous", "celery.worker", "celery.concurrency")


def source(thing: Any) -> str:
    return textwrap.dedent(inspect.getsource(thing))


@pytest.fixture(autouse=True)
def _brpop_timeout_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What set_worker_options sets is the class's."""
    monkeypatch.setattr(Transport, "brpop_timeout", kombu_redis.Transport.brpop_timeout)


@pytest.fixture
def app(workers: Workers) -> Celery:
    return make_app(load_settings())


@pytest.fixture
def channel(app: Celery) -> Iterator[Any]:
    """A channel as a worker has it, on a real Redis."""
    with app.connection_for_read() as connection:
        yield connection.default_channel


# ----------------------------------------------------------------------------------------------- billiard's processes


class Counted:
    """What a process of the pool knows of its results that were read: none."""

    value = 0

    def __bool__(self) -> bool:
        return True


def test_billiard_waits_as_long_for_a_result_as_we_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a pool process may wait 30 s at its end: https://github.com/celery/billiard/blob/main/billiard/pool.py
    (Worker._ensure_messages_consumed).
    """
    assert billiard.pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT > 0
    monkeypatch.setattr(billiard.pool, "GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT", 300)
    shorten_the_end_of_pool_processes()
    waits: list[float] = []
    monkeypatch.setattr(billiard.pool.time, "sleep", waits.append)
    process = SimpleNamespace(on_ready_counter=Counted())

    assert not billiard.pool.Worker._ensure_messages_consumed(process, completed=1)

    assert len(waits) == RESULT_TRIES
    assert sum(waits) == pytest.approx(1.0)


def test_a_pool_process_waits_for_its_result_before_it_ends() -> None:
    """Or there is nothing left to shorten: https://github.com/celery/billiard/blob/main/billiard/pool.py
    (Worker.workloop).
    """
    assert "_ensure_messages_consumed" in source(billiard.pool.Worker.workloop)


NUMBERED: Final = """
import json, os, time
import billiard.pool

from worker.queue.pool import pool_processes
from worker.queue.slot import slot_of_process


def numbered(_):
    time.sleep(0.5)  # so that each process gets one
    return os.getpid(), slot_of_process()


if __name__ == "__main__":
    with billiard.pool.Pool(3) as pool:
        found = pool.map(numbered, range(3), chunksize=1)
        known = pool_processes()
        print(json.dumps([sorted(number for _, number in found), sorted(known) == sorted(pid for pid, _ in found)]))
    assert slot_of_process() is None
"""


def test_each_process_of_a_pool_has_a_number_and_is_a_known_child(tmp_path: Path) -> None:
    """Or two slots write one row, and a second SIGTERM leaves processes behind. `index` is set by billiard/pool.py
    (Pool._create_worker_process), read by celery.utils.log.current_process_index:
    https://docs.celeryq.dev/en/stable/userguide/workers.html#prefork-pool-process-index
    """
    script = tmp_path / "numbered.py"
    script.write_text(NUMBERED)
    done = subprocess.run(
        [sys.executable, script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[[0, 1, 2], true]", done.stderr


def test_a_process_outside_a_pool_has_no_number() -> None:
    """Or threads would share one slot: celery/utils/log.py, current_process_index."""
    assert current_process_index(base=0) is None


def test_without_a_pool_there_are_no_pool_processes() -> None:
    """billiard.active_children() knows the children that billiard started, and no others."""
    assert billiard.active_children() == []
    assert pool_processes() == []


# ------------------------------------------------------------------------------------------------------ Celery's pool


@pytest.mark.parametrize("pool", [BasePool, TaskPool], ids=["threads", "prefork"])
def test_a_pool_says_how_many_tasks_it_runs_at_once(pool: type[BasePool]) -> None:
    """Or the dispatcher does not know when a slot is free: celery/concurrency/base.py and prefork.py, num_processes."""
    assert isinstance(inspect.getattr_static(pool, "num_processes"), property)
    worker = SimpleNamespace(autoscaler=None, pool=BasePool(4))
    assert slots_of(worker) == 4


def test_an_autoscaler_says_how_many_there_may_be() -> None:
    """celery/worker/autoscale.py; a worker without `--autoscale` has an `autoscaler` of None (components.py)."""
    pool = SimpleNamespace(num_processes=2, grow=lambda n: None, shrink=lambda n: None)
    scaler = Autoscaler(pool, 7, min_concurrency=2, worker=SimpleNamespace(consumer=None))
    assert slots_of(SimpleNamespace(autoscaler=scaler, pool=pool)) == 7


# ------------------------------------------------------------------------------------------------ Celery's own options


def worker_with(app: Celery, **options: Any) -> Any:
    """A worker as `celery worker` makes it, before it starts; its bootsteps get `options`."""
    controller = app.WorkController(pool="solo", **options)
    assert controller.options.items() >= options.items()
    return controller


@pytest.mark.parametrize("step", [Gossip, Mingle])
def test_a_consumer_is_told_not_to_gossip_nor_to_mingle(app: Celery, step: Any) -> None:
    """Or workers greet and hear each other: celery/worker/consumer/gossip.py and mingle.py."""
    worker = SimpleNamespace(options={})
    set_worker_options(worker)
    name = f"without_{step.__name__.lower()}"
    assert worker.options[name] is True
    assert name in inspect.signature(step.__init__).parameters
    consumer = MagicMock(app=app, hostname="one@here")
    assert not step(consumer, **worker.options).enabled


def test_a_consumers_heart_beats_as_seldom_as_we_say(app: Celery) -> None:
    """Or each worker speaks to Flower every 2 s: celery/worker/consumer/heart.py. The command line goes first."""
    for given, wanted in ((None, HEARTBEAT_SECONDS), (5, 5)):
        worker = SimpleNamespace(options={"heartbeat_interval": given})
        set_worker_options(worker)
        assert Heart(SimpleNamespace(app=app), **worker.options).heartbeat_interval == wanted


def test_a_workers_options_reach_its_consumer(app: Celery) -> None:
    """Or the three above are read by nobody: celery/worker/components.py, Consumer.create."""
    worker = worker_with(app, without_gossip=True, heartbeat_interval=17)
    made: dict[str, Any] = {}
    worker.consumer_cls = lambda *args, **named: made.update(named)
    worker.on_consumer_ready = worker.disable_rate_limits = worker.initial_prefetch_count = worker.pool = None
    worker.timer = worker.hub = None
    worker.process_task = None
    worker.prefetch_multiplier = worker.max_concurrency = 1
    Consumer(worker).create(worker)
    assert made["worker_options"] is worker.options


# ------------------------------------------------------------------------------------------ kombu's transport of Redis


def test_a_worker_waits_for_a_message_as_long_as_we_say(channel: Any, app: Celery) -> None:
    """Or it asks Redis once a second: kombu/transport/redis.py, Transport.brpop_timeout, read in Channel.__init__."""
    assert channel.brpop_timeout == kombu_redis.Transport.brpop_timeout == 1
    set_worker_options(SimpleNamespace(options={}))
    with app.connection_for_read() as connection:
        assert connection.default_channel.brpop_timeout == BRPOP_SECONDS
        sent: list[tuple[Any, ...]] = []
        connection.default_channel.client.connection = SimpleNamespace(
            send_command=lambda *words: sent.append(words), disconnect=lambda: None
        )
        connection.default_channel._active_queues = ["interview"]
        connection.default_channel._update_queue_cycle()
        connection.default_channel._brpop_start()
        connection.default_channel._in_poll = None
    assert (sent[0][0], sent[0][-1]) == ("BRPOP", BRPOP_SECONDS)


def test_no_copy_of_a_message_is_kept(channel: Any) -> None:
    """Or a full Redis refuses it, and others get it again after an hour: kombu/transport/redis.py, Channel.__init__
    reads ack_emulation, and takes virtual.QoS, which knows nothing of Redis.
    """
    assert kombu_redis.Channel.ack_emulation is True
    assert type(channel.qos) is virtual.QoS


def test_a_message_that_was_taken_is_not_put_back_at_the_end(channel: Any) -> None:
    """Or the try to do so ends the worker where the connection is lost, or writes it to a file:
    kombu/transport/virtual/base.py, QoS.restore_unacked_once reads Channel.do_restore.
    """
    assert virtual.Channel.do_restore is True
    channel.qos.append(SimpleNamespace(delivery_info={}), "tag")
    restored: list[Any] = []
    channel._restore = restored.append
    channel.qos.restore_unacked_once()
    assert restored == []


def test_the_client_that_waits_for_messages_is_the_one_we_screen(channel: Any) -> None:
    """Or a message that is not JSON ends the worker: kombu/transport/redis.py, Channel._brpop_read takes its answer
    from `client.parse_response(…, "BRPOP")`, and redis-py hands that to the client's callback for BRPOP.
    """
    assert isinstance(
        inspect.getattr_static(kombu_redis.Channel, "client"), type(inspect.getattr_static(Channel, "client"))
    )
    assert channel.client.response_callbacks["BRPOP"] == channel._screened
    seen: list[tuple[Any, ...]] = []

    def parse_response(*args: Any, **_: Any) -> None:
        seen.append(args)

    channel.client.parse_response = parse_response
    with pytest.raises(Empty):
        channel._brpop_read()
    assert [args[1] for args in seen] == ["BRPOP"]


def test_an_answer_that_we_keep_is_none_for_kombu(channel: Any, workers: Workers) -> None:
    """By way of redis-py itself, to its end: what Redis pops and we set aside is no message for kombu."""
    workers.client.lpush("interview", b"not JSON")
    channel._active_queues = ["interview"]
    channel._update_queue_cycle()
    channel.connection._callbacks["interview"] = lambda message: pytest.fail("delivered")
    channel.client.connection = channel.client.connection or channel.client.connection_pool.get_connection()
    channel._brpop_start()
    with pytest.raises(Empty):
        channel._brpop_read()
    assert workers.stream.state().length == 1


def test_replies_to_celery_inspect_have_queues_that_end_in_pidbox(app: Celery) -> None:
    """Or they would be taken for messages that nobody can read: kombu/pidbox.py, Mailbox.reply_exchange and
    get_reply_queue.
    """
    with app.connection_for_read() as connection:
        queue = app.control.mailbox(connection).reply_queue
        assert queue.name.endswith(".pidbox")
        assert Mailbox.reply_exchange_fmt.endswith(".pidbox")


def test_a_channels_connections_bear_the_name_that_we_give(channel: Any, workers: Workers, app: Celery) -> None:
    """Or SIGTERM cannot wake the read that waits: kombu/transport/redis.py, Channel.client_name, one of
    Channel.from_transport_options.
    """
    name = app.conf.broker_transport_options["client_name"]
    channel.client.ping()
    assert "client_name" in kombu_redis.Channel.from_transport_options
    assert channel.client_name == name
    assert name in {each["name"] for each in workers.client.client_list()}


def test_kombu_waits_for_the_end_of_a_read_when_a_channel_closes() -> None:
    """Or our own close() is needless: kombu/transport/redis.py, Channel.close reads while `_in_poll`. What ours does is
    tested in tests/test_transport.py.
    """
    assert "_brpop_read" in source(kombu_redis.Channel.close)
    assert "close" in Channel.__dict__


def test_one_channel_may_borrow_another_connection(channel: Any) -> None:
    """For the wake at its close, and for what goes to the stream: kombu/transport/redis.py, Channel.conn_or_acquire."""
    with channel.conn_or_acquire() as client:
        assert client is not channel.client
        assert client.ping()


# ------------------------------------------------------------------------------------------------------ nobody else


def imported_by(file: Path) -> set[str]:
    """The modules that a file imports, those within functions and `if TYPE_CHECKING` too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
    return found


def test_only_worker_queue_touches_the_insides() -> None:
    """pyproject.toml says so, too ("one package touches …"); this one also sees imports of a module's parts."""
    offenders = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in sorted((ROOT / "worker").rglob("*.py"))
        if not file.is_relative_to(ROOT / "worker" / "queue")
        for name in sorted(imported_by(file))
        if any(name == each or name.startswith(f"{each}.") for each in INTERNALS)
    ]
    assert offenders == []
