"""Importing does nothing: the engine's package loads nothing of the worker's, and no module reads or connects."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
WORKER_MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for file in (ROOT / "worker").rglob("*.py")
)
ONLY_THE_WORKERS = {
    "celery", "kombu", "supabase", "postgrest", "httpx", "worker", "structlog", "click", "rich", "pydantic_settings",
}  # fmt: skip

# Audit events show what the interpreter itself does; the environment is watched by a mapping that remembers.
WATCH = """
import importlib, json, os, sys

seen = []
DEEDS = ("socket.connect", "socket.bind", "socket.getaddrinfo", "subprocess.Popen", "os.fork", "os.mkdir")
sys.addaudithook(lambda event, _: seen.append(event) if event in DEEDS else None)

class Watched(type(os.environ)):
    def __getitem__(self, name):
        seen.append(name) if name.startswith(OURS) else None
        return super().__getitem__(name)

OURS = ("REDIS_URL", "SUPABASE_", "INTERVIEW_", "DATABASE_URL", "POSTGREST_BIN", "PGRST_")
os.environ.__class__ = Watched
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(seen))
"""


def run(*arguments: str, env: dict[str, str]) -> str:
    """What a fresh interpreter prints; it must end well."""
    done = subprocess.run(
        [sys.executable, "-B", *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def side_effects(modules: list[str], *, env: dict[str, str]) -> list[str]:
    seen: list[str] = json.loads(run("-c", WATCH, *modules, env=env))
    return seen


def test_an_engine_that_imports_events_loads_nothing_of_the_workers() -> None:
    loaded: Any = json.loads(run("-c", "import events, json, sys; print(json.dumps(list(sys.modules)))", env={}))

    assert "events.publisher" in loaded
    assert ONLY_THE_WORKERS.isdisjoint(name.split(".")[0] for name in loaded)


def test_importing_events_connects_to_nothing_and_reads_no_setting() -> None:
    assert side_effects(["events"], env={"REDIS_URL": "redis://127.0.0.1:1/0"}) == []


def test_importing_every_module_but_the_celery_app_works_without_an_environment() -> None:
    modules = [name for name in WORKER_MODULES if name != "worker.celery"]

    assert {"worker.cli.main", "worker.supervisor.dispatcher", "worker.apply.tasks", "worker.embedded.stack"} <= set(
        modules
    )
    assert side_effects(modules, env={}) == []


@pytest.mark.parametrize(
    "module",
    [
        "worker",
        "worker.settings",
        "worker.apply.tasks",
        "worker.queue.transport",
        "worker.supervisor.bootstep",
        "worker.slots",
        "worker.cli",
        "worker.embedded",
    ],
)
def test_a_module_can_be_imported_first(module: str) -> None:
    assert side_effects([module], env={}) == []


def test_the_watch_sees_what_it_watches_for(tmp_path: Path) -> None:
    (tmp_path / "offender.py").write_text(
        "import os, socket\nos.environ.get('REDIS_URL')\nwith socket.socket() as s: s.connect_ex(('127.0.0.1', 1))\n"
    )

    assert side_effects(["offender"], env={**os.environ, "PYTHONPATH": str(tmp_path)}) == [
        "REDIS_URL",
        "socket.connect",
    ]


def test_only_the_celery_app_needs_its_settings_at_import() -> None:
    assert run(
        "-c",
        "import worker.celery; print(worker.celery.app.conf.task_default_queue)",
        env={
            "REDIS_URL": "redis://127.0.0.1:1/0",
            "SUPABASE_URL": "http://127.0.0.1:1",
            "SUPABASE_SECRET_KEY": "a-key",
        },
    ).split() == ["interview"]
