"""Real Postgres, PostgREST and Redis without Docker and without root: for the demo, the tests and a first look."""

from worker.embedded.stack import Stack, StackError

__all__ = ["Stack", "StackError"]
