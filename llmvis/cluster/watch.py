"""A job's rows as they come, and words where none come: a wait for what the cluster cannot give ends.

Knows from the tally whether anything is at work; a slow shard is no stall. Knows nothing of
what the rows are.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray
import ray.data
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.exceptions import GetTimeoutError, RayError

from llmvis.cluster.tally import JobError
from llmvis.schema import UserError

_RAY_ADDS = "\nFailed to apply UDF transform"
"""Where what Ray Data says of its own retries begins, in the message of an error that a stage raised."""
LOOK_S = 5.0
SAY_AFTER_S = 60.0
"""Seconds in which nothing is at work, before it is said what is waited for."""
STALL_S = 300.0
"""Such seconds that the shortest time limit allows: workers need some to start, or to come back."""


def watched(rows: ray.data.Dataset, tally: Any, limit: float) -> Iterator[dict[str, Any]]:
    """The rows, read in a thread. Raises `JobError` where nothing could be run for `limit` seconds, or `STALL_S`."""
    done: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_read, args=(rows, done), daemon=True).start()
    idle = _Idle(tally, max(limit, STALL_S))
    try:
        while True:
            try:
                kind, row = done.get(timeout=LOOK_S)
            except queue.Empty:
                idle.look()
                continue
            if kind == "end":
                return
            if kind == "error":
                raise _explained(row) from row
            idle.over()
            yield row
    finally:
        # ends the work that still goes on; there is no public name for it
        rows._synchronize_progress_bar()  # type: ignore[no-untyped-call]


def _read(rows: ray.data.Dataset, done: queue.Queue[Any]) -> None:
    try:
        for row in rows.iter_rows():
            done.put(("row", row))
        done.put(("end", None))
    except BaseException as error:  # noqa: BLE001 - the other thread raises it
        done.put(("error", error))


def _explained(error: BaseException) -> BaseException:
    """What a worker said with words for people, such as that the disk is full; else what Ray says."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, UserError):
            return JobError(str(seen.args[0]).partition(_RAY_ADDS)[0])
        seen = getattr(seen, "cause", None) or seen.__cause__
    if isinstance(error, RayError) and not isinstance(error, ray.exceptions.RayTaskError):
        return JobError(
            "a worker could not be started or was lost too often. What is committed stays; run the job again to go "
            f"on. Ray says: {str(error)[-1000:]}"
        )
    return error


class _Idle:
    """For how long nothing has been at work."""

    def __init__(self, tally: Any, limit: float) -> None:
        self._tally, self._limit = tally, limit
        self.over()

    def over(self) -> None:
        """Something was done."""
        self._since = time.monotonic()
        self._said = False

    def look(self) -> None:
        """Raises `JobError`, or says on stderr what is waited for, where it is time to."""
        try:
            working = ray.get(self._tally.working.remote(), timeout=LOOK_S)
        except GetTimeoutError:
            working = 0
        if working:
            return self.over()
        idle = time.monotonic() - self._since
        if idle >= self._limit:
            raise JobError(
                f"nothing could be run for {idle:.0f} s: {waiting()}. Add nodes, ask for less with --actors or "
                "--gpus-per-actor, or wait for other jobs to end; then run the job again to go on"
            )
        if idle >= SAY_AFTER_S and not self._said:
            self._said = True
            print(
                f"nothing is at work for {idle:.0f} s: {waiting()}. The job ends when this lasts "
                f"{self._limit:.0f} s",
                file=sys.stderr,
                flush=True,
            )


def waiting() -> str:
    """What is asked of the cluster and not there, what it has and what of that is free, in words."""
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    wanted = [
        f"{bundle.count} x {_in_words(bundle.bundle)}"
        for demand in status.resource_demands.ray_task_actor_demand
        for bundle in demand.bundles_by_count
    ]
    return (
        f"waiting for {' and '.join(wanted) or 'Ray, which asks for nothing'}; the cluster has "
        f"{_in_words(status.total_resources())}, free {_in_words(status.available_resources())}"
    )


def _in_words(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU"))
