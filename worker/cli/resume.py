"""`interviews resume`: go on after too many events became dead letters."""

import click

from worker.cli.servers import open_redis
from worker.dead_share import DeadShare
from worker.settings import StreamSettings, load_settings


@click.command(epilog="Example: interviews resume --accept 60")
@click.option(
    "--accept",
    "minutes",
    metavar="MINUTES",
    type=click.IntRange(1, 7 * 24 * 60),
    help="For so long, let whatever fails become a dead letter.",
)
def resume(minutes: int | None) -> None:
    """Let the workers go on that hold because too many events became dead letters.

    Should they fail again, the workers hold again. A hold for any other reason ends by itself.
    """
    settings = load_settings(StreamSettings)
    share = DeadShare(open_redis(settings), settings.stream)
    was_closed = share.resume(accept_seconds=60 * (minutes or 0))
    click.echo("the workers go on" if was_closed else "nothing to resume: they do not hold for dead letters")
    if minutes:
        click.echo(f"for {minutes} min whatever fails becomes a dead letter")
