"""Real Postgres, PostgREST and Redis without Docker and without root: for the demo, the tests and a first look."""

from worker.embedded.server import StackError
from worker.embedded.stack import Stack

__all__ = ["Stack", "StackError"]
