"""What the cluster says before the work: whether the plan can be run on it and its nodes see the folders.

Asks; `llmvis.preflight` judges. Nodes that come later are not asked.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from llmvis.cluster.session import warn
from llmvis.preflight import (
    PreflightError,
    cannot_fit,
    input_paths,
    local_folder,
    sample,
    spill_warning,
    unseen,
)
from llmvis.storage import open_store

ANSWER_S = 60.0


def check_cluster(
    out: str,
    source: dict[str, Any],
    *,
    actors: int,
    gpus_per_actor: float,
    actor_cpus: float,
    task_cpus: float,
) -> None:
    """Raises `PreflightError` for what can't work; warns on stderr of what may not.

    out: the job's output, in which a file may be made for a moment.
    source: what the source says of itself.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    why = cannot_fit(
        [node["Resources"] for node in nodes],
        actors=actors, gpus_per_actor=gpus_per_actor, actor_cpus=actor_cpus, task_cpus=task_cpus,
    )  # fmt: skip
    if why and not scales():
        raise PreflightError(why)
    if why:
        warn(f"as the cluster is now, {why}. It is left to its autoscaler")
    if full := spill_warning(spill_folder()):
        warn(full)
    if len(nodes) > 1:
        _check_paths(out, source, nodes)


def scales() -> bool:
    """Whether an autoscaler may add nodes: it gives nodes types, where Ray alone calls each by its id."""
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    nodes = [*status.active_nodes, *status.idle_nodes]
    return any(node.ray_node_type_name not in ("", f"node_{node.node_id}") for node in nodes)


def spill_folder() -> Path:
    """Where this machine's Ray keeps its session, and spills, unless told otherwise."""
    return Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray"


def _check_paths(out: str, source: dict[str, Any], nodes: Sequence[dict[str, Any]]) -> None:
    """A file with a new name is put into `out`; every node that can run tasks says whether it finds it."""
    folder = local_folder(out)
    samples = {path: sample(path) for path in input_paths(source)}
    paths = {path: found for path, found in samples.items() if found is not None}
    at_work = [node for node in nodes if node["Resources"].get("CPU", 0) > 0]
    name, word = f".aside-probe-{uuid.uuid4().hex}", uuid.uuid4().hex
    probes = [] if folder is None else [(str(folder / name), word)]
    if not paths and not probes:
        return
    store = open_store(out)
    if probes:
        store.write(name, word.encode())
    try:
        places = _asked(at_work, probes, list(paths.values()))
    finally:
        if probes:
            store.delete(name)
    if why := unseen(places, [*([str(folder)] if probes else []), *paths]):
        raise PreflightError(why)


def _asked(
    nodes: Sequence[dict[str, Any]], probes: list[tuple[str, str]], paths: list[str]
) -> dict[str, list[bool]]:
    """The answers by node; who does not answer is named on stderr and left out."""
    task = ray.remote(_seen)
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[task.options(num_cpus=0, scheduling_strategy=there).remote(probes, paths)] = node
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
    found: dict[str, list[bool]] = {}
    for ref, node in asked.items():
        name = f"{node['NodeManagerAddress']}, {node['NodeID'][:8]}"
        try:
            if ref not in answered:
                raise TimeoutError
            found[name] = ray.get(ref)
        except (RayError, TimeoutError):
            warn(
                f"the node {name} did not say within {ANSWER_S:.0f} s whether it sees the input and the output"
            )
    return found


def _seen(probes: list[tuple[str, str]], paths: list[str]) -> list[bool]:
    """A task: whether the probes are there with their words, and the paths are."""
    found = []
    for path, word in probes:
        try:
            found.append(Path(path).read_text() == word)
        except OSError:
            found.append(False)
    return [*found, *(os.path.exists(path) for path in paths)]  # noqa: PTH110 - no error for odd names
