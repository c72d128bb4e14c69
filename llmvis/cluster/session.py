"""Joining a Ray cluster, or starting one on this machine for the length of a command."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Before Ray is imported; a setting of the user comes first.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

import ray
import ray.data
from ray._private.authentication.authentication_utils import is_token_auth_enabled  # no public name

from llmvis.events import SETTING

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
    `ray job submit` sets `RAY_ADDRESS` for the scripts it starts. A cluster that asks for no token
    is warned of on stderr.
    """
    if ray.is_initialized():
        return False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    for chatty in ("data._internal.progress", "_private.authentication.authentication_token_setup"):
        logging.getLogger(f"ray.{chatty}").setLevel(logging.ERROR)  # warn of what is as it should be
    wanted = KEEP_FREED_MEMORY | {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}  # it prints every line twice
    env = {"env_vars": {k: v for k, v in wanted.items() if k not in os.environ}}
    env["env_vars"] |= {SETTING: os.environ[SETTING]} if SETTING in os.environ else {}
    if os.environ.get("RAY_ADDRESS", "local") != "local":
        ray.init(log_to_driver=True, logging_level=logging.WARNING, runtime_env=env)
        if not is_token_auth_enabled():
            warn(
                "this cluster asks for no token: who reaches its ports can run code on it. Start it with "
                "RAY_AUTH_MODE=token on every node (`ray get-auth-token --generate` makes the token; the README has "
                "the steps)"
            )
        return False
    _keep_token_private()
    ray.init(
        address="local",
        _node_ip_address="127.0.0.1",  # else Ray opens its metrics to the world
        num_cpus=num_cpus,
        include_dashboard=dashboard,
        logging_level=logging.WARNING,
        runtime_env=env,
    )
    _keep_token_private()
    return True


def _keep_token_private() -> None:
    """The user's token is for the user: Ray makes it readable for everybody on the machine."""
    file = Path.home() / ".ray" / "auth_token"
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if file.is_file() and file.stat().st_uid == os.getuid() and file.stat().st_mode & 0o077:
        file.chmod(0o600)


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


def warn(text: str) -> None:
    """A line on stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)
