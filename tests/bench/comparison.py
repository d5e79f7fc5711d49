"""Two sides, measured in the same rounds, and how the first stands to the second."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Comparison:
    """By measure: one pair of figures a round, of the first side and of the second."""

    names: tuple[str, str]
    rounds: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def add(self, first: Mapping[str, float], second: Mapping[str, float]) -> None:
        """Add what a round gave, by measure; both sides have the same ones."""
        for name in first:
            self.rounds.setdefault(name, []).append((first[name], second[name]))

    def add_share(self, name: str, *, of: str, whole: str) -> None:
        """Add per side what one measure's median is of another's, in per cent."""
        medians = zip(self.medians(of), self.medians(whole), strict=True)
        first, second = (100 * part / all_of_it for part, all_of_it in medians)
        self.rounds[name] = [(first, second)]

    def medians(self, name: str) -> tuple[float, float]:
        first, second = zip(*self.rounds[name], strict=True)
        return statistics.median(first), statistics.median(second)

    def ratio(self, name: str) -> float | None:
        """The first side's median divided by the second's, None where the second's is 0."""
        return _ratio(*self.medians(name))

    def ratios(self, name: str) -> list[float | None]:
        """The ratio in each round."""
        return [_ratio(*pair) for pair in self.rounds[name]]

    def as_json(self) -> dict[str, Any]:
        return {
            name: {
                "medians": dict(zip(self.names, self.medians(name), strict=True)),
                "ratio": self.ratio(name),
                "rounds": pairs,
            }
            for name, pairs in self.rounds.items()
        }


def _ratio(first: float, second: float) -> float | None:
    return first / second if second else None
