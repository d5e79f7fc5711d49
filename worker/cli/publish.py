"""`interviews publish`: events from a file of JSON lines to the stream."""

import codecs
import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import IO

import click

from events import Event, InvalidEvent, Publisher, parse_event
from worker.cli.screen import progress_bar
from worker.cli.servers import open_redis
from worker.settings import StreamSettings, load_settings
from worker.stream import EventStream

CHUNK = 500  # events published in one round trip


@click.command(epilog="Example: interviews publish interviews.jsonl   or: generate | interviews publish -")
@click.argument("file", type=click.File("rb"))
@click.option(
    "--unchecked", is_flag=True, help="Publish every line as it is; what breaks the contract becomes a dead letter."
)
def publish(file: IO[bytes], unchecked: bool) -> None:
    """Publish events, one JSON object per line of FILE ('-' for standard input).

    A line that breaks the contract is named by its number and left out; the others still go, and the exit
    status is 1. Publishing a file again is harmless: an event is applied once.
    """
    settings = load_settings(StreamSettings)
    published, wrong = 0, 0
    with progress_bar() as progress:
        task = progress.add_task("publishing", total=None)
        if unchecked:
            stream = EventStream(open_redis(settings), settings.stream)
            for chunk in _chunks(file):
                stream.add([line for _, line in chunk])
                published += len(chunk)
                progress.update(task, completed=published)
        else:
            with Publisher(settings.redis_url.get_secret_value(), stream=settings.stream) as publisher:
                for chunk in _chunks(file):
                    events = list(_checked(chunk))
                    publisher.publish_many(events)
                    published += len(events)
                    wrong += len(chunk) - len(events)
                    progress.update(task, completed=published)
        progress.update(task, total=published)
    click.echo(f"{published} published{f', {wrong} left out' if wrong else ''}")
    sys.exit(1 if wrong else 0)


def _chunks(lines: Iterable[bytes]) -> Iterator[list[tuple[int, bytes]]]:
    stripped = (line.removeprefix(codecs.BOM_UTF8).strip() for line in lines)  # editors on Windows put a mark
    numbered = ((number, line) for number, line in enumerate(stripped, start=1) if line)
    while chunk := list(itertools.islice(numbered, CHUNK)):
        yield chunk


def _checked(chunk: list[tuple[int, bytes]]) -> Iterator[Event]:
    for number, line in chunk:
        try:
            yield parse_event(line, strict=True)
        except InvalidEvent as invalid:
            click.echo(f"line {number}: {invalid}", err=True)
