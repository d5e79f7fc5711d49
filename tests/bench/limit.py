"""The limit: two bare clients that do nothing but call the batch RPC, with packs made beforehand.

They speak HTTP themselves, so that they measure any commit's SQL, whatever its workers call.
"""

import json
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import click
import httpx

CLIENTS: Final = 2
PATIENCE_SECONDS: Final = 600

Pack = list[dict[str, Any]]


def events_per_second(environment: Mapping[str, str], packs: Sequence[Pack]) -> float:
    """Events per second, from the first call to the last answer; the packs are dealt to the clients in turn.

    Raises ClickException where a client fails, which has written why on stderr.
    """
    spawned = multiprocessing.get_context("spawn")
    ready = spawned.Barrier(CLIENTS)
    times: Any = spawned.Queue()
    clients = [
        spawned.Process(target=_client, args=(dict(environment), packs[n::CLIENTS], ready, times))
        for n in range(CLIENTS)
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    if any(client.exitcode for client in clients):
        raise click.ClickException("a bare client of the batch RPC failed, see above")
    spans = [times.get(timeout=PATIENCE_SECONDS) for _ in clients]
    seconds: float = max(end for _, end in spans) - min(begin for begin, _ in spans)
    return sum(map(len, packs[CLIENTS:])) / seconds


def _client(environment: Mapping[str, str], packs: Sequence[Pack], ready: Any, times: Any) -> None:
    key, base = environment["SUPABASE_SECRET_KEY"], environment["SUPABASE_REST_URL"]
    headers = {"apikey": key, "authorization": f"Bearer {key}"}
    with httpx.Client(base_url=base, headers=headers, timeout=PATIENCE_SECONDS) as client:
        try:
            _apply(client, packs[0])  # connects
        except Exception:
            ready.abort()  # the other need not wait
            raise
        ready.wait(timeout=PATIENCE_SECONDS)
        began = time.monotonic()
        for pack in packs[1:]:
            _apply(client, pack)
        times.put((began, time.monotonic()))


def _apply(client: httpx.Client, pack: Pack) -> None:
    body = json.dumps({"p_events": pack}, separators=(",", ":"))
    response = client.post("/rpc/apply_interview_events", content=body, headers={"content-type": "application/json"})
    answers = response.raise_for_status().json()
    rejected = [answer["reason"] for answer in answers if answer["outcome"] == "rejected"]
    assert len(answers) == len(pack), f"{len(answers)} answers to {len(pack)} events"
    assert not rejected, f"events were rejected: {set(rejected)}"
