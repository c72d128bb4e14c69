"""The job engine: a mapping of items, run shard by shard on Ray Data, exactly once.

    plan → [shard numbers] → read + decode (CPU tasks) → model (pool of actors) → commit → manifest

One Ray row is one shard of a few hundred items, so retries, block boundaries and
node losses cannot split or repeat what a marker counts. Between stages a shard
travels as raw bytes. The engine knows nothing of any model: a job brings a
`Mapping`, whose parts are called where they belong.
"""

from __future__ import annotations

import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from tqdm import tqdm

from llmvis.cluster import observe
from llmvis.cluster.checks import check_cluster
from llmvis.cluster.session import resources, session
from llmvis.cluster.stages import Apply, ModelActor, Prepare, commit_shard, prepare_shard
from llmvis.cluster.tally import BEGUN_ENOUGH, started_tally
from llmvis.cluster.watch import watched
from llmvis.events import Journal
from llmvis.ledger import PARQUET, Packing, committed, publish_manifest
from llmvis.plan import Plan, adopt
from llmvis.preflight import PreflightError, cannot_fit, check_writes
from llmvis.retry import take_up
from llmvis.sources import Source
from llmvis.storage import Store, open_store
from llmvis.summary import job_report

WAVE_SHARDS = 4_096
"""Shards that Ray Data is given at a time: its driver keeps 4 kB for each, and 1 ms."""


@dataclass(frozen=True, kw_only=True)
class Mapping:
    """All that a job is: what it does to a shard's items, and what that depends on."""

    job: str
    settings: dict[str, Any]  # everything that changes the output; part of the fingerprint
    about: dict[str, Any]  # goes into the manifest: model, schema, …
    prepare: Prepare
    load: Callable[[], Apply]  # called once an actor
    schema: pa.Schema
    packing: Packing = PARQUET


@dataclass(frozen=True, kw_only=True)
class Pool:
    """How a job uses the cluster. None: as many actors as there are GPUs, else CPUs, at its start."""

    actors: int | None = None
    gpus_per_actor: float | None = None
    shard_items: int = 256
    timeout: float = 1800.0  # seconds for a shard in one stage; then its worker is taken to hang


ACTOR_CPUS, PREPARE_CPUS, COMMIT_CPUS = 0.5, 0.4, 0.1
"""What each asks for. Less than a CPU, so that on CPUs alone actors and decode tasks share
the cores: whichever is the bottleneck finds them free, since the other waits for it. All
differ, so that Ray Data does not fuse two stages into one."""

LOADS_FAILED = 1
"""Actors in a row, each with tries of its own, that may fail to load the model: one more ends the job."""


def fit(pool: Pool, cpus: int, gpus: float, shards: int) -> tuple[int, float]:
    """The number of actors and the GPUs of each, for a cluster with these resources.

    What is asked for is taken as it is, since a cluster that scales has few nodes at first.
    """
    share = pool.gpus_per_actor if pool.gpus_per_actor is not None else float(gpus >= 1)
    beside = max(1, int((cpus - PREPARE_CPUS) / ACTOR_CPUS))  # that leave room for reading
    actors = pool.actors or min(beside, max(1, int(gpus / share)) if share else cpus)
    return max(1, min(actors, shards)), share


def check_alone(pool: Pool, num_cpus: int | None, shards: int) -> None:
    """What can be known without a cluster, where the job would start its own: raises `PreflightError`.

    GPUs are Ray's to find, so they are taken to be there.
    """
    if os.environ.get("RAY_ADDRESS", "local") != "local" or ray.is_initialized():
        return
    cpus = num_cpus or os.cpu_count() or 1
    actors, share = fit(pool, cpus, 0, shards)
    node = {"CPU": float(cpus), "GPU": math.inf}
    if why := cannot_fit(
        [node], actors=actors, gpus_per_actor=share, actor_cpus=ACTOR_CPUS, task_cpus=PREPARE_CPUS
    ):
        raise PreflightError(why)


def run_job(
    mapping: Mapping,
    source: Source,
    out: str,
    pool: Pool,
    *,
    announce: Callable[[Plan], None] = lambda plan: None,
    quiet: bool = False,
    num_cpus: int | None = None,
) -> dict[str, Any]:
    """Runs a job to its end, or on from where an earlier run of it stopped.

    `announce` is told the plan before the work begins; `quiet` shows no progress. Only where there is
    work is Ray joined, or started with `num_cpus`, unless it is connected. Returns the report (see
    `summary.job_report`), which is also written to `<out>/report.json`. A finished job is left as it
    is. Raises `PlanError` where `out` holds other work, `LockedError` where a driver is at it,
    `PreflightError` where the cluster can't do it, and `JobError` where the work can't be finished.
    """
    store = open_store(out)
    with store.lock(), Journal(store.uri) as journal:
        check_writes(store)
        begun = time.perf_counter()
        take_up(store, job=mapping.job, source=source, settings=mapping.settings)
        plan = adopt(
            store, job=mapping.job, source=source, settings=mapping.settings, shard_items=pool.shard_items
        )
        listed = time.perf_counter() - begun
        done = committed(store)
        if len(done) == plan.shards and store.exists("manifest.json") and store.exists("report.json"):
            return {**store.read_json("report.json"), "already_done": True}
        store.delete("report.json")  # of an earlier run: from here on the job is not finished
        announce(plan)
        todo = [shard for shard in range(plan.shards) if shard not in done]
        run = journal.start(plan, len(todo))
        if todo:
            with session(num_cpus):
                observe.planned(run, plan.shards, len(todo))
                _run_shards(mapping, store, source, plan, pool, todo, quiet, run)
        manifest = publish_manifest(store, plan, mapping.about)
        report = job_report(
            store, plan, manifest, todo=todo, list_s=listed, wall_s=time.perf_counter() - begun
        )
        store.write_json("report.json", report)
        journal.end(report)
        return report


def _run_shards(
    mapping: Mapping, store: Store, source: Source, plan: Plan, pool: Pool, todo: list[int], quiet: bool,
    run: observe.Run,
) -> None:  # fmt: skip
    """Streams the shards of `todo` through the stages; the driver sees one small row a shard."""
    cpus, gpus = resources()
    actors, share = fit(pool, cpus, gpus, len(todo))
    check_cluster(
        store.uri, source.describe(),
        actors=actors, gpus_per_actor=share, actor_cpus=ACTOR_CPUS, task_cpus=PREPARE_CPUS,
    )  # fmt: skip
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.wait_for_min_actors_s = -1
    context.raise_original_map_exception = True  # Ray's own in its place would not have the words
    context.execution_no_progress_timeout_s = -1  # `watched` knows what is slow and what can't run
    context.issue_detectors_config.detectors = []  # nor do Ray's guesses at what hangs help
    context.max_consecutive_actor_init_deaths = LOADS_FAILED
    sizes = {shard: min(plan.shard_items, plan.items - shard * plan.shard_items) for shard in todo}
    with (
        _progress(plan, plan.items - sum(sizes.values()), quiet) as bar,
        started_tally(pool.timeout) as tally,
    ):
        for at in range(0, len(todo), WAVE_SHARDS):
            wave = _wave(
                mapping, store.uri, todo[at : at + WAVE_SHARDS], actors, share, tally, pool.timeout, run
            )
            for row in watched(wave, tally, pool.timeout):
                bar.update(sizes[row["shard"]])


def _wave(
    mapping: Mapping,
    out: str,
    shards: list[int],
    actors: int,
    gpus: float,
    tally: Any,
    limit: float,
    run: observe.Run,
) -> ray.data.Dataset:
    """The work on `shards`, one Ray row each; its rows hold the number of a shard that is committed.

    Ray's own bounds on retries are no help: a shard that waits behind a deadly one loses a try
    with it. The tally ends what is hopeless; these are as high as all shards' deaths together.
    """
    prepare: Any = prepare_shard  # Ray's types know functions of one argument only
    commit: Any = commit_shard
    actor: Any = ModelActor
    most = BEGUN_ENOUGH * (1 + len(shards))
    known = {"tally": tally, "limit": limit}
    rows: ray.data.Dataset = ray.data.from_items(
        [{"shard": shard, "run": run} for shard in shards], override_num_blocks=len(shards)
    )
    with warnings.catch_warnings():  # the only way to bound retries; Ray takes it away in 2.64
        warnings.simplefilter("ignore", DeprecationWarning)
        rows = rows.map(
            prepare,
            fn_kwargs={"out": out, "prepare": mapping.prepare, **known},
            num_cpus=PREPARE_CPUS,
            max_retries=most,
        )
        rows = rows.map(
            actor,
            fn_constructor_kwargs={"load": mapping.load, **known},
            compute=ActorPoolStrategy(min_size=1, max_size=actors, initial_size=actors),
            num_cpus=ACTOR_CPUS,
            num_gpus=gpus or None,
            max_task_retries=most,  # its restarts have no bound of Ray's: the tally and `watched` have one
        )
        rows = rows.map(
            commit,
            fn_kwargs={"out": out, "schema": mapping.schema, "packing": mapping.packing, **known},
            num_cpus=COMMIT_CPUS,
            max_retries=most,
        )
    return rows


def _progress(plan: Plan, done: int, quiet: bool) -> tqdm[Any]:
    """A bar on a terminal; elsewhere a line every ten seconds."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=plan.items,
        initial=done,
        desc=plan.job,
        unit=" items",
        disable=quiet,
        mininterval=0.2 if terminal else 10,
        dynamic_ncols=terminal,
    )
