"""Putting the one message that workers send on Celery's queue."""

from contextlib import suppress
from typing import Any, Final

import redis
from celery import Celery, Task
from kombu.exceptions import OperationalError

from worker.errors import RedisFull

QUEUE_AWAY: Final = (redis.RedisError, OperationalError, OSError)


class Sender:
    """Sends `task`, without arguments, through one connection that it keeps: to connect each time costs 2 ms."""

    def __init__(self, app: Celery, task: Task) -> None:
        self._app = app
        self._task = task
        self._producer: Any = None

    def send(self) -> None:
        """Send one message. Raises RedisFull, or what QUEUE_AWAY names."""
        if self._producer is None:
            self._producer = self._app.amqp.Producer(self._app.connection_for_write())
        try:
            self._task.apply_async(retry=False, producer=self._producer)
        except Exception as error:
            broken, self._producer = self._producer, None
            with suppress(*QUEUE_AWAY):
                broken.connection.release()
            if _is_full(error):
                raise RedisFull from error
            raise


def _is_full(error: BaseException | None) -> bool:
    """Whether Redis refused for want of memory; kombu keeps its answer as the cause of its own error."""
    while error is not None:
        if isinstance(error, redis.exceptions.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False
