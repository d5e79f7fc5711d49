"""The retry policy, a pure value: exponential backoff with full jitter."""

from dataclasses import dataclass

MAX_EXPONENT = 16


@dataclass(frozen=True)
class Backoff:
    """Seconds to wait before attempt n (from 0): uniform between 0 and min(cap, base x 2^n)."""

    base: float
    cap: float

    def seconds(self, attempt: int, randomness: float) -> float:
        """`randomness` is a number from 0 to 1, drawn by the caller."""
        return randomness * min(self.cap, self.base * 2.0 ** min(attempt, MAX_EXPONENT))
