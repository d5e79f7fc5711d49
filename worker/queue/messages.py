"""Messages on Celery's queue: which of them a worker can read.

Celery itself ends the worker on a message that is not JSON or not base64, and drops one whose task, time or content
type it does not know. Nobody but our workers and beat should write that queue; a mistyped script does.
"""

import base64
import binascii
import inspect
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Final, Literal

from celery import Task
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

TASK: Final = "interview.apply_events"
_ARGUMENTS = TypeAdapter(tuple[list[JsonValue], dict[str, JsonValue], JsonValue])


class Part(BaseModel):
    """A part of a message. Fields that a worker does not read are not checked."""

    model_config = ConfigDict(strict=True)


Time = Annotated[str, AfterValidator(datetime.fromisoformat)]  # as Celery reads it


class Headers(Part):
    """Celery's message protocol 2, as far as a worker reads it before the task does."""

    task: str
    id: str
    root_id: str | None = None
    parent_id: str | None = None
    group: str | None = None
    group_index: int | None = None
    shadow: str | None = None
    origin: str | None = None
    argsrepr: str | None = None
    kwargsrepr: str | None = None
    eta: Time | None = None
    expires: Time | None = None
    retries: int | None = 0
    timelimit: tuple[float | None, float | None] = (None, None)
    ignore_result: bool | None = None
    replaced_task_nesting: int | None = 0
    stamped_headers: list[str] | None = None
    stamps: dict[str, JsonValue] | None = None
    compression: None = None


class DeliveryInfo(Part):
    """Where a message goes when it is put back."""

    exchange: str
    routing_key: str


class Properties(Part):
    """Kombu's properties of a message in Redis."""

    delivery_tag: str
    delivery_info: DeliveryInfo
    body_encoding: Literal["base64"]
    priority: int | None = 0
    correlation_id: str | None = None
    reply_to: str | None = None


class Envelope(Part):
    """A message as kombu keeps it in a Redis list."""

    headers: Headers
    properties: Properties
    body: str
    content_type: Literal["application/json"] = Field(alias="content-type")
    content_encoding: Literal["utf-8"] = Field(alias="content-encoding")


class _Name(Part):
    task: str


class _Named(Part):
    headers: _Name


def fault(raw: bytes, tasks: Mapping[str, Task]) -> str | None:
    """Why a worker with these tasks cannot read a message, without its content; None where it can."""
    try:
        envelope = Envelope.model_validate_json(raw)
        args, kwargs, _ = _ARGUMENTS.validate_json(base64.b64decode(envelope.body, validate=True))
        inspect.signature(tasks[envelope.headers.task].run).bind(*args, **kwargs)
    except ValidationError as invalid:
        problem = invalid.errors(include_url=False, include_context=False, include_input=False)[0]
        return ": ".join(filter(None, (".".join(map(str, problem["loc"])), problem["msg"])))
    except binascii.Error:
        return "body: not base64"
    except KeyError:
        return "headers.task: no task of this worker"
    except (TypeError, ValueError) as error:
        return f"body: {error}"
    return None


def names_our_task(raw: bytes) -> bool:
    """Whether a message that cannot be read was meant for the task; whatever events it carried are in the stream."""
    try:
        return _Named.model_validate_json(raw).headers.task == TASK
    except ValidationError:
        return False
