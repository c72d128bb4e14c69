"""A job from its plan to its report, as every bulk command runs it: announce, run or only plan, print."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmvis.cluster.jobs import Mapping, Pool, check_alone, run_job
from llmvis.cluster.session import warn
from llmvis.ledger import committed
from llmvis.plan import Plan, check_same, existing, plan_aside
from llmvis.preflight import check_writable, disk_line
from llmvis.retry import RETRY
from llmvis.schema import printable
from llmvis.sources import Source
from llmvis.storage import Store, open_store
from llmvis.summary import plan_lines, report_lines


class Flags(Protocol):
    """What the config of every job on the engine has."""

    @property
    def out(self) -> str: ...
    @property
    def dry_run(self) -> bool: ...
    @property
    def actors(self) -> int | None: ...
    @property
    def gpus_per_actor(self) -> float | None: ...
    @property
    def num_cpus(self) -> int | None: ...
    @property
    def shard_items(self) -> int: ...
    @property
    def timeout(self) -> float: ...
    @property
    def json(self) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a command was asked to run a job, beside what the job is."""

    out: str
    pool: Pool
    dry_run: bool = False
    num_cpus: int | None = None
    json: str | None = None
    what: dict[str, str]  # of the model and the request, for the plan that is shown
    row_bytes: int  # an estimate for one output row

    @classmethod
    def of(cls, flags: Flags, *, what: dict[str, str], row_bytes: int) -> Way:
        """As a command's flags say."""
        pool = Pool(
            actors=flags.actors, gpus_per_actor=flags.gpus_per_actor, shard_items=flags.shard_items,
            timeout=flags.timeout,
        )  # fmt: skip
        return cls(
            out=flags.out, pool=pool, dry_run=flags.dry_run, num_cpus=flags.num_cpus, json=flags.json,
            what=what, row_bytes=row_bytes,
        )  # fmt: skip


def run_planned(
    mapping: Mapping, source: Source, way: Way, finish: Callable[[dict[str, Any]], None] = lambda report: None
) -> dict[str, Any]:
    """Runs the job, or shows its plan and how far an earlier run came; returns the report.

    `finish` is called with the report when all is written, before it is printed.
    """

    def announce(plan: Plan) -> None:
        what = {**way.what, "out": way.out}
        print("\n".join(plan_lines(plan, source.notes(), what=what, row_bytes=way.row_bytes)), flush=True)
        rows = plan.items - plan.duplicates - plan.bad
        if disk := disk_line(way.out, rows * way.row_bytes):
            print(disk[0], flush=True)
            if disk[1]:
                warn(disk[1])

    if way.dry_run:
        with plan_aside(
            job=mapping.job, source=source, settings=mapping.settings, shard_items=way.pool.shard_items
        ) as (plan, aside):
            announce(plan)
            _compare(open_store(way.out), plan, aside)
            check_writable(way.out)
            check_alone(way.pool, way.num_cpus, plan.shards)
        return {}
    report = run_job(mapping, source, way.out, way.pool, announce=announce, num_cpus=way.num_cpus)
    finish(report)
    print("\n".join(report_lines(report, way.out)))
    if way.json:
        Path(way.json).write_text(json.dumps(report, indent=1) + "\n")
    return report


def _compare(store: Store, plan: Plan, aside: Store) -> None:
    """Says how far the job in `store` is; raises `PlanError` where it is another one."""
    old = existing(store)
    if old is None:
        return
    if store.exists(RETRY):
        print(f"  retry      dead letters go back to work; see llmvis inspect {printable(store.uri)}")
        return
    check_same(store, old, plan, aside)
    done = len(committed(store))
    print(f"  so far     {done:,} of {old.shards:,} shards are done; the job goes on from there")
