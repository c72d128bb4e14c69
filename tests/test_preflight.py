"""What can't work is refused before the work, in words that say what to do; what stalls is diagnosed and ends."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
from heads import RAY
from s3_server import free_port

from llmvis.cluster.jobs import Pool, check_alone, run_job
from llmvis.preflight import PreflightError, cannot_fit, input_paths, spill_warning, unseen
from llmvis.sources import open_source
from llmvis.storage import LocalStore

TESTS = Path(__file__).parent
GIB = 2**30


def can_mount() -> bool:
    """Whether a mount namespace of our own is to be had: a container's root often may not."""
    return (
        bool(shutil.which("unshare"))
        and not subprocess.run(
            ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
        ).returncode
    )


mounts = pytest.mark.skipif(not can_mount(), reason="may not mount")


def driver(*args: object, mount: str | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """One of `nodes.py`'s drivers; `mount`: shell that is run before it, in a mount namespace."""
    line = [sys.executable, str(TESTS / "nodes.py"), *map(str, args)]
    if mount:
        line = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *line]
    known = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.run(line, env=known | env, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize(
    ("nodes", "actors", "gpus", "words"),
    [
        ([{"CPU": 8}], 8, 0, None),
        ([{"CPU": 1}], 1, 0, None),
        ([{"CPU": 2}], 4, 0, "Give --actors 3 at most"),  # four of them leave nothing to read with
        ([{"CPU": 8}], 1, 1, "--gpus-per-actor 0 keeps the model on CPUs"),
        ([{"CPU": 8, "GPU": 2}], 4, 1, "Give --actors 2 at most"),
        ([{"CPU": 8, "GPU": 2}], 8, 0.25, None),
        ([{"CPU": 8, "GPU": 2}], 4, 0.6, "Give --actors 2 at most"),  # one to a GPU: none lies across two
        ([{"CPU": 8}, {"CPU": 0, "GPU": 1}], 1, 1, "no node has that"),  # GPUs here, CPUs there
        ([{"CPU": 0}, {"CPU": 4, "GPU": 1}], 1, 1, None),
        ([{"CPU": 2, "GPU": math.inf}], 1, 1, None),
    ],
)
def test_a_plan_that_can_never_be_scheduled_is_refused_in_words(
    nodes: list[dict[str, float]], actors: int, gpus: float, words: str | None
) -> None:
    why = cannot_fit(nodes, actors=actors, gpus_per_actor=gpus, actor_cpus=0.5, task_cpus=0.4)
    assert why is None if words is None else words in (why or "")


def test_too_many_actors_for_this_machine_are_refused_by_a_plan_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    check_alone(Pool(), 1, 100)
    check_alone(Pool(actors=3), 2, 100)
    with pytest.raises(PreflightError, match="Give --actors 3 at most"):
        check_alone(Pool(actors=4), 2, 100)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # who knows what that has
    check_alone(Pool(actors=4), 2, 100)


def test_gpus_that_are_not_there_are_refused_before_the_work(tmp_path: Path, ray_cluster: None) -> None:
    tiny.pictures(tmp_path / "images", 2)
    source = open_source(str(tmp_path / "images"))
    with pytest.raises(PreflightError, match="--gpus-per-actor 0 keeps the model on CPUs"):
        run_job(tiny.mapping(source), source, str(tmp_path / "out"), Pool(gpus_per_actor=1), quiet=True)
    assert not LocalStore(tmp_path / "out").names("_commits")


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    tiny.pictures(tmp_path / "images", 2)
    (tmp_path / "out").write_text("a file")
    for how in ("dry", "run"):
        said = driver("planned", tmp_path / "images", tmp_path / "out", 100, how)
        assert said.returncode == 1 and "cannot write to" in said.stderr, said.stderr
        assert "Traceback" not in said.stderr


@mounts
def test_a_read_only_output_is_refused(tmp_path: Path) -> None:
    tiny.pictures(tmp_path / "images", 2)
    (tmp_path / "out").mkdir()
    mount = f"mount -o bind {tmp_path}/out {tmp_path}/out && mount -o remount,bind,ro {tmp_path}/out"
    for how in ("dry", "run"):
        said = driver("planned", tmp_path / "images", tmp_path / "out", 100, how, mount=mount)
        assert said.returncode == 1 and "error: cannot write to" in said.stderr, said.stderr


@mounts
def test_a_disk_that_is_too_small_is_refused_and_a_tight_one_warned_of(tmp_path: Path) -> None:
    tiny.pictures(tmp_path / "images", 24)
    (tmp_path / "out").mkdir()
    mount = f"mount -t tmpfs -o size=4m tmpfs {tmp_path}/out"
    for how in ("dry", "run"):
        said = driver("planned", tmp_path / "images", tmp_path / "out", 10**6, how, mount=mount)
        assert said.returncode == 1 and "needs about 24.0 MB more" in said.stderr, said.stderr
    said = driver("planned", tmp_path / "images", tmp_path / "out", 150_000, "dry", mount=mount)
    assert said.returncode == 0 and "needs about 3.6 MB, 4.2 MB free" in said.stdout, said.stdout
    assert "warning: " in said.stderr
    said = driver("planned", tmp_path / "images", tmp_path / "out", 100, "dry", mount=mount)
    assert said.returncode == 0 and "warning: " not in said.stderr


@mounts
def test_a_full_disk_is_an_error_in_words(tmp_path: Path) -> None:
    tiny.pictures(tmp_path / "images", 24)
    (tmp_path / "out").mkdir()
    fill = f"dd if=/dev/zero of={tmp_path}/out/data/fill bs=4k count=12 2>/dev/null"  # room for the lock
    mount = f"mount -t tmpfs -o size=64k tmpfs {tmp_path}/out && mkdir {tmp_path}/out/data && {fill}"
    said = driver("planned", tmp_path / "images", tmp_path / "out", 0, "run", mount=mount)
    assert said.returncode == 1 and "No space left on device; make room" in said.stderr, said.stderr
    assert "Traceback" not in said.stderr


def test_a_nearly_full_spill_disk_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage: Any = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        "shutil.disk_usage", lambda p: usage._replace(total=100 * GIB, used=91 * GIB, free=9 * GIB)
    )
    assert "set RAY_TMPDIR" in (spill_warning(tmp_path) or "")
    monkeypatch.setattr(
        "shutil.disk_usage", lambda p: usage._replace(total=100 * GIB, used=89 * GIB, free=11 * GIB)
    )
    assert spill_warning(tmp_path) is None


def test_nodes_that_do_not_see_a_folder_are_named() -> None:
    assert unseen({"a": [True, True], "b": [True, True]}, ["/out", "/in"]) is None
    why = unseen({"a": [True, True], "b": [False, True], "c": [False, False]}, ["/out", "/in"])
    assert why is not None and "/out is not there on 2 of 3 nodes (b, c)" in why
    assert "/in is not there on 1 of 3 nodes (c)" in why and "s3://" in why


def test_the_inputs_that_workers_read_are_those_of_masks_too() -> None:
    said = {"kind": "folder", "root": "/a", "image_root": "/b", "masks": {"kind": "folder", "root": "/c"}}
    assert list(input_paths(said)) == ["/a", "/b", "/c"]
    assert not list(input_paths({"kind": "prompts", "root": "/prompts.txt"}))
    assert not list(input_paths({"kind": "folder", "root": "s3://bucket/a"}))


def test_a_folder_that_all_nodes_see_is_taken(tmp_path: Path) -> None:
    tiny.pictures(tmp_path / "images", 8)
    said = driver("two", tmp_path / "images", tmp_path / "out")
    assert said.returncode == 0 and "done" in said.stdout, said.stderr
    assert not list((tmp_path / "out").glob(".aside*"))


@mounts
@pytest.mark.parametrize("hidden", ["out", "images"])
def test_a_node_that_does_not_see_a_folder_is_found_before_the_work(tmp_path: Path, hidden: str) -> None:
    tiny.pictures(tmp_path / "images", 8)
    (tmp_path / "out").mkdir()
    said = driver("blind", tmp_path / "images", tmp_path / "out", tmp_path / hidden)
    assert said.returncode == 1, said.stderr
    assert f"error: {tmp_path / hidden} is not there on 1 of 2 nodes" in said.stderr
    assert not LocalStore(tmp_path / "out").names("_commits")


def test_a_wait_for_what_others_hold_is_told_and_ends(tmp_path: Path) -> None:
    tiny.pictures(tmp_path / "images", 8)
    begun = time.monotonic()
    said = driver("taken", tmp_path / "images", tmp_path / "out")
    assert said.returncode == 1, said.stderr
    assert "nothing is at work for" in said.stderr
    assert "error: nothing could be run for" in said.stderr
    assert "the cluster has 1 CPUs, 0 GPUs, free 0 CPUs" in said.stderr
    assert time.monotonic() - begun < 120


def test_a_cluster_without_a_token_is_warned_of(tmp_path: Path) -> None:
    tiny.pictures(tmp_path / "images", 8)
    port = free_port()
    known = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_AUTH_MODE": "disabled"}
    start = [
        *RAY,
        "start",
        "--head",
        "--block",
        f"--port={port}",
        "--num-cpus=1",
        "--include-dashboard=false",
    ]
    with (tmp_path / "log").open("w") as log:
        head = subprocess.Popen(start, env=known, stdout=log, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 60
        while "Ray runtime started" not in (tmp_path / "log").read_text():
            assert head.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
            time.sleep(0.2)
        env = {"RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_AUTH_MODE": "disabled"}
        said = driver("join", tmp_path / "images", tmp_path / "out", **env)
        assert said.returncode == 0, said.stderr
        assert "warning: this cluster asks for no token" in said.stderr
        assert "RAY_AUTH_MODE=token" in said.stderr
    finally:
        for child in psutil.Process(head.pid).children(recursive=True):
            child.kill()
        head.wait(timeout=60)
