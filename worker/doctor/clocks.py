"""Clocks: workers, Redis and Supabase should agree on what time it is."""

from typing import Final

from worker.doctor.finding import Finding

ALLOWED_SECONDS: Final = 5.0


def check_clock(check: str, server: str, told: float, here: float, *, precision: float = 0.0) -> Finding:
    """Compare a server's time with this machine's, in Unix seconds; `precision` is by how much it may be rounded.

    A worker whose clock is wrong seems silent to the others; an engine's decides which `finished` gives the score.
    """
    ahead = here - told
    if abs(ahead) - precision <= ALLOWED_SECONDS:
        return Finding(check, "ok", f"within {max(abs(ahead), precision, 0.1):.1f} s of this machine's")
    return Finding(
        check,
        "failed",
        f"this machine's is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} that of {server}",
        "# on the machine whose clock is wrong:\nsudo timedatectl set-ntp true",
    )
