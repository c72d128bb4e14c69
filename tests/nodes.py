"""Drivers of their own for tests of what is checked before the work. Prints JSON, errors as a command would."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ray
import tiny
from ray.cluster_utils import Cluster

from jobs import index
from llmvis.cluster import watch
from llmvis.cluster.jobs import Pool, run_job
from llmvis.cluster.planned import Way, run_planned
from llmvis.cluster.session import session
from llmvis.config import IndexConfig
from llmvis.entry import entry
from llmvis.index import planner
from llmvis.sources import open_source

RAY = [sys.executable, "-m", "ray.scripts.scripts"]


def job(images: str, out: str, pool: Pool) -> None:
    """An encode job; of what one wrote, an index in small shards."""
    if Path(images, "manifest.json").exists():
        planner.SHARD_ROWS, planner.MOST_SHARDS = 1000, 1000
        index.run(IndexConfig(embeddings=images, out=out, kind="ivf_sq8", recall=0.9))
        return
    source = open_source(images)
    run_job(tiny.mapping(source), source, out, pool, quiet=True)
    print("done")


def planned(images: str, out: str, row_bytes: str, dry_run: str) -> None:
    """As a command does it, with an estimate for a row."""
    source = open_source(images)
    pool = Pool(shard_items=8)
    way = Way(out=out, pool=pool, what={}, row_bytes=int(row_bytes), dry_run=dry_run == "dry", num_cpus=2)
    run_planned(tiny.mapping(source), source, way)


def two(images: str, out: str) -> None:
    """Two nodes that see the same folders."""
    cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    try:
        job(images, out, Pool(shard_items=8))
    finally:
        ray.shutdown()
        cluster.shutdown()


def blind(images: str, out: str, hidden: str) -> None:
    """Two nodes, of which the second has another, empty file system at `hidden`."""
    cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 1})
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:
        start = " ".join([*RAY, "start", f"--address={cluster.address}", "--num-cpus=1", "--block"])
        env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        command = ["unshare", "-m", "sh", "-c", f"mount -t tmpfs tmpfs {hidden} && exec {start}"]
        node = subprocess.Popen(
            command, env=env, stdout=subprocess.DEVNULL, cwd=folder, start_new_session=True
        )
        try:
            until = time.monotonic() + 60
            while sum(n["Alive"] for n in ray.nodes()) < 2:
                assert node.poll() is None and time.monotonic() < until, "the second node did not start"
                time.sleep(0.2)
            job(images, out, Pool(shard_items=8))
        finally:
            ray.shutdown()
            os.killpg(node.pid, 9)
            cluster.shutdown()


def taken(images: str, out: str) -> None:
    """A cluster whose only CPU another job holds; patience is short."""
    watch.SAY_AFTER_S, watch.STALL_S = 6, 15

    @ray.remote(num_cpus=1)
    class Holder:
        def held(self) -> bool:
            return True

    with session(num_cpus=1):
        holder = Holder.remote()
        ray.get(holder.held.remote())
        job(images, out, Pool(shard_items=8, timeout=8))


def join(images: str, out: str) -> None:
    """On the cluster that RAY_ADDRESS names."""
    with session():
        job(images, out, Pool(shard_items=8))


if __name__ == "__main__":
    what, *args = sys.argv[1:]
    entry(lambda: {f.__name__: f for f in (planned, two, blind, taken, join)}[what](*args))
