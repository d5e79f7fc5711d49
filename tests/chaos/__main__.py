"""`make chaos`: faults under load, and a table of what they cost.

python -m tests.chaos [--faults 400] [--kills 200] [--seed 1] [--rate 150]
"""

import random
import shutil
import statistics
import tempfile
import time
import traceback
from collections import defaultdict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from tests.chaos.faults import FAULTS, in_random_order, mend
from tests.chaos.theatre import Theatre

KILL = "worker: kill -9"


def run(theatre: Theatre, faults: list[str], console: Console) -> dict[str, list[float]]:
    """Strike one fault after the other, now and then two at once; answers the seconds to recover of each."""
    recovered: dict[str, list[float]] = defaultdict(list)
    theatre.seconds_to_recover()  # everything is under way
    for number, name in enumerate(faults, start=1):
        console.print(f"{number:4} of {len(faults)}  {name:34}", end="")
        began = time.monotonic()
        FAULTS[name](theatre)
        if theatre.rng.random() < 0.1:  # another before this one is over
            FAULTS[theatre.rng.choice(list(FAULTS))](theatre)
        struck = time.monotonic() - began
        seconds = theatre.seconds_to_recover()
        recovered[name].append(seconds)
        console.print(f" lasted {struck:4.1f} s, back after {seconds:4.1f} s")
    mend(theatre)
    return recovered


def table(recovered: dict[str, list[float]], events: int) -> Table:
    """What the README shows."""
    shown = Table(box=None, header_style="bold")
    for column in ("fault", "times", "median s to recover", "longest"):
        shown.add_column(column, justify="left" if column == "fault" else "right")
    for name in FAULTS:
        if seconds := recovered.get(name):
            shown.add_row(name, str(len(seconds)), f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}")
    shown.add_row(f"[bold]{events:,} events, lost 0, wrong rows 0", str(sum(map(len, recovered.values()))), "", "")
    return shown


@click.command()
@click.option("--kills", type=int, default=200, show_default=True, help="Workers killed with kill -9.")
@click.option("--faults", type=int, default=200, show_default=True, help="Faults of all other kinds.")
@click.option("--rate", type=float, default=150.0, show_default=True, help="Events/s of each of two engines.")
@click.option("--seed", type=int, help="Repeat a run: it prints its seed.")
def main(kills: int, faults: int, rate: float, seed: int | None) -> None:
    """Strike; then reckon: published = applied, each once, and every row equals its story."""
    console = Console(highlight=False)
    seed = random.randrange(2**32) if seed is None else seed
    console.print(f"seed {seed}")
    rng = random.Random(seed)
    others = [name for name in FAULTS if name != KILL]
    strikes = [KILL] * kills + in_random_order(rng, faults, others)
    rng.shuffle(strikes)
    folder = Path(tempfile.mkdtemp(prefix="interviews-chaos-"))
    try:
        with Theatre.open(folder, seed, rate=rate) as theatre:
            recovered = run(theatre, strikes, console)
            events = theatre.reckon()
    except AssertionError as broken:
        traceback.print_exc()
        raise click.ClickException(f"{broken} (seed {seed}; the workers' logs are in {folder})") from broken
    shutil.rmtree(folder)
    console.print(table(recovered, events))


if __name__ == "__main__":
    main()
