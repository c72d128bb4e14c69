"""A job on three nodes, one of which is removed without notice while it works. Prints what was seen."""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

import ray
import tiny
from ray.cluster_utils import Cluster
from ray.util.state import list_actors

from llmvis.storage import LocalStore


def alive() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def main(images: str, out: str) -> None:
    quick = {
        "health_check_initial_delay_ms": 0,
        "health_check_period_ms": 300,
        "health_check_failure_threshold": 3,
    }
    cluster = Cluster(
        initialize_head=True, connect=True, head_node_args={"num_cpus": 1, "_system_config": quick}
    )
    workers = {node.node_id: node for node in [cluster.add_node(num_cpus=1) for _ in range(2)]}
    cluster.wait_for_nodes()
    before = alive()
    seen: dict[str, Any] = {}

    def remove() -> None:
        until = time.monotonic() + 120
        while len(LocalStore(out).names("_commits")) < 4 and time.monotonic() < until:
            time.sleep(0.01)
        models: list[str] = []
        while not set(models) & workers.keys() and time.monotonic() < until:  # they start when they can
            alive_actors = list_actors(filters=[("state", "=", "ALIVE")])
            models = [a.node_id for a in alive_actors if "ModelActor)" in a.class_name]
        victim = next(workers[node_id] for node_id in models if node_id in workers)
        seen["on_victim"] = models.count(victim.node_id)
        seen["commits_at_removal"] = len(LocalStore(out).names("_commits"))
        cluster.remove_node(victim, allow_graceful=False)

    remover = threading.Thread(target=remove, daemon=True)
    remover.start()
    tiny.run(images, out)
    remover.join()
    until = time.monotonic() + 30
    while alive() == before and time.monotonic() < until:
        time.sleep(0.1)
    print(json.dumps(seen | {"alive_before": before, "alive_after": alive()}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
