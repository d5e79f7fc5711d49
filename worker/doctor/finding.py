"""What one check found."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "failed", "unknown"]


@dataclass(frozen=True)
class Finding:
    """One check. "unknown" is neither: the check cannot tell, or nobody is needed.

    `remedy` mends a failed one, or says where to look: lines for a shell, to be run as they are. What no command can
    do, and each choice, is a comment; of the values after `export` those in capitals are yours to fill in.
    """

    check: str
    state: State
    told: str
    remedy: str | None = None
