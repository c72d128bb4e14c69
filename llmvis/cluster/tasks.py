"""Pieces of work as Ray tasks, each done once for certain or the run ends: no actors, no state, results in any order.

Knows nothing of what a piece of work is. Ray runs a task again whose worker or node died; so what it does
must come out the same when it is done twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from llmvis.cluster.session import resources
from llmvis.cluster.tally import JobError

RETRIES = 5
"""Times that a task is run again after its worker died."""
AHEAD = 2
"""Tasks that are handed over for each CPU: the next one waits there, and the rest stay here."""


def on_cluster(
    function: Callable[[Any], Any], items: Sequence[Any], *, what: str, alone: bool = False
) -> Iterator[tuple[int, Any]]:
    """(place, `function(item)`) of every item as it is done; a core each.

    With `alone` an item gets all cores of the largest node that there is, and a GPU where one is.
    Raises what a function raises, and `JobError` where workers die over one item again and again.
    """
    cpus, gpus = resources()
    options: dict[str, Any] = {"num_cpus": 1, "max_retries": RETRIES, "name": what}
    if alone:
        options["num_cpus"] = max(int(node["Resources"].get("CPU", 0)) for node in _nodes() if node["Alive"])
        options["num_gpus"] = min(1, int(gpus))
    task: Any = ray.remote(_run).options(**options)
    rest = iter(enumerate(items))
    flying: dict[Any, int] = {}
    work = ray.put(function)
    try:
        while True:
            while len(flying) < AHEAD * cpus and (following := next(rest, None)) is not None:
                place, item = following
                flying[task.remote(work, item)] = place
            if not flying:
                return
            (ready, *_), _ = ray.wait(list(flying), num_returns=1)
            place = flying.pop(ready)
            yield place, _result(ready, what, place)
    finally:
        for reference in flying:
            ray.cancel(reference, force=True)


def _nodes() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return found


def _run(function: Callable[[Any], Any], item: Any) -> Any:
    return function(item)


def _result(reference: Any, what: str, place: int) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error  # as it would come in this process
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        raise JobError(
            f"workers died again and again over {what}, item {place}: is there memory enough for it? What is done "
            f"stays; run the same command again to go on ({error})"
        ) from error
