"""Celery's Redis transport, without a memory of its own: what is not acknowledged is in the stream.

Kombu keeps a copy of each message that a worker has taken, in Redis, and gives it to others after a timeout. We need
neither the copy nor the round trips for it. And where a connection is lost, its try to put such messages back on the
queue fails on that connection and ends the worker (kombu 5.7: "Unrecoverable error"), or writes them to a file in the
temporary folder. Here they go back on the queue where that can be done, as at SIGTERM, and to the stream otherwise.

Only documented parts of kombu are overridden: `ack_emulation`, `Channel.QoS`, `QoS.restore_unacked`.
"""

from typing import Any

from kombu.transport import redis, virtual

from worker.logs import get_logger

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
    """A channel that acknowledges in memory."""

    ack_emulation = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)  # type: ignore[no-untyped-call]
        self.QoS = QoS  # type: ignore[assignment]  # kombu itself does so where acknowledgements are in memory


class Transport(redis.Transport):
    """What `broker_transport` names."""

    Channel = Channel
