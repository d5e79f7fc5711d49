"""The command group, and the one place where errors become a line and an exit status."""

import sys

import click
import redis

from events import PublishError
from worker.cli.dlq import dlq
from worker.cli.doctor import doctor
from worker.cli.publish import publish
from worker.cli.resume import resume
from worker.cli.sessions import session, verify
from worker.cli.simulate import simulate
from worker.cli.sql import sql
from worker.cli.status import status
from worker.cli.up import up
from worker.errors import Misconfigured, SettingsError, WorkerError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="interview-worker")
def interviews() -> None:
    """Operate the interview worker: publish events, see how they fare, replay what failed.

    Settings come from the environment: REDIS_URL, SUPABASE_URL, SUPABASE_SECRET_KEY.
    """


for command in (up, publish, simulate, status, doctor, resume, dlq, session, verify, sql):
    interviews.add_command(command)


def main() -> None:
    """Run a command; say an expected error in one line with what to do next."""
    try:
        interviews(prog_name="interviews")
    except SettingsError as error:
        _fail(str(error), status=2)
    except Misconfigured as error:
        _fail(f"{error}: {error.remedy}")
    except (WorkerError, PublishError) as error:
        _fail(str(error))
    except redis.exceptions.NoPermissionError as error:
        _fail(f"Redis refuses this user ({error}): REDIS_URL must name one that may, see deploy/redis/users.acl")
    except redis.RedisError as error:
        _fail(f"Redis does not answer ({type(error).__name__}): is REDIS_URL right, and Redis up?")


def _fail(message: str, *, status: int = 1) -> None:
    click.echo(f"interviews: {message}", err=True)
    sys.exit(status)
