"""`make chaos`: faults under load, and a table of what they cost.

python -m tests.chaos [--faults 200] [--kills 200] [--seed 1] [--rate 150]
"""

import random
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from tests.chaos.faults import FAULTS, in_random_order, mend
from tests.chaos.theatre import Reckoning, Theatre

KILL = "worker: kill -9"


@dataclass
class Tally:
    """What one kind of fault did: events applied from each strike to the next, and seconds to recover."""

    events: int = 0
    recovered: list[float] = field(default_factory=list)


def run(theatre: Theatre, faults: list[str], console: Console) -> dict[str, Tally]:
    """Strike one fault after the other, now and then two at once."""
    tallies: dict[str, Tally] = defaultdict(Tally)
    theatre.seconds_to_recover()  # everything is under way
    applied = theatre.applied()
    for number, name in enumerate(faults, start=1):
        console.print(f"{number:4} of {len(faults)}  {name:34}", end="")
        began = time.monotonic()
        FAULTS[name](theatre)
        if theatre.rng.random() < 0.1:  # another before this one is over
            FAULTS[theatre.rng.choice(list(FAULTS))](theatre)
        struck = time.monotonic() - began
        seconds = theatre.seconds_to_recover()
        before, applied = applied, theatre.applied()
        tallies[name].events += applied - before
        tallies[name].recovered.append(seconds)
        console.print(f" lasted {struck:4.1f} s, back after {seconds:4.1f} s, workers {theatre.memory_mib():.0f} MiB")
    mend(theatre)
    return tallies


def table(tallies: dict[str, Tally], reckoned: Reckoning) -> Table:
    """What the README shows."""
    shown = Table(box=None, header_style="bold")
    for column in ("fault", "times", "events", "lost", "wrong rows", "median s to recover", "longest"):
        shown.add_column(column, justify="left" if column == "fault" else "right")
    for name in FAULTS:
        if name in tallies:
            tally = tallies[name]
            seconds = (f"{statistics.median(tally.recovered):.1f}", f"{max(tally.recovered):.1f}")
            shown.add_row(name, str(len(tally.recovered)), f"{tally.events:,}", "", "", *seconds)
    times = sum(len(tally.recovered) for tally in tallies.values())
    total = (f"{reckoned.events:,}", str(reckoned.lost), str(reckoned.wrong_rows), "", "")
    shown.add_row("all, and what came after the last", str(times), *total, style="bold")
    return shown


@click.command()
@click.option("--kills", type=int, default=200, show_default=True, help="Workers killed with kill -9.")
@click.option("--faults", type=int, default=200, show_default=True, help="Faults of all other kinds.")
@click.option("--rate", type=float, default=150.0, show_default=True, help="Events/s of each of two engines.")
@click.option("--seed", type=int, help="Repeat a run: it prints its seed.")
def main(kills: int, faults: int, rate: float, seed: int | None) -> None:
    """Strike; then reckon: published = applied, each once, and every row equals its story."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    seed = random.randrange(2**32) if seed is None else seed
    console.print(f"seed {seed}")
    rng = random.Random(seed)
    others = [name for name in FAULTS if name != KILL]
    strikes = [KILL] * kills + in_random_order(rng, faults, others)
    rng.shuffle(strikes)
    folder = Path(tempfile.mkdtemp(prefix="interviews-chaos-"))
    try:
        with Theatre.open(folder, seed, rate=rate) as theatre:
            tallies = run(theatre, strikes, console)
            console.print("the engines end, and the workers apply what is left")
            reckoned = theatre.reckon()
    except AssertionError as broken:
        traceback.print_exc()
        raise click.ClickException(f"{broken} (seed {seed}; the workers' logs are in {folder})") from broken
    console.print(table(tallies, reckoned))
    if reckoned.lost or reckoned.wrong_rows:
        raise click.ClickException(f"see above (seed {seed}; the workers' logs are in {folder})")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
