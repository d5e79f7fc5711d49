"""What a worker asks of its broker: to be closed at once, and not to hear of other workers."""

import threading

import pytest

from tests.worker_process import PATIENCE_SECONDS, Workers
from worker.app import make_app
from worker.queue.transport import Transport
from worker.settings import load_settings


def test_a_connection_that_waits_for_a_message_is_closed_without_one(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Transport, "brpop_timeout", 0)  # for ever
    app = make_app(load_settings())
    app.conf.broker_transport_options["socket_timeout"] = None
    connection = app.connection_for_read()
    with app.amqp.TaskConsumer(connection.default_channel), pytest.raises(TimeoutError):
        connection.drain_events(timeout=0.1)
    assert blocked(workers) == [app.conf.broker_transport_options["client_name"]]

    closing = threading.Thread(target=connection.close, daemon=True)
    closing.start()
    closing.join(PATIENCE_SECONDS)

    assert not closing.is_alive()
    assert blocked(workers) == []


def blocked(workers: Workers) -> list[str]:
    """The names of the connections that wait for a message."""
    return [each["name"] for each in workers.client.client_list() if each["cmd"] == "brpop"]


def test_workers_do_not_greet_each_other_nor_listen_to_each_other(workers: Workers) -> None:
    with workers.running() as worker:
        workers.stream.add([b"{}"])
        workers.wait_until_empty()
        heard = [each for each in workers.client.client_list() if int(each["psub"])]
        assert len(heard) == 1  # to `celery inspect`
        assert workers.client.pubsub_numpat() == 1
        assert workers.stop(worker) == 0
