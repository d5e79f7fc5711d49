"""The servers that a command talks to; the connections are given back when it ends."""

import click
import redis

from worker.database import Database
from worker.settings import Settings, StreamSettings
from worker.stream import connect


def open_database(settings: Settings) -> Database:
    """Supabase, for as long as the command runs."""
    database = Database(settings)
    click.get_current_context().call_on_close(database.close)
    return database


def open_redis(settings: StreamSettings) -> redis.Redis:
    """Redis, for as long as the command runs."""
    client = connect(settings)
    click.get_current_context().call_on_close(client.close)
    return client
