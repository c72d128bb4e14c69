"""Seeded kills: which process of which job dies where, each proved, and what comes of the job.

A scenario is one job in one folder. Its driver is started, and again each time that it dies, until it ends
well; meanwhile its faults fire (site/sitecustomize.py). Jobs share one Ray cluster with a head that does no
work and two nodes that do; a node that was killed is made up for by a new one.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import judge
import numpy as np
import ray
import small_jobs
from ray.cluster_utils import Cluster
from small_jobs import ENGINE_JOBS, INDEX_JOBS, SHARD_ROWS, SHARDS

from llmvis.cleanup import clean
from llmvis.index import open_index

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

OF_WORKERS = [
    ("prepare", "begin prepare"), ("prepare", "end prepare"),
    ("actor", "load"), ("actor", "begin apply"), ("actor", "end apply"),
    ("commit", "before data"), ("commit", "half data"), ("commit", "whole data"), ("commit", "before marker"),
    ("commit", "half marker"), ("commit", "whole marker"), ("commit", "after marker"),
]  # fmt: skip
"""Role and point. `before marker` is between data and marker."""
OF_DRIVERS = [
    "before plan", "half plan", "row", "before manifest", "half manifest", "whole manifest", "after manifest",
    "before sweep", "half report",
]  # fmt: skip
OF_NODES = [("actor", "begin apply"), ("commit", "half data"), ("commit", "before marker")]


def _written(*kinds: str) -> list[str]:
    return [f"{when} {kind}" for kind in kinds for when in ("before", "half", "whole")]


PUBLISHING = [*_written("manifest", "current"), "after current", "before sweep"]
"""`before current` is between manifest and CURRENT."""
OF_INDEX = {
    "index": [*_written("vectors", "metadata", "building"), *PUBLISHING],
    "index-add": [*_written("vectors", "metadata", "building"), *PUBLISHING],
    "index-compact": [*_written("vectors", "metadata", "building"), *PUBLISHING],
    "index-delete": [*_written("deleted"), *PUBLISHING],
    "lists": [*_written("building", "trained"), *PUBLISHING],
    "lists-add": [*_written("building"), *PUBLISHING],
    "lists-compact": [*_written("building", "trained"), *PUBLISHING],
}
"""Where drivers of `INDEX_JOBS` die; shards of the last three are made by tasks."""
_SHARDS = ["begin write_shard", *_written("vectors", "metadata"), "end write_shard"]
_LISTS = ["begin make_lists", "before lists", "whole lists", "after lists", "end make_lists"]
_TRAINING = ["begin sample", "end sample", "begin train_sample", "end train_sample"]
OF_TASKS = {
    "lists": [*_SHARDS, *_TRAINING, *_LISTS],
    "lists-add": [*_SHARDS, *_LISTS],
    "lists-compact": [*_SHARDS, *_TRAINING, *_LISTS],
}


@dataclass(kw_only=True)
class Scenario:
    job: str
    faults: list[dict[str, Any]]


@dataclass(kw_only=True)
class Outcome:
    """Of one scenario: which of its faults fired, and what was found wrong."""

    scenario: Scenario
    fired: list[dict[str, Any]]
    reruns: int
    verdict: judge.Verdict = field(default_factory=judge.Verdict)
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return self.verdict.good and len(self.fired) == len(self.scenario.faults)


def engine_scenarios(seed: int, count: int) -> list[Scenario]:
    """`count` scenarios, of each job in turn; together they have each victim at each point of `OF_…`."""
    chance = random.Random(seed)
    workers, drivers = _endless(chance, OF_WORKERS), _endless(chance, OF_DRIVERS)
    nodes = _endless(chance, OF_NODES)
    made = []
    for number in range(count):
        job = ENGINE_JOBS[number % len(ENGINE_JOBS)]
        shards = iter(chance.sample(range(SHARDS[job]), 6))
        faults: list[dict[str, Any]] = []
        for role, point in (next(workers) for _ in range(5)):
            shard = None if point == "load" else next(shards)
            faults.append({"role": role, "point": point, "shard": shard, "do": "kill"})
        for point in (next(drivers) for _ in range(2)):
            shard = chance.randint(1, 4) if point == "row" else None
            faults.append({"role": "driver", "point": point, "shard": shard, "do": "kill"})
        if number % 2:
            role, point = next(nodes)
            faults.append({"role": role, "point": point, "shard": next(shards), "do": "kill node"})
        made.append(Scenario(job=job, faults=[{"id": str(i), **f} for i, f in enumerate(faults)]))
    return made


def index_scenarios(seed: int, count: int) -> list[Scenario]:
    """Changes of an index: a driver's kill each, and where there are tasks those of three, or of two and a node."""
    chance = random.Random(seed)
    drivers = {job: _endless(chance, points) for job, points in OF_INDEX.items()}
    tasks = {job: _endless(chance, points) for job, points in OF_TASKS.items()}
    made, jobs = [], _endless(chance, list(INDEX_JOBS))
    for _ in range(count):
        job = next(jobs)
        faults = [{"role": "driver", "point": next(drivers[job])}]
        faults += [{"role": "task", "point": next(tasks[job])} for _ in range(3 if job in tasks else 0)]
        if job in tasks and chance.random() < 0.5:
            faults[-1]["do"] = "kill node"
        laid_out = [{"id": str(i), "shard": None, "do": "kill", **fault} for i, fault in enumerate(faults)]
        made.append(Scenario(job=job, faults=laid_out))
    return made


def _endless(chance: random.Random, things: list[Any]) -> Iterator[Any]:
    """All of them in an order of chance, then all again in another one."""
    while True:
        yield from chance.sample(things, len(things))


def environment(faults: Path) -> dict[str, str]:
    """Of processes in which the faults of a folder fire."""
    paths = [HERE / "site", ROOT, HERE.parent, HERE]
    return {
        **os.environ,
        "CHAOS": str(faults),
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": "1",
    }


class Laboratory:
    """A folder with inputs, results of calm runs, and the place where faults are laid out."""

    def __init__(self, folder: Path) -> None:
        self.work, self.faults = folder / "work", folder / "faults"
        self.work.mkdir(parents=True)
        (self.faults / "fired").mkdir(parents=True)
        small_jobs.prepare_work(self.work)
        for job in ENGINE_JOBS:
            small_jobs.run_calmly(job, self.work, self.calm(job))
        self._cluster: Cluster | None = None

    def calm(self, job: str) -> Path:
        return self.work / f"calm-{job}"

    def lay_out(self, faults: list[dict[str, Any]]) -> None:
        shutil.rmtree(self.faults / "fired")
        (self.faults / "fired").mkdir()
        (self.faults / "faults.json").write_text(json.dumps(faults))

    def fired(self) -> list[dict[str, Any]]:
        """The faults that fired and whose victims are really gone."""
        proofs = [json.loads(path.read_bytes()) for path in sorted((self.faults / "fired").iterdir())]
        return [p for p in proofs if _is_gone(p["pid"]) and (p["raylet"] is None or _is_gone(p["raylet"]))]

    def drive(self, job: str, out: Path, **more: str) -> subprocess.CompletedProcess[str]:
        """One run of a job's driver."""
        env = environment(self.faults) | more
        if job in OF_TASKS:
            env["CHAOS_SHARD_ROWS"] = str(SHARD_ROWS)
        if self._cluster is not None and (job in OF_TASKS or job in ENGINE_JOBS):
            env["RAY_ADDRESS"] = self._cluster.address
        command = [sys.executable, str(HERE / "small_jobs.py"), job, str(self.work), str(out)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)

    @contextmanager
    def cluster(self) -> Iterator[None]:
        """For the length of the block, drivers join a cluster in whose workers faults fire."""
        quick = {
            "health_check_initial_delay_ms": 0,
            "health_check_period_ms": 300,
            "health_check_failure_threshold": 3,
        }
        before = dict(os.environ)
        os.environ.update(environment(self.faults))  # which the nodes' processes inherit
        try:
            self._cluster = Cluster(
                initialize_head=True,
                head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": quick},
            )
            ray.init(self._cluster.address, log_to_driver=False, logging_level=logging.ERROR)
            self.mend_cluster()
            yield
        finally:
            ray.shutdown()
            if self._cluster is not None:
                self._cluster.shutdown()
                self._cluster = None
            os.environ.clear()
            os.environ.update(before)

    def mend_cluster(self) -> None:
        """Makes up for nodes that are gone, where there is a cluster."""
        if self._cluster is None:
            return
        for node in [n for n in self._cluster.worker_nodes if not n.remaining_processes_alive()]:
            self._cluster.remove_node(node, allow_graceful=False)
        until = time.monotonic() + 30
        while sum(n["Alive"] for n in ray.nodes()) > 1 + len(self._cluster.worker_nodes):
            assert time.monotonic() < until, "a dead node is not noticed"
            time.sleep(0.05)
        while len(self._cluster.worker_nodes) < 2:
            self._cluster.add_node(num_cpus=1)
        self._cluster.wait_for_nodes()

    def run_engine(self, scenario: Scenario, out: Path) -> Outcome:
        """Runs the job until it ends well; at most three runs more than drivers are killed."""
        begun = time.monotonic()
        self.lay_out(scenario.faults)
        most = 3 + sum(f["role"] == "driver" for f in scenario.faults)
        reruns, said = 0, ""
        with judge.Watch(out) as watch:
            while (run := self.drive(scenario.job, out)).returncode and reruns < most:
                said += f"[{run.returncode}] {run.stderr[-1000:]}\n"
                reruns += 1
                self.mend_cluster()
        self.mend_cluster()
        outcome = Outcome(scenario=scenario, fired=self.fired(), reruns=reruns)
        if run.returncode:
            outcome.verdict.other.append(f"never ended well: {said}")
        else:
            outcome.verdict = judge.judge_job(out, self.calm(scenario.job))
            outcome.verdict.unreadable += watch.unreadable
        outcome.seconds = time.monotonic() - begun
        return outcome

    def prepare_index(self) -> None:
        """What changes of an index begin with, and what comes of each."""
        (self.work / "new").symlink_to(self.calm("encode"))
        some = self.work / "part" / "new"
        shutil.copytree(self.calm("encode"), some)
        manifest = json.loads((some / "manifest.json").read_bytes())
        manifest["files"] = manifest["files"][:4]
        manifest["rows"] = sum(file["rows"] for file in manifest["files"])
        (some / "manifest.json").write_text(json.dumps(manifest))
        small_jobs.prepare_indexes(self.work)
        for job in INDEX_JOBS:
            shutil.copytree(self.base(job), self.calm(job))
            small_jobs.run_index(job, self.work, self.calm(job))

    def base(self, job: str) -> Path:
        return self.work / INDEX_JOBS[job].base

    def run_index(self, scenario: Scenario, out: Path) -> Outcome:
        """A change that is killed and run again, while a reader opens and searches all the time."""
        begun = time.monotonic()
        shutil.copytree(self.base(scenario.job), out)
        self.lay_out(scenario.faults)
        served = [set(judge.index_rows(place)) for place in (out, self.calm(scenario.job))]
        with Reader(out, served) as reader:
            killed = self.drive(scenario.job, out)
            after_kill = unreadable_now(out)
            self.mend_cluster()
            again = self.drive(scenario.job, out)
        self.mend_cluster()
        outcome = Outcome(scenario=scenario, fired=self.fired(), reruns=1)
        if killed.returncode != -signal.SIGKILL or again.returncode:
            outcome.verdict.other.append(
                f"{killed.returncode}, then {again.returncode}: {again.stderr[-1000:]}"
            )
        else:
            outcome.verdict = judge.judge_index(out, self.calm(scenario.job))
            outcome.verdict.other += [f"gc finds {stray.name}" for stray in clean(str(out), dry_run=True)]
        outcome.verdict.unreadable += after_kill
        outcome.verdict.other += reader.wrong
        outcome.seconds = time.monotonic() - begun
        return outcome


def unreadable_now(out: Path) -> int:
    """Files that an index's current manifest names and that cannot be read."""
    return len(judge.unreadable(out, judge.current_index(out)))


def _is_gone(pid: int) -> bool:
    """Whether a process has ended, be it that its parent has not looked yet."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.02)
    return False


class Reader:
    """Opens an index and searches it, over and over, in a thread; what is `wrong` is said in words.

    served: ids that it may have, version by version.
    """

    def __init__(self, out: Path, served: list[set[str]]) -> None:
        self._out, self._served, self._stop, self.wrong = out, served, threading.Event(), list[str]()
        self._thread = threading.Thread(target=self._read)
        self.searches = 0

    def _read(self) -> None:
        query = np.ones((1, small_jobs.tiny.INFO.dim), np.float32)
        while not self._stop.is_set():
            try:
                with open_index(str(self._out)) as index:
                    _, rows = index.search(query, 1000)
                    found = [row["id"] for row in index.metadata(rows[0])]
                if len(set(found)) != len(found) or set(found) not in self._served:
                    self.wrong.append(f"{len(found)} answers that are no version's")
            except Exception as error:  # noqa: BLE001  whatever it is, a reader must not see it
                self.wrong.append(f"a reader saw {error!r}")
            self.searches += 1

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        if not self.searches:
            self.wrong.append("the reader never searched")
