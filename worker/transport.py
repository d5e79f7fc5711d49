"""Celery's Redis transport, without a memory of its own: what is not acknowledged is in the stream.

Kombu keeps a copy of each message that a worker has taken, in Redis, and gives it to others after a timeout. We need
neither the copy nor the round trips for it. And where a connection is lost, its try to put such messages back on the
queue fails on that connection and ends the worker (kombu 5.7: "Unrecoverable error"), or writes them to a file in the
temporary folder. Here they go back on the queue where that can be done, as at SIGTERM, and to the stream otherwise.

Only documented parts of kombu are overridden: `ack_emulation`, `Channel.QoS`, `QoS.restore_unacked`, `Channel.client`,
`Channel.close`, `Transport.brpop_timeout`.
"""

from contextlib import suppress
from functools import cached_property
from typing import Any, Final

from celery import current_app
from kombu.transport import redis, virtual

from events.publisher import FIELD
from worker import stopping
from worker.logs import get_logger
from worker.messages import fault

STREAM_OPTION: Final = "interview_stream"  # of broker_transport_options: the stream's key

_unreadable: list[bytes] = []  # popped from the queue, and not yet in the stream; here, as a channel may end

log = get_logger(__name__)


class QoS(virtual.QoS):
    """Counts the messages that a worker has taken, in its memory."""

    def restore_unacked(self) -> list[Any]:
        """Put messages back on the queue; those that cannot be put there come again from the stream."""
        failed = super().restore_unacked()  # type: ignore[no-untyped-call]
        if failed:
            log.info("packs.left_to_the_stream", packs=len(failed))
        return []


class Channel(redis.Channel):
    """A channel that acknowledges in memory, and keeps from Celery what it cannot read.

    Such a message goes to the stream as it is, and from there to the dead letters: nothing that somebody has put
    on the queue vanishes. (An event that was put there by mistake is applied.)
    """

    ack_emulation = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)  # type: ignore[no-untyped-call]
        self.QoS = QoS  # type: ignore[assignment]  # kombu itself does so where acknowledgements are in memory

    @cached_property
    def client(self) -> Any:
        """The client that waits for messages: each passes `_screened` on its way to Celery."""
        client = super().client
        client.set_response_callback("BRPOP", self._screened)
        return client

    def _screened(self, answer: Any, **_: Any) -> Any:
        """Redis' answer (queue and message, or None), or None instead of a message that cannot be read."""
        packs = answer is not None and not answer[0].endswith(b".pidbox")  # and not a reply to `celery inspect`
        if packs and (why := fault(answer[1], current_app.tasks)):
            log.warning("message.unreadable", why=why, bytes=len(answer[1]), next="interviews dlq list")
            _unreadable.append(answer[1])
            answer = None
        while _unreadable:
            try:
                with self.conn_or_acquire() as client:
                    client.xadd(self.connection.client.transport_options[STREAM_OPTION], {FIELD: _unreadable[0]})
            except self.connection_errors + self.connection.channel_errors:
                break  # until the next answer: one comes every brpop_timeout
            del _unreadable[0]
        return answer

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
