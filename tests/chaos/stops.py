"""Workers that are stopped, and workers that are killed in an outage: what the docs promise of both, in figures.

    python -m tests.chaos.stops [--sigterms 120] [--starts 20]

Ends with status 1 where a worker stopped by SIGTERM ended with another status than 0 or left an entry to reclaim, where
an outage with many worker starts made a dead letter, or where an event was lost.
"""

import random
import signal
import sys
import tempfile
from pathlib import Path

import click

from tests.chaos.theatre import Theatre


def stop_again_and_again(theatre: Theatre, times: int) -> None:
    """SIGTERM the only worker under load, and look at once what it has left behind."""
    for number in range(times):
        worker = theatre.any_ready_worker()
        theatre.seconds_to_recover()  # it applies events
        worker.send_signal(signal.SIGTERM)
        status = worker.wait(60)
        left = int(theatre.redis().xpending("interview:events", "workers")["pending"])
        print(f"{number + 1:4} of {times}: exit status {status}, {left} entries left to reclaim", flush=True)
        assert (status, left) == (0, 0), f"see {theatre.logs[worker.pid]}"
        theatre.workers.remove(worker)
        theatre.start_worker()


def start_again_and_again(theatre: Theatre, times: int) -> None:
    """Kill and start the only worker while Supabase does not answer; each gets to claim what the one before held."""
    theatre.rest_proxy.mode = "black_hole"
    for number in range(times):
        (worker,) = theatre.workers
        theatre.wait_until(lambda worker=worker: theatre.holds_claims(worker), "it has claimed events")  # type: ignore[misc]
        theatre.kill_with_pool(worker)
        print(f"{number + 1:4} of {times}: killed in the outage", flush=True)
        theatre.workers.remove(worker)
        theatre.start_worker()
    theatre.rest_proxy.mode = "pass"
    theatre.seconds_to_recover()


@click.command()
@click.option("--sigterms", type=int, default=120, show_default=True)
@click.option("--starts", type=int, default=20, show_default=True)
@click.option("--rate", type=float, default=500.0, show_default=True, help="Events/s of each of two engines.")
def main(sigterms: int, starts: int, rate: float) -> None:
    """Stop workers under load, then kill and start them in one outage; then reckon."""
    folder = Path(tempfile.mkdtemp(prefix="interviews-stops-"))
    with Theatre.open(folder, random.randrange(2**32), workers=1, rate=rate) as theatre:
        stop_again_and_again(theatre, sigterms)
        start_again_and_again(theatre, starts)
        reckoned = theatre.reckon()  # no dead letter, no event twice
    print(f"{reckoned.events:,} events: lost {reckoned.lost}, wrong rows {reckoned.wrong_rows}, dead letters 0")
    sys.exit(bool(reckoned.lost or reckoned.wrong_rows))


if __name__ == "__main__":
    main()
