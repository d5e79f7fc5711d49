"""`interviews up`: the embedded stack, until Ctrl-C."""

import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from worker.errors import WorkerError


@click.command(epilog="Example: interviews up   (and in another terminal: . .interviews/env)")
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".interviews"),
    show_default=True,
    help="The folder that keeps the data.",
)
@click.option("--postgres", "version", type=int, default=18, show_default=True, help="Postgres' major version.")
def up(data: Path, version: int) -> None:
    """Start real Postgres, PostgREST and Redis on this machine, without Docker or root.

    Prints the settings that a worker needs. A second `up` finds the first. Ctrl-C stops everything; the data
    stay for the next time.
    """
    try:
        from worker.embedded import Stack, StackError  # an extra: the other commands do without it
    except ImportError as error:
        raise WorkerError(f"{error.name} is not installed: pip install 'interview-worker[worker,embedded]'") from error

    try:
        running = Stack.running(data)
        if running is not None:
            click.echo(f"# already running, data in {data}")
            _print_settings(running)
            return
        with Stack(data, postgres_version=version) as stack, _until_interrupted():
            file = data / "env"
            data.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)
            file.write_text("".join(f"export {line}\n" for line in _lines(stack.environment)))
            click.echo(f"# running, data in {stack.folder}; Ctrl-C stops it. In another terminal:")
            click.echo(f"#   . {file} && celery -A worker worker")
            _print_settings(stack.environment)
            signal.pause()
    except (StackError, OSError) as error:
        raise WorkerError(str(error)) from error


def _print_settings(environment: dict[str, str]) -> None:
    for line in _lines(environment):
        click.echo(f"export {line}")


def _lines(environment: dict[str, str]) -> list[str]:
    return [f"{name}={shlex.quote(value)}" for name, value in environment.items()]


@contextmanager
def _until_interrupted() -> Iterator[None]:
    """Leave the block at Ctrl-C or SIGTERM, as if it had ended."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script that starts us with & would have it ignored
    try:
        yield
    except KeyboardInterrupt:
        click.echo("# stopping", err=True)
