"""What was measured, as tables for a terminal, and as a picture for the README."""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from tests.bench.comparison import Comparison

BAR_WIDTH: Final = 40
FILE_WIDTH: Final = 120  # of tables that go to a file
LIMIT: Final = "the limit: two bare clients of the batch RPC"


def print_rates(console: Console, rates: Mapping[str, float], naive: Iterable[str]) -> None:
    """Rates, as multiples of the best of the naive ones, and as shares of the limit."""
    best = max(rates[name] for name in naive)
    table = _table("", "events/s", "times naive", "of the limit")
    for name, rate in rates.items():
        of_limit = "" if name.startswith("publish") else f"{rate / rates[LIMIT]:.0%}"
        table.add_row(name, f"{rate:,.0f}", f"{rate / best:.1f}", of_limit)
    console.print(table)


def print_latency(console: Console, latency: Mapping[int, Sequence[float]]) -> None:
    table = _table("events/s published", "publish to commit: p50 ms", "p95 ms", "p99 ms")
    for rate, times in latency.items():
        table.add_row(f"{rate:,}", *(f"{each:.1f}" for each in times))
    console.print(table)


def print_costs(console: Console, title: str, costs: Mapping[str, float]) -> None:
    table = _table(title, "")
    for name, cost in costs.items():
        table.add_row(name, f"{cost:,.1f}")
    console.print(table)


def print_growth(console: Console, header: Sequence[str], rows: Mapping[int, Sequence[float]]) -> None:
    """How something grows with the number in the first column."""
    table = _table(*header)
    for size, values in rows.items():
        table.add_row(f"{size:,}", *(f"{value:,.1f}" if value < 1000 else f"{value:,.0f}" for value in values))
    console.print(table)


def print_comparison(console: Console, title: str, comparison: Comparison) -> None:
    """The medians of both sides, their ratio, and the least and greatest ratio of a round where there are several."""
    table = _table(title, *comparison.names, "ratio", "least to most")
    for name in comparison.rounds:
        ratios = [each for each in comparison.ratios(name) if each is not None]
        span = f"{min(ratios):.2f} to {max(ratios):.2f}" if len(ratios) > 1 else ""
        ratio = comparison.ratio(name)
        medians = (_number(median) for median in comparison.medians(name))
        table.add_row(name, *medians, "-" if ratio is None else f"{ratio:.2f}", span)
    console.print(table)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.1f}" if value >= 10 else f"{value:.2f}"


def draw_rates(file: Path, rates: Mapping[str, float], environment: str) -> None:
    """An SVG of the rates of applying, as bars side by side."""
    shown = {name: rate for name, rate in rates.items() if not name.startswith("publish")}
    console = Console(record=True, width=110, file=io.StringIO(), force_terminal=True)
    table = Table(box=None, show_header=False, padding=(0, 1))
    for justify in ("left", "right", "left"):
        table.add_column(justify=justify)
    for name, rate in shown.items():
        colour = "green" if name.startswith("our") else "bright_black"
        bar = Bar(max(shown.values()), 0, rate, width=BAR_WIDTH, color=colour)
        table.add_row(name, f"{rate:,.0f}/s", bar)
    console.print(table)
    svg = console.export_svg(title=f"events applied per second, {environment}")
    file.write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL))  # no font is fetched from anywhere


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 and not column[:1].isdigit() else "right")
    return table
