"""What can go wrong at the engine's side.

EventsError
├── InvalidEvent       the event breaks the contract: correct it, trying again will not help
├── PublishError       neither Redis nor a spool took the event: keep it and publish it again, a repeat is harmless
├── DurabilityError    Redis has not what `durable=True` asks for: configure it, or publish without
└── SpoolError         the spool's file cannot be used: mend its path, its rights or its disk
"""

from typing import Literal

Reason = Literal["invalid_json", "invalid_event", "unsupported_type", "too_large"]


class EventsError(Exception):
    """Any error of this package."""


class InvalidEvent(EventsError, ValueError):
    """An event breaks the contract; `detail` names the fields and never repeats their values."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail


class PublishError(EventsError):
    """Redis did not confirm an event in time, and there is no spool or it is full; the driver's error is the cause.

    The first `published` of the events given are in the stream for certain. The others may be; publishing them
    again is harmless, because an event is applied once however often it arrives.
    """

    def __init__(self, message: str, *, published: int) -> None:
        super().__init__(message)
        self.published = published


class DurabilityError(EventsError):
    """Redis cannot confirm that an event is on its disk; the driver's error, with Redis' own words, is the cause."""


class SpoolError(EventsError):
    """The spool's file cannot be opened, read or written, or it is full; SQLite's error is the cause."""
