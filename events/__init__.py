"""What an interview engine needs: the events' contract and the publisher. Imports pydantic and redis, nothing else.

from events import Answered, Publisher

with Publisher() as publisher:
    publisher.publish(Answered.new("session_api_123456", questions_answered=5, duration_minutes=15))
"""

from events.contract import (
    EVENT_TYPES,
    MAX_EVENT_BYTES,
    Answered,
    Cancelled,
    Event,
    Finished,
    Started,
    json_schema,
    parse_event,
)
from events.errors import DurabilityError, EventsError, InvalidEvent, PublishError, SpoolError
from events.publisher import AsyncPublisher, Publisher

__all__ = [
    "EVENT_TYPES",
    "MAX_EVENT_BYTES",
    "Answered",
    "AsyncPublisher",
    "Cancelled",
    "DurabilityError",
    "Event",
    "EventsError",
    "Finished",
    "InvalidEvent",
    "PublishError",
    "Publisher",
    "SpoolError",
    "Started",
    "json_schema",
    "parse_event",
]
