"""What we are measured against: one task per event, one RPC per task, as anyone would write it first; in Celery."""

import os
from functools import cache
from typing import Any, Final

from celery import Celery
from supabase import Client, ClientOptions, create_client
from yarl import URL

QUEUE: Final = "naive"

app = Celery("tests.bench.naive", broker=os.environ["REDIS_URL"])
app.conf.update(task_default_queue=QUEUE, task_acks_late=True, task_ignore_result=True)


@cache
def client() -> Client:
    options = ClientOptions(auto_refresh_token=False, persist_session=False)
    made = create_client(os.environ["SUPABASE_URL"], os.environ["SUPABASE_SECRET_KEY"], options)
    made.rest_url = URL(os.environ["SUPABASE_REST_URL"])
    return made


def call(event: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The RPC for an event, and its parameters."""
    session, data = {"p_session_id": event["subject"]}, event["data"]
    match event["type"]:
        case "interview.started":
            names = {f"p_{name}": data.get(name) for name in ("resume_filename", "job_description_filename")}
            return "create_interview_session", {
                **session,
                **names,
                "p_user_id": data["user_id"],
                "p_email": data["email"],
            }
        case "interview.answered":
            numbers = {f"p_{name}": data.get(name) for name in ("questions_answered", "duration_minutes")}
            return "update_interview_progress", {**session, **numbers}
        case "interview.finished":
            return "complete_interview", {**session, "p_score": data["score"], "p_feedback": data["feedback"]}
        case _:
            return "cancel_interview", {**session, "p_reason": data.get("reason")}


def apply(event: dict[str, Any]) -> None:
    """One event, one RPC."""
    rpc, parameters = call(event)
    client().rpc(rpc, parameters).execute()


@app.task
def apply_event(event: dict[str, Any]) -> None:
    apply(event)
