"""Joining a Ray cluster, or starting one on this machine for the length of a command."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

# Before Ray is imported; a setting of the user comes first.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import ray.data

KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}
"""Environment of the workers. By default glibc gives large blocks back to the system at once, and
Ray runs tasks in a thread, whose own arena it trims in any case: each activation of each batch
then lies on fresh pages, a third of the time of a CNN on a CPU (benchmarks/LOG.md)."""


def connect(num_cpus: int | None = None, dashboard: bool = False) -> bool:
    """Joins the cluster that `RAY_ADDRESS` names, else starts one here; True if it was started.

    A local one has a dashboard only if asked for (Ray Train wants one: without it, it complains
    every second), on loopback; it answers only those who hold the user's token (Ray makes
    it in `~/.ray/auth_token`), and uses all CPUs unless `num_cpus` says otherwise.
    `ray job submit` sets `RAY_ADDRESS` for the scripts it starts.
    """
    if ray.is_initialized():
        return False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    for chatty in ("data._internal.progress", "_private.authentication.authentication_token_setup"):
        logging.getLogger(f"ray.{chatty}").setLevel(logging.ERROR)  # warn of what is as it should be
    wanted = KEEP_FREED_MEMORY | {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}  # it prints every line twice
    env = {"env_vars": {k: v for k, v in wanted.items() if k not in os.environ}}
    if os.environ.get("RAY_ADDRESS", "local") != "local":
        ray.init(log_to_driver=True, logging_level=logging.WARNING, runtime_env=env)
        return False
    ray.init(
        address="local",
        num_cpus=num_cpus,
        include_dashboard=dashboard,
        logging_level=logging.WARNING,
        runtime_env=env,
    )
    return True


@contextmanager
def session(num_cpus: int | None = None, dashboard: bool = False) -> Iterator[None]:
    """`connect` for a block; a cluster that was started for it is stopped after it."""
    started = connect(num_cpus, dashboard)
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def resources() -> tuple[int, float]:
    """Whole CPUs (at least 1) and GPUs of the cluster as it is now."""
    total = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return max(1, int(total.get("CPU", 1))), float(total.get("GPU", 0))
