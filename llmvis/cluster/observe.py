"""How a running job is seen from outside: the lines of workers, and metrics that Prometheus scrapes from Ray.

Ray exports a metric as `ray_<name>` on the metrics port of each node. Counters count work as it
is done: a shard whose commit was cut off in its middle and repeated may count twice. The ledger
is what is exact. Knows no models and no files.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import ray
from ray._private.worker import global_worker
from ray.util.metrics import Counter, Gauge, Histogram

from llmvis.events import log_event

BOUNDARIES = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000]
"""Seconds of one stage of one shard. Ray adds up the middles of these, so `_sum` is rough; the counter is exact."""

Run = dict[str, str]


class Metrics:
    """A worker's metrics; made once a process, since Ray knows them by name."""

    def __init__(self) -> None:
        self.items = Counter(
            "llmvis_items", "Items of committed shards: written, dead, duplicate.", ("job", "outcome")
        )
        self.dead = Counter("llmvis_dead_letters", "Dead letters of committed shards.", ("job", "reason"))
        self.shards = Counter("llmvis_shards_committed", "Shards committed.", ("job",))
        self.tries = Counter("llmvis_stage_tries", "Times that a stage began on a shard.", ("job", "stage"))
        self.seconds = Counter(
            "llmvis_stage_seconds", "Worker seconds of committed shards.", ("job", "stage")
        )
        self.shard_seconds = Histogram(
            "llmvis_shard_stage_seconds",
            "Seconds of a stage of a committed shard.",
            BOUNDARIES,
            ("job", "stage"),
        )


@cache
def _metrics() -> Metrics:
    return Metrics()


def planned(run: Run, shards: int, todo: int) -> None:
    """The driver's gauges: all shards of the job, and those that this run has to do."""
    tags = {"job": run["job"]}
    Gauge("llmvis_shards_planned", "Shards of the job.", ("job",)).set(shards, tags)
    Gauge("llmvis_shards_to_do", "Shards that the run began with.", ("job",)).set(todo, tags)


def began(run: Run, shard: int, stage: str) -> None:
    """A worker begins a stage on a shard; a line without a later one of the shard names what killed it."""
    context = ray.get_runtime_context()
    worker: Any = global_worker  # Ray has no public way to the attempt; its version is pinned
    attempt = worker.core_worker.get_current_task_attempt_number()
    node, task = context.get_node_id(), context.get_task_id()
    log_event(run, "begin", shard=shard, stage=stage, attempt=attempt, node=node, task=task)
    _metrics().tries.inc(1, {"job": run["job"], "stage": stage})


def committed(run: Run, marker: dict[str, Any]) -> None:
    """A worker has committed a shard, and this is its marker."""
    written, dead = (marker[part]["rows"] if marker[part] else 0 for part in ("data", "dead"))
    outcomes = {"written": written, "dead": dead, "duplicate": marker["duplicates"]}
    log_event(
        run, "commit", shard=marker["shard"], stage="commit", node=ray.get_runtime_context().get_node_id(),
        items=marker["items"], **outcomes, reasons=marker["reasons"], seconds=marker["seconds"],
        bytes=marker["data"]["bytes"] if marker["data"] else 0,
    )  # fmt: skip
    metrics, job = _metrics(), run["job"]
    metrics.shards.inc(1, {"job": job})
    for outcome, count in outcomes.items():
        _count(metrics.items, count, {"job": job, "outcome": outcome})
    for reason, count in marker["reasons"].items():
        _count(metrics.dead, count, {"job": job, "reason": reason})
    for stage, seconds in marker["seconds"].items():
        _count(metrics.seconds, seconds, {"job": job, "stage": stage})
        metrics.shard_seconds.observe(seconds, {"job": job, "stage": stage})


def _count(counter: Counter, value: float, tags: dict[str, str]) -> None:
    if value > 0:  # Ray's counters take nothing else
        counter.inc(value, tags)
