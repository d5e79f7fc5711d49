"""Another commit of this repository, checked out beside and built: what `--against` measures us against."""

import os
import subprocess
from pathlib import Path
from typing import Final

import click
from rich.console import Console

ROOT: Final = Path(__file__).resolve().parents[2]
CACHE: Final = ROOT / ".bench"  # ignored by git; a built commit stays here for the next time
SHORT: Final = 12  # characters of a commit's name
# Ours would make the other commit's programs import this checkout's modules, and its make speak as ours does.
OURS: Final = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")


class NoSuchRevision(click.ClickException):
    """The revision is not a commit of this repository."""

    exit_code = 2


def environment_for_others() -> dict[str, str]:
    """Our environment without what would lead another checkout's Python to this one."""
    return {name: value for name, value in os.environ.items() if name not in OURS}


def find_commit(revision: str) -> str:
    """Return the full name of a revision's commit; raise NoSuchRevision."""
    try:
        return _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except click.ClickException:
        raise NoSuchRevision(f"--against {revision}: git knows no such commit here") from None


def build(commit: str, console: Console, *, cache: Path = CACHE) -> Path:
    """Check the commit out into the cache, run its own `make setup`, and return its folder.

    What is there already is used again. Raises ClickException, one line, where git or the setup fails.
    """
    folder, name = cache / commit[:SHORT], commit[:SHORT]
    if not folder.exists():
        console.print(f"{name}: checking out into {folder}", soft_wrap=True)
        cache.mkdir(exist_ok=True)
        _git("worktree", "add", "--force", "--detach", str(folder), commit)  # --force: the folder may have been deleted
    _check_unchanged(folder, commit)
    console.print(f"{name}: make setup, half a minute the first time", soft_wrap=True)
    _run(["make", "setup"], folder, cache / f"{name}.log")
    return folder


def _check_unchanged(folder: Path, commit: str) -> None:
    head = _git("rev-parse", "HEAD", folder=folder)
    changes = _git("status", "--porcelain", "--untracked-files=no", folder=folder)
    if head != commit or changes:
        remedy = f"git worktree remove --force {folder}"
        raise click.ClickException(f"{folder} is not what {commit[:SHORT]} is, so nothing was measured: {remedy}")


def _git(*arguments: str, folder: Path | None = None) -> str:
    return _output(["git", "-C", str(folder or ROOT), *arguments])


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except OSError as error:
        raise click.ClickException(f"{command[0]} cannot be run: {error}") from error
    except subprocess.CalledProcessError as error:
        raise click.ClickException(_failure(command, error.stderr)) from error
    return done.stdout.strip()


def _run(command: list[str], folder: Path, log: Path) -> None:
    with log.open("wb") as output:
        done = subprocess.run(
            command, cwd=folder, env=environment_for_others(), stdout=output, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise click.ClickException(f"{_failure(command, log.read_text(errors='replace'))} (see {log})")


def _failure(command: list[str], output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()] or ["it printed nothing"]
    return f"{' '.join(command)} failed: {lines[-1]}"
