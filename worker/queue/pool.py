"""A worker's pool: how many slots it has, and which processes."""

from typing import Any, Final

import billiard
import billiard.pool

# A process of the pool that ends waits 30 s for the main process to read its last result; at a shutdown the main
# process sometimes reads no more. Nothing of ours needs that result: 1 s. There is no setting; see billiard/pool.py,
# Worker._ensure_messages_consumed.
RESULT_TRIES: Final = 10


def shorten_the_end_of_pool_processes() -> None:
    """Let a process of the pool end soon after its last task."""
    billiard.pool.GUARANTEE_MESSAGE_CONSUMPTION_RETRY_LIMIT = RESULT_TRIES


def slots_of(worker: Any) -> int:
    """How many tasks this worker may run at once: what `-c` says, or `--autoscale` at most."""
    limit: int = worker.autoscaler.max_concurrency if worker.autoscaler else worker.pool.num_processes
    return limit


def pool_processes() -> list[int]:
    """The ids of the pool's processes; none where the pool is of threads."""
    return [child.pid for child in billiard.active_children()]
