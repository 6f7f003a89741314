"""Ray as a ``map``: work items as tasks on a cluster, started again where a worker dies.

    deduplicate_file(..., mapper=ray_map())

Paper: not stated; ours. Ray is optional: pip install "ray>=2.60,<3".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from speed_utils.settings import ROOT_DIR

RAY_VARIABLE = "SPEED_RAY"  # address of the cluster that a process belongs to
TRIES = 4  # of a task whose worker died


class ClusterError(RuntimeError):
    """No Ray, or no cluster at the address; the message says what to do."""


def ray_map() -> Callable[[Callable, Iterable], Iterable] | None:
    """``map`` over the cluster that this process belongs to; None where there is none."""
    address = os.environ.get(RAY_VARIABLE)
    if not address:
        return None
    ray = connected_ray(address)

    @ray.remote(max_retries=TRIES, scheduling_strategy="SPREAD")
    def apply(function: Callable, item: object) -> object:
        return function(item)

    def mapped(function: Callable, items: Iterable) -> list:
        shared = ray.put(function)
        return ray.get([apply.remote(shared, item) for item in items])

    return mapped


def connected_ray(address: str) -> object:
    """The ray module, connected to a cluster.

    Raises:
        ClusterError: Ray is not installed, or no cluster answers.
    """
    try:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray
    except ImportError:
        raise ClusterError('--ray needs Ray: pip install "ray>=2.60,<3"') from None
    if not ray.is_initialized():
        try:
            ray.init(
                address=address,
                runtime_env={"env_vars": {"PYTHONPATH": str(ROOT_DIR)}},
                log_to_driver=False,
                logging_level="error",
            )
        except ConnectionError as error:
            raise ClusterError(
                f"no Ray cluster at {address!r} ({error}); start one with `ray start --head`, or "
                "use --ray local"
            ) from None
    return ray
