"""`interviews doctor`: what is wrong with settings, Redis, workers and Supabase, and what mends it."""

import sys
import textwrap
from collections import Counter
from dataclasses import asdict

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from worker.cli.screen import print_json, printable, screen
from worker.doctor import Finding, State, examine_environment

NEEDS_A_PERSON = 3
NAME_WIDTH = 30
INDENT = "    "
STYLES: dict[State, str] = {"ok": "green", "failed": "bold red", "unknown": "bold"}
MARKS: dict[State, str] = {"ok": "✓", "failed": "✗", "unknown": "?"}
MARKS_IN_ASCII: dict[State, str] = {"ok": "+", "failed": "x", "unknown": "?"}
WORDS: dict[State, str] = {"ok": "ok", "failed": "failed", "unknown": "cannot tell"}


@click.command(epilog="Example: interviews doctor   or: interviews doctor --json")
@click.option("--json", "as_json", is_flag=True, help="For a program.")
def doctor(as_json: bool) -> None:
    """Check settings, Redis, workers and Supabase, and tell what mends each fault. Changes nothing.

    Under a check that failed stand lines to run as they are; those with # are to be read. A question mark is no
    fault: the check cannot tell, or what it found passes by itself. Exit status 3 when a check failed.
    """
    console, findings = screen(), list[Finding]()
    for finding in examine_environment():
        if not as_json:
            _tell(console, finding, again=finding.remedy in {before.remedy for before in findings})
        findings.append(finding)
    counts = Counter(finding.state for finding in findings)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        click.echo(", ".join(f"{counts[state]} {word}" for state, word in WORDS.items()))
    sys.exit(NEEDS_A_PERSON if counts["failed"] else 0)


def _tell(console: Console, finding: Finding, *, again: bool) -> None:
    """A line of a table; below it the remedy, whose commands are never broken, so that they can be copied."""
    mark = (MARKS if console.encoding.startswith("utf") else MARKS_IN_ASCII)[finding.state]
    line = Table.grid(padding=(0, 1), pad_edge=False)
    line.add_column(width=1)
    line.add_column(width=NAME_WIDTH, overflow="fold")
    line.add_column(overflow="fold")
    line.add_row(Text(mark, style=STYLES[finding.state]), finding.check, Text(printable(finding.told)))
    console.print(line)
    if finding.remedy is not None:
        for step in ["# as above"] if again else finding.remedy.splitlines():
            _tell_step(console, printable(step))


def _tell_step(console: Console, step: str) -> None:
    if not step.startswith("#"):
        console.print(Text(INDENT + step, style="bold"), soft_wrap=True)
        return
    for part in textwrap.wrap(step, console.width - len(INDENT), subsequent_indent="# ", break_on_hyphens=False):
        console.print(Text(INDENT + part), soft_wrap=True)
