"""Fixtures on real servers: one embedded stack for the whole run, fresh users and names for each test."""

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.rows import dict_row

from tests.database import Database
from tests.worker_process import Workers, workers_on
from worker.embedded import Stack


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Postgres with our SQL, PostgREST and Redis; INTERVIEW_TEST_POSTGRES chooses the version (15, 16 or 18)."""
    version = int(os.environ.get("INTERVIEW_TEST_POSTGRES", "18"))
    folder = Path(tmp_path_factory.mktemp("stack")) / "stack"
    with Stack(folder, postgres_version=version, temporary=True) as running:
        yield running


@pytest.fixture
def database(stack: Stack) -> Iterator[Database]:
    """A superuser's connection with the few calls that tests of the SQL need."""
    with psycopg.connect(stack.database_url, autocommit=True, row_factory=dict_row) as connection:
        yield Database(connection)


@pytest.fixture
def user(database: Database) -> uuid.UUID:
    """A user who may be interviewed."""
    return database.create_user()


@pytest.fixture
def workers(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workers]:
    """Starts real Celery workers on an empty stream."""
    with workers_on(stack, tmp_path, monkeypatch) as workers:
        yield workers
