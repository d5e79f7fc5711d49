"""The hold: one prober, one line at its begin and one at its end, and no pack lost to it."""

import threading
from collections.abc import Callable, Iterator

import pytest
from structlog.testing import capture_logs

from tests.worker_process import Workers, wait_until
from worker import stopping
from worker.errors import Misconfigured, PackGivenBack, RefusedCall, Unavailable
from worker.hold import Hold
from worker.settings import load_settings


@pytest.fixture(autouse=True)
def _running() -> Iterator[None]:
    stopping.resume()
    yield
    stopping.resume()


def hold_of(workers: Workers, *, hold_seconds: float = 60.0) -> Hold:
    quick = {"backoff_seconds": 0.01, "rpc_timeout_seconds": 1.0, "hold_seconds": hold_seconds}
    return Hold(workers.client, load_settings().model_copy(update=quick))


def failing(times: int, error: Exception) -> Callable[[], str]:
    left = [error] * times

    def call() -> str:
        if left:
            raise left.pop()
        return "done"

    return call


def test_a_call_that_succeeds_knows_of_no_hold(workers: Workers) -> None:
    assert hold_of(workers).run(lambda: "done") == "done"
    assert workers.hold() is None


def test_an_outage_is_told_once_at_its_begin_and_once_at_its_end(workers: Workers) -> None:
    with capture_logs() as logs:
        assert hold_of(workers).run(failing(20, Unavailable("HTTP 503"))) == "done"
    assert [line["event"] for line in logs] == ["hold.began", "hold.ended"]
    assert workers.hold() is None


def test_a_hold_tells_the_remedy_where_a_person_must_mend_it(workers: Workers) -> None:
    seen = []

    def call() -> str:
        seen.append(workers.hold())
        if len(seen) < 3:
            raise Misconfigured("wrong key", remedy="set the key")
        return "done"

    hold_of(workers).run(call)
    assert seen[0] is None
    assert [(hold.reason, hold.remedy) for hold in seen[1:] if hold] == [("wrong key", "set the key")] * 2


def test_an_answer_that_is_a_refusal_ends_the_hold_too(workers: Workers) -> None:
    answers: list[Exception] = [RefusedCall("HTTP 400, 22P02"), Unavailable("HTTP 503")]

    def call() -> str:
        raise answers.pop()

    with pytest.raises(RefusedCall):
        hold_of(workers).run(call)
    assert workers.hold() is None


def test_only_one_of_many_tasks_probes(workers: Workers) -> None:
    ill, probes = threading.Event(), []
    ill.set()

    def call() -> str:
        probes.append(threading.get_ident())
        if ill.is_set():
            raise Unavailable("HTTP 503")
        return "done"

    with capture_logs() as logs:
        tasks = [threading.Thread(target=hold_of(workers).run, args=(call,)) for _ in range(8)]
        for task in tasks:
            task.start()
        wait_until(lambda: len(probes) >= 8 + 20, "the prober has probed again and again")
        again = {probe for probe in probes if probes.count(probe) > 1}
        ill.clear()
        for task in tasks:
            task.join()
    assert len(again) == 1
    assert [line["event"] for line in logs] == ["hold.began", "hold.ended"]


def test_a_stopping_worker_gives_its_pack_back_and_lets_another_probe(workers: Workers) -> None:
    def call() -> str:
        stopping.stop()
        raise Unavailable("HTTP 503")

    with pytest.raises(PackGivenBack):
        hold_of(workers).run(call)
    assert workers.hold() is None


def test_an_outage_that_outlasts_the_hold_gives_the_pack_back(workers: Workers) -> None:
    with pytest.raises(PackGivenBack):
        hold_of(workers, hold_seconds=0.05).run(failing(1_000_000, Unavailable("HTTP 503")))


def test_who_waits_keeps_its_claims_meanwhile(workers: Workers) -> None:
    kept: list[bool] = []
    ill = Unavailable("HTTP 503")
    assert hold_of(workers).run(failing(20, ill), waiting=lambda: kept.append(True)) == "done"
    assert len(kept) >= 20
