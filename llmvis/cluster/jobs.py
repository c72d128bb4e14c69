"""The job engine: a mapping of items, run shard by shard on Ray Data, exactly once.

    plan → [shard numbers] → read + decode (CPU tasks) → model (pool of actors) → commit → manifest

One Ray row is one shard of a few hundred items, so retries, block boundaries and
node losses cannot split or repeat what a marker counts. Between stages a shard
travels as raw bytes. The engine knows nothing of any model: a job brings a
`Mapping`, whose parts are called where they belong.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import ActorDiedError, ActorUnavailableError, WorkerCrashedError
from tqdm import tqdm

from llmvis.cluster.session import resources, session
from llmvis.ledger import PARQUET, Packing, committed, dead_row, publish_manifest, publish_shard
from llmvis.plan import DUPLICATE, Plan, adopt, read_shard
from llmvis.schema import DEAD_LETTER, ItemError, Reason, UserError
from llmvis.sources import Source
from llmvis.storage import Store
from llmvis.summary import job_report

WAVE_SHARDS = 4_096
"""Shards that Ray Data is given at a time: its driver keeps 4 kB for each, and 1 ms."""

Row = dict[str, Any]
Arrays = npt.NDArray[Any]


class Prepare(Protocol):
    """Runs in CPU tasks: listing rows → rows that can be used, one array row each, and dead letters.

    Picklable. Returns `(rows, array (N, …), dead rows, seconds by stage)`.
    """

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, Arrays, list[Row], dict[str, float]]: ...


class Apply(Protocol):
    """Runs in an actor: prepared rows and arrays → output rows and dead letters."""

    def __call__(self, rows: pa.Table, arrays: Arrays, /) -> tuple[pa.Table, list[Row]]: ...


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


ACTOR_CPUS, PREPARE_CPUS, COMMIT_CPUS = 0.5, 0.4, 0.1
"""What each asks for. Less than a CPU, so that on CPUs alone actors and decode tasks share
the cores: whichever is the bottleneck finds them free, since the other waits for it. All
differ, so that Ray Data does not fuse two stages into one."""

TRIES = 3
"""Further tries for a task whose worker died, before the job gives up."""


class JobError(UserError):
    """A job that cannot be finished as things are; the message says what to do."""


def fit(pool: Pool, cpus: int, gpus: float, shards: int) -> tuple[int, float]:
    """The number of actors and the GPUs of each, for a cluster with these resources.

    What is asked for is taken as it is, since a cluster that scales has few nodes at first.
    """
    share = pool.gpus_per_actor if pool.gpus_per_actor is not None else float(gpus >= 1)
    actors = pool.actors or (max(1, int(gpus / share)) if share else cpus)
    return max(1, min(actors, shards)), share


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
    is. Raises `PlanError` where `out` holds other work and `LockedError` where a driver is at it.
    """
    store = Store(out)
    with store.lock():
        begun = time.perf_counter()
        plan = adopt(
            store, job=mapping.job, source=source, settings=mapping.settings, shard_items=pool.shard_items
        )
        listed = time.perf_counter() - begun
        done = committed(store)
        if len(done) == plan.shards and store.exists("manifest.json") and store.exists("report.json"):
            return {**store.read_json("report.json"), "already_done": True}
        announce(plan)
        todo = [shard for shard in range(plan.shards) if shard not in done]
        if todo:
            with session(num_cpus):
                _run_shards(mapping, store, source, plan, pool, todo, quiet)
        manifest = publish_manifest(store, plan, mapping.about)
        report = job_report(
            store, plan, manifest, todo=todo, list_s=listed, wall_s=time.perf_counter() - begun
        )
        store.write_json("report.json", report)
        return report


def _run_shards(
    mapping: Mapping, store: Store, source: Source, plan: Plan, pool: Pool, todo: list[int], quiet: bool
) -> None:
    """Streams the shards of `todo` through the stages; the driver sees one small row a shard."""
    cpus, gpus = resources()
    actors, share = fit(pool, cpus, gpus, len(todo))
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.wait_for_min_actors_s = -1
    sizes = {shard: min(plan.shard_items, plan.items - shard * plan.shard_items) for shard in todo}
    with _progress(plan, plan.items - sum(sizes.values()), quiet) as bar:
        for at in range(0, len(todo), WAVE_SHARDS):
            for shard in _wave(mapping, str(store.root), todo[at : at + WAVE_SHARDS], actors, share):
                bar.update(sizes[shard])


def _wave(mapping: Mapping, out: str, shards: list[int], actors: int, gpus: float) -> Iterator[int]:
    """Does `shards`, one Ray row each, and gives the number of each as it is committed."""
    prepare: Any = _prepare  # Ray's types know functions of one argument only
    commit: Any = _commit
    actor: Any = _Actor
    rows: ray.data.Dataset = ray.data.from_items(
        [{"shard": shard} for shard in shards], override_num_blocks=len(shards)
    )
    with warnings.catch_warnings():  # the only way to bound retries; Ray takes it away in 2.64
        warnings.simplefilter("ignore", DeprecationWarning)
        rows = rows.map(
            prepare,
            fn_kwargs={"out": out, "prepare": mapping.prepare},
            num_cpus=PREPARE_CPUS,
            max_retries=TRIES,
        )
        rows = rows.map(
            actor,
            fn_constructor_kwargs={"load": mapping.load},
            compute=ActorPoolStrategy(min_size=1, max_size=actors, initial_size=actors),
            num_cpus=ACTOR_CPUS,
            num_gpus=gpus or None,
            max_task_retries=TRIES,
        )
        rows = rows.map(
            commit,
            fn_kwargs={"out": out, "schema": mapping.schema, "packing": mapping.packing},
            num_cpus=COMMIT_CPUS,
            max_retries=TRIES,
        )
    try:
        for row in rows.iter_rows():
            yield row["shard"]
    except (WorkerCrashedError, ActorDiedError, ActorUnavailableError) as error:
        raise JobError(
            f"a worker died {1 + TRIES} times over one shard, or could not be started. What is committed stays; "
            f"run the job again to go on. If it fails at the same place, one picture kills the decoder or the "
            f"model: find it with smaller --shard-items in a new --out. Ray says: {str(error)[-500:]}"
        ) from error


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


def _prepare(row: Row, out: str, prepare: Prepare) -> Row:
    """Stage 1, a task: reads and decodes one shard."""
    shard = int(row["shard"])
    listing = read_shard(Store(out).path("plan"), shard)
    duplicate = pa.compute.equal(listing["reason"], DUPLICATE).fill_null(False)
    bad = listing.filter(pa.compute.and_not(listing["reason"].is_valid(), duplicate))
    dead = [
        dead_row(r["id"], r["path"], "list", ItemError(Reason(r["reason"]), r["detail"] or ""))
        for r in bad.select(["id", "path", "reason", "detail"]).to_pylist()
    ]
    rows, arrays, more, seconds = prepare(listing.filter(listing["reason"].is_null()))
    return {
        "head": json.dumps(
            {
                "shard": shard,
                "items": listing.num_rows,
                "duplicates": int(pa.compute.sum(duplicate).as_py() or 0),
                "shape": arrays.shape,
                "dtype": str(arrays.dtype),
                "dead": dead + more,
                "seconds": seconds,
            }
        ),
        "rows": to_bytes(rows),
        "arrays": np.ascontiguousarray(arrays).tobytes(),
    }


class _Actor:
    """Stage 2, an actor: holds the model, which is loaded here and never sent."""

    def __init__(self, load: Callable[[], Apply]) -> None:
        self._apply = load()

    def __call__(self, row: Row) -> Row:
        head = json.loads(row["head"])
        arrays = np.frombuffer(row["arrays"], head["dtype"]).reshape(head["shape"])
        rows = from_bytes(row["rows"])
        begun = time.perf_counter()
        # when this shard would have been begun, had the model been there
        head["started"] = time.time() - sum(head["seconds"].values())
        if rows.num_rows:
            rows, dead = self._apply(rows, arrays)
            head["dead"] += dead
        head["seconds"]["model"] = time.perf_counter() - begun
        return {"head": json.dumps(head), "rows": to_bytes(rows)}


def _commit(row: Row, out: str, schema: pa.Schema, packing: Packing) -> Row:
    """Stage 3, a task: publishes the shard's files and its marker."""
    head = json.loads(row["head"])
    rows = from_bytes(row["rows"])
    rows = rows.select(schema.names).cast(schema) if rows.num_rows else schema.empty_table()
    dead = pa.Table.from_pylist(head["dead"], DEAD_LETTER)
    publish_shard(
        Store(out), head["shard"], rows, dead,
        items=head["items"], duplicates=head["duplicates"], seconds=head["seconds"], started=head["started"],
        packing=packing,
    )  # fmt: skip
    return {"shard": head["shard"]}


def to_bytes(table: pa.Table) -> bytes:
    """An Arrow table as IPC bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def from_bytes(data: bytes) -> pa.Table:
    """The table that `to_bytes` packed."""
    return pa.ipc.open_stream(pa.py_buffer(data)).read_all()
