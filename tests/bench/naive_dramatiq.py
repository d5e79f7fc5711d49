"""As naive.py, in dramatiq."""

import os
from typing import Any, Final

import dramatiq
from dramatiq.brokers.redis import RedisBroker

from tests.bench.naive import QUEUE, apply

MESSAGES: Final = f"dramatiq:{QUEUE}.msgs"  # those that are not acknowledged, in Redis

broker = RedisBroker(url=os.environ["REDIS_URL"])  # type: ignore[no-untyped-call]
dramatiq.set_broker(broker)


@dramatiq.actor(queue_name=QUEUE, max_retries=0)
def apply_event(event: dict[str, Any]) -> None:
    apply(event)
