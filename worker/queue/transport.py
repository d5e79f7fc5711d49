"""Celery's Redis transport, without a memory of its own: what is not done is in the stream.

Kombu keeps a copy of each message that a worker has taken, in Redis, and gives it to others after a timeout. We need
neither the copy nor the round trips for it, and a full Redis refuses them. Where a connection is lost, kombu tries to
put such messages back on the queue through that same connection, which ends the worker (kombu 5.7: "Unrecoverable
error") or writes them to a file in the temporary folder. Our messages carry nothing: they are not put back.

What is overridden, and where kombu has it:

    Channel.ack_emulation, Channel.do_restore   documented in kombu/transport/redis.py and virtual/base.py
    Channel.client, with a callback for BRPOP   redis.py, `Channel._brpop_read`: celery ends on a message it cannot read
    Channel.close                               redis.py: waits for the end of a BRPOP
    Transport.brpop_timeout                     redis.py, see worker/queue/options.py
"""

from contextlib import suppress
from functools import cached_property
from typing import Any, Final

from celery import current_app
from kombu.transport import redis

from events.publisher import FIELD
from worker import stopping
from worker.logs import get_logger
from worker.queue.messages import fault, names_our_task

STREAM_OPTION: Final = "interview_stream"  # of broker_transport_options: the stream's key

_unreadable: list[bytes] = []  # popped from the queue, and not yet in the stream; here, as a channel may end

log = get_logger(__name__)


class Channel(redis.Channel):
    """A channel that acknowledges in memory, and keeps from Celery what it cannot read.

    Such a message goes to the stream as it is, and from there to the dead letters: nothing that somebody has put
    on the queue vanishes. (An event that was put there by mistake is applied.)
    """

    ack_emulation = False
    do_restore = False

    @cached_property
    def client(self) -> Any:
        """The client that waits for messages: each passes `_screened` on its way to Celery."""
        client = super().client
        client.set_response_callback("BRPOP", self._screened)
        return client

    def _screened(self, answer: Any, **_: Any) -> Any:
        """Redis' answer (queue and message, or None), or None instead of a message that cannot be read."""
        task = answer is not None and not answer[0].endswith(b".pidbox")  # and not a reply to `celery inspect`
        if task and (why := fault(answer[1], current_app.tasks)):
            self._set_aside(answer[1], why)
            answer = None
        self._flush()
        return answer

    def _set_aside(self, message: bytes, why: str) -> None:
        if names_our_task(message):
            log.warning("message.ignored", why=why, bytes=len(message))
        else:
            log.warning("message.unreadable", why=why, bytes=len(message), next="interviews dlq list")
            _unreadable.append(message)

    def _flush(self) -> None:
        """Move what was set aside to the stream; what cannot be moved now waits for the next answer of Redis."""
        while _unreadable:
            try:
                with self.conn_or_acquire() as client:
                    client.xadd(self.connection.client.transport_options[STREAM_OPTION], {FIELD: _unreadable[0]})
            except self.connection_errors + self.connection.channel_errors:
                return  # one comes every brpop_timeout
            del _unreadable[0]

    def close(self) -> None:
        """As kombu, which waits for the end of a BRPOP: a long one ends at once."""
        if not self.closed and self.brpop_timeout != redis.Transport.brpop_timeout:
            errors = self.connection_errors + self.connection.channel_errors
            with suppress(*errors), self.conn_or_acquire() as client:
                stopping.wake(client, str(self.client_name))
        super().close()  # type: ignore[no-untyped-call]


class Transport(redis.Transport):
    """What `broker_transport` names; `broker_transport_options` must name the stream and the client, too."""

    Channel = Channel
