"""What a killed actor and a lost node cost a job: wall time over that of the same job without a fault.

Three kinds of runs in turn, several times, each in a process of its own with a cluster of three
nodes of one CPU on this machine: nothing is done to it; the process of one model actor is killed;
one node is removed without notice. Faults come when a third of the shards is committed, and a
run counts only if its fault fired. Every run must write every row once. Ratios are of medians, `ratio` is the
larger of the two; of a lost node's the time until it was noticed is taken off.
`detection`: seconds until Ray knew that the node was gone; health checks are made quick here
(0.3 s, three times), where Ray's own setting takes some 15 s.

The encoder is one that sleeps, so that a lost node takes its share of the speed with it, which it
would not where all nodes share two cores; `--packaged` takes the packaged one and the emoji.

    python -m benchmarks.faults --runs 3 --json faults.json
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import tyro
from ray.cluster_utils import Cluster
from ray.util.state import list_actors

from jobs.encode import mapping
from llmvis.cluster.jobs import Pool, run_job
from llmvis.config import EncodeConfig
from llmvis.ledger import read_data, read_manifest
from llmvis.models.load import describe_encoder
from llmvis.sources import open_source
from llmvis.storage import LocalStore
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("none", "actor", "node")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure with."""

    shards: int = 60
    """Shards of eight pictures; with --packaged, the emoji in shards of 64 instead."""
    delay: float = 0.8
    """Seconds that the encoder sleeps for each shard."""
    packaged: bool = False
    """The packaged encoder on the packaged emoji."""
    runs: int = 3
    """Times that each kind runs, in turn."""
    json: str | None = None
    """Write the figures there."""


def one(kind: str, images: str, out: str) -> None:
    """One run, in this process; prints its figures."""
    quick = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 300,
        "health_check_failure_threshold": 3,
    }
    head = {"num_cpus": 1, "_system_config": quick}
    cluster = Cluster(initialize_head=True, connect=True, head_node_args=head)
    nodes = {node.node_id: node for node in [cluster.add_node(num_cpus=1) for _ in range(2)]}
    cluster.wait_for_nodes()
    source = open_source(images)
    if images == "emoji":
        config = EncodeConfig(images=images, out=out)
        job, pool = mapping(config, source, describe_encoder(None)), Pool(shard_items=64)
    else:
        job, pool = tiny.mapping(source), Pool(shard_items=8)
    seen: dict[str, Any] = {}
    fault = threading.Thread(target=_strike, args=(kind, out, cluster, nodes, seen), daemon=True)
    fault.start()
    begun = time.monotonic()
    report = run_job(job, source, out, pool, quiet=True)
    seen |= {"wall_s": time.monotonic() - begun, "items_per_second": report["items_per_second"]}
    fault.join(timeout=60)
    store = LocalStore(out)
    files = read_manifest(store, "encode")["files"]
    ids = Counter(i for file in files for i in read_data(store, file)["id"].to_pylist())
    ledger = report["ledger"]
    assert len(ids) == ledger["written"] == ledger["input"] - ledger["duplicates"], ledger
    print(json.dumps(seen))
    ray.shutdown()
    cluster.shutdown()


def _strike(kind: str, out: str, cluster: Cluster, nodes: dict[str, Any], seen: dict[str, Any]) -> None:
    """Does the fault when a third is committed, and notes that it fired."""
    plan = Path(out, "plan.json")
    while not plan.exists():
        time.sleep(0.01)
    shards = json.loads(plan.read_text())["shards"]
    while len(LocalStore(out).names("_commits")) < shards / 3:
        time.sleep(0.01)
    if kind == "none":
        return
    models: list[Any] = []
    while not models:  # they start when they can
        alive = list_actors(filters=[("state", "=", "ALIVE")], detail=True)
        models = [a for a in alive if "ModelActor)" in a.class_name and a.node_id in nodes]
    victim = models[0]
    begun = time.monotonic()
    seen["commits"] = len(LocalStore(out).names("_commits"))
    assert seen["commits"] < shards, "the fault came too late"
    if kind == "actor":
        os.kill(victim.pid, signal.SIGKILL)
        seen["fired"] = True
        return
    cluster.remove_node(nodes[victim.node_id], allow_graceful=False)
    while sum(node["Alive"] for node in ray.nodes()) == 3:
        time.sleep(0.02)
    seen |= {"fired": True, "detection_s": time.monotonic() - begun}


def main(config: Config) -> None:
    """Runs all kinds, prints and writes the figures."""
    walls: dict[str, list[float]] = {kind: [] for kind in KINDS}
    detection: list[float] = []
    env = os.environ | {"TINY_DELAY": str(config.delay), "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        images = "emoji" if config.packaged else f"{folder}/images"
        if not config.packaged:
            tiny.pictures(Path(images), 8 * config.shards)
        for run in range(config.runs):
            for kind in KINDS:
                code = "import sys; from benchmarks.faults import one; one(*sys.argv[1:])"
                command = [sys.executable, "-c", code, kind, images, f"{folder}/{kind}-{run}"]
                done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr[-3000:]
                said = json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])
                assert kind == "none" or said["fired"]
                walls[kind].append(said["wall_s"])
                detection += [said["detection_s"]] if kind == "node" else []
                print(f"run {run + 1}, {kind}: {json.dumps(said)}", flush=True)
    median = {kind: statistics.median(times) for kind, times in walls.items()}
    lost = statistics.median(detection)
    actor, node = median["actor"] / median["none"], (median["node"] - lost) / median["none"]
    figures = {
        "ratio": round(max(actor, node), 3),
        "actor_ratio": round(actor, 3),
        "node_ratio": round(node, 3),
        "detection_s": round(lost, 2),
        "wall_s": {kind: round(value, 2) for kind, value in median.items()},
        "runs": {kind: [round(t, 2) for t in times] for kind, times in walls.items()},
        "encoder": "packaged" if config.packaged else f"sleeps {config.delay} s a shard",
        "cores": os.cpu_count(),
    }
    print(json.dumps(figures, indent=1))
    if config.json:
        Path(config.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
