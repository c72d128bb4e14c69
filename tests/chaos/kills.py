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
from small_jobs import ENGINE_JOBS, SHARDS

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
OF_INDEX = [
    "before vectors", "half vectors", "whole vectors", "before metadata", "half metadata", "before manifest",
    "half manifest", "whole manifest", "before current", "half current", "whole current", "after current",
    "before sweep",
]  # fmt: skip
"""`before current` is between manifest and CURRENT."""


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
        job = ENGINE_JOBS[number % 3]
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
    """Builds and additions, one kill each, at each point in turn."""
    points = _endless(random.Random(seed), [(job, p) for p in OF_INDEX for job in ("index", "index-add")])
    chosen = [next(points) for _ in range(count)]
    fault = {"id": "0", "role": "driver", "shard": None, "do": "kill"}
    return [Scenario(job=job, faults=[{**fault, "point": point}]) for job, point in chosen]


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
        if self._cluster is not None:
            env["RAY_ADDRESS"] = self._cluster.address
        command = [sys.executable, str(HERE / "small_jobs.py"), job, str(self.work), str(out)]
        if job not in ENGINE_JOBS:
            command = [
                sys.executable,
                "-m",
                "jobs.index",
                "--embeddings",
                str(self.work / "new"),
                "--out",
                str(out),
            ]
            command += ["--add"] if job == "index-add" else []
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
        """An index of some of the pictures, and what comes of it by a build or by an addition of all."""
        (self.work / "new").symlink_to(self.calm("encode"))
        some = self.work / "some"
        shutil.copytree(self.calm("encode"), some)
        manifest = json.loads((some / "manifest.json").read_bytes())
        manifest["files"] = manifest["files"][:4]
        manifest["rows"] = sum(file["rows"] for file in manifest["files"])
        (some / "manifest.json").write_text(json.dumps(manifest))
        other = self.work / "other"
        other.mkdir()
        (other / "new").symlink_to(some)
        for _ in range(2):  # so that there is a version before the one in force
            small_jobs.run_index(other, self.work / "index", add=False)
        for job in ("index", "index-add"):
            shutil.copytree(self.work / "index", self.calm(job))
            small_jobs.run_index(self.work, self.calm(job), add=job == "index-add")

    def run_index(self, scenario: Scenario, out: Path) -> Outcome:
        """A build that is killed and run again, while a reader opens and searches all the time."""
        begun = time.monotonic()
        shutil.copytree(self.work / "index", out)
        self.lay_out(scenario.faults)
        served = {judge.current_index(place)["rows"] for place in (out, self.calm(scenario.job))}
        with Reader(out, served) as reader:
            killed = self.drive(scenario.job, out)
            after_kill = unreadable_now(out)
            again = self.drive(scenario.job, out)
        outcome = Outcome(scenario=scenario, fired=self.fired(), reruns=1)
        if killed.returncode != -signal.SIGKILL or again.returncode:
            outcome.verdict.other.append(
                f"{killed.returncode}, then {again.returncode}: {again.stderr[-1000:]}"
            )
        else:
            outcome.verdict = judge.judge_index(out, self.calm(scenario.job))
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

    rows: how many rows it may have.
    """

    def __init__(self, out: Path, rows: set[int]) -> None:
        self._out, self._rows, self._stop, self.wrong = out, rows, threading.Event(), list[str]()
        self._thread = threading.Thread(target=self._read)
        self.searches = 0

    def _read(self) -> None:
        query = np.ones((1, small_jobs.tiny.INFO.dim), np.float32)
        while not self._stop.is_set():
            try:
                with open_index(str(self._out)) as index:
                    _, rows = index.search(query, 1000)
                    if len(set(rows[0])) != index.rows or index.rows not in self._rows:
                        self.wrong.append(f"{len(set(rows[0]))} answers of {index.rows} rows")
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
