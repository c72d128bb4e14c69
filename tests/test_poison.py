"""Pictures that kill, hang or devour a worker are found out one by one, and the job ends with exact books."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import poison
import psutil
import pytest
import ray
import tiny

from llmvis.cluster.careful import item_limit, one_by_one
from llmvis.cluster.jobs import Pool
from llmvis.cluster.tally import BEGUN_ENOUGH, JobError, Manner, Tally, started_tally
from llmvis.ledger import read_data, read_manifest
from llmvis.schema import Reason
from llmvis.storage import LocalStore

BAD = ("00005.png", "00017.png", "00018.png")  # alone in a shard; two in a row in another; none in the third
REASONS = {
    "segfault": (Reason.CRASHED, "SIGSEGV"),
    "exit": (Reason.CRASHED, "status 3"),
    "sleep": (Reason.TIMEOUT, "longer than"),
    "native": (Reason.TIMEOUT, "longer than"),
    "regex": (Reason.TIMEOUT, "longer than"),
    "huge": (Reason.OUT_OF_MEMORY, "allocate"),
}


def check(out: Path, names: list[str], bad: tuple[str, ...], reason: Reason, detail: str, stage: str) -> None:
    store = LocalStore(out)
    manifest = read_manifest(store, "encode")
    dead = [row for file in manifest["dead"] for row in read_data(store, file).to_pylist()]
    written = [row["path"] for file in manifest["files"] for row in read_data(store, file).to_pylist()]
    assert sorted(row["source"] for row in dead) == sorted(bad)
    assert {row["reason"] for row in dead} == {str(reason)}
    assert {row["stage"] for row in dead} == {stage}
    assert all(detail in row["detail"] for row in dead), dead
    assert sorted(written) == sorted(set(names) - set(bad))
    ledger = manifest["ledger"]
    assert ledger["input"] == len(names) == ledger["written"] + ledger["dead_lettered"]


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        *(("prepare", fault) for fault in REASONS),
        ("model", "segfault"),
        ("model", "native"),
        ("model", "huge"),
    ],
)
def test_deadly_pictures_are_dead_letters_and_all_others_are_written(
    tmp_path: Path, ray_cluster: None, stage: str, fault: str
) -> None:
    names = tiny.pictures(tmp_path / "images", 24)
    faults: dict[str, Any] = {"prepare": {}, "model": {}, stage: dict.fromkeys(BAD, fault)}
    limit = 4.0 if REASONS[fault][0] == Reason.TIMEOUT else 60.0
    begun = time.monotonic()
    pool = Pool(shard_items=8, timeout=limit)
    poison.run(str(tmp_path / "images"), str(tmp_path / "out"), pool, **faults)
    check(tmp_path / "out", names, BAD, *REASONS[fault], {"prepare": "decode", "model": "model"}[stage])
    assert time.monotonic() - begun < 120


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group of 4 GB; a process is in it once its number stands in `cgroup.procs`."""
    v1 = Path("/sys/fs/cgroup/memory")
    folder = (v1 if v1.is_dir() else v1.parent) / f"llmvis-test-{uuid.uuid4().hex}"
    try:
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if v1.is_dir() else "memory.max")).write_text(str(4 * 10**9))
    except OSError:
        pytest.skip("no memory group is to be had")
    yield folder
    for pid in (folder / "cgroup.procs").read_text().split():
        psutil.Process(int(pid)).kill()
    until = time.monotonic() + 20
    while (folder / "cgroup.procs").read_text() and time.monotonic() < until:
        time.sleep(0.1)
    folder.rmdir()


@pytest.mark.parametrize("stage", ["prepare", "model"])
def test_a_picture_that_takes_all_memory_dies_alone(tmp_path: Path, memory_group: Path, stage: str) -> None:
    """The kernel ends the first tries, the child's own limit the last."""
    names = tiny.pictures(tmp_path / "images", 24)
    line = [sys.executable, str(Path(__file__).with_name("poison.py")), str(tmp_path / "images"),
            str(tmp_path / "out"), stage, "devour", BAD[0]]  # fmt: skip
    line = ["sh", "-c", f'echo $$ > {memory_group}/cgroup.procs && exec "$@"', "sh", *line]
    run = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    where = {"prepare": "decode", "model": "model"}[stage]
    check(tmp_path / "out", names, BAD[:1], Reason.OUT_OF_MEMORY, "half of what was left", where)


@pytest.mark.parametrize(("fault", "limit"), [("segfault", 60.0), ("native", 4.0)])
def test_a_model_that_cannot_be_loaded_ends_the_job_in_words(
    tmp_path: Path, ray_cluster: None, fault: str, limit: float
) -> None:
    names = tiny.pictures(tmp_path / "images", 24)
    images, out = str(tmp_path / "images"), str(tmp_path / "out")
    with pytest.raises(JobError, match="the model cannot be loaded"):
        poison.run(
            images, out, Pool(shard_items=8, actors=1, timeout=limit), prepare={}, model={"load": fault}
        )
    tiny.run(images, out)  # and goes on when the fault is gone
    assert read_manifest(LocalStore(out), "encode")["rows"] == len(names)


def test_one_death_is_taken_for_a_lost_node_and_two_for_a_deadly_item() -> None:
    tally = Tally(60)
    assert [tally.begin("model", 7) for _ in range(3)] == [Manner.WHOLE, Manner.WHOLE, Manner.CAREFUL]
    assert tally.begin("prepare", 7) == tally.begin("model", 8) == Manner.WHOLE  # each for itself
    assert [tally.begin("model", 7) for _ in range(3)] == [Manner.CAREFUL, Manner.CAREFUL, Manner.NOT]


def test_a_load_is_tried_three_times_and_a_hanging_one_twice() -> None:
    tally = Tally(60)
    assert [tally.begin("load", "a") for _ in range(4)] == [Manner.WHOLE] * 3 + [Manner.NOT]
    tally = Tally(0.01)
    for manner in (Manner.WHOLE, Manner.WHOLE, Manner.NOT):
        assert tally.begin("load", "a") == manner
        time.sleep(0.02)


def test_work_that_is_lost_after_it_was_done_is_no_death_but_not_for_ever() -> None:
    tally = Tally(60)
    for _ in range(BEGUN_ENOUGH):
        assert tally.begin("prepare", 0) == Manner.WHOLE
        tally.done("prepare", 0)
    assert tally.begin("prepare", 0) == Manner.NOT
    for _ in range(2 * BEGUN_ENOUGH):  # an actor that others' pictures kill loads as often as it must
        assert tally.begin("load", "actor") == Manner.WHOLE
        tally.done("load", "actor")


def test_a_worker_that_was_there_for_the_whole_limit_has_hung_and_is_believed_at_once() -> None:
    tally = Tally(0.05)
    assert tally.begin("model", 0) == Manner.WHOLE
    assert tally.working() == 1
    time.sleep(0.06)
    assert tally.working() == 0
    assert tally.begin("model", 0) == Manner.CAREFUL


def test_a_call_that_ray_repeats_counts_once() -> None:
    tally = Tally(60)
    assert {tally.begin("model", 7, "a") for _ in range(9)} == {Manner.WHOLE}
    assert [tally.begin("model", 7, call) for call in "bcc"] == [Manner.WHOLE, *[Manner.CAREFUL] * 2]


def test_deaths_are_remembered_when_the_tally_dies_with_them(ray_cluster: None) -> None:
    with started_tally(60) as tally:
        manners = [ray.get(tally.begin.remote("model", 7, f"{i}")) for i in range(2)]
        ray.kill(tally, no_restart=False)  # may be while it answers the next call, which then comes twice
        manners += [ray.get(tally.begin.remote("model", 7, f"{i}")) for i in range(2, 6)]
    assert manners == [Manner.WHOLE] * 2 + [Manner.CAREFUL] * 3 + [Manner.NOT]


class Grudge:
    """Dies at the first item after `bad`, whatever that is: the damage was done before."""

    def __init__(self) -> None:
        self.hurt = False

    def __call__(self, at: int) -> int:
        if self.hurt:
            poison.FAULTS["segfault"]()
        self.hurt = at == 2
        return at


def test_an_item_is_not_blamed_for_what_an_earlier_one_did_to_the_process() -> None:
    assert list(one_by_one(Grudge, 6, lambda i: (i,), limit=60)) == [0, 1, 2, 3, 4, 5]


def fussy(at: int) -> int:
    if at == 1:
        raise KeyError("a fault of ours")
    return at


def give_fussy() -> Any:
    return fussy


def test_a_fault_of_ours_is_raised_with_its_traceback_and_is_no_dead_letter() -> None:
    with pytest.raises(RuntimeError, match="a fault of ours"):
        list(one_by_one(give_fussy, 3, lambda i: (i,), limit=60))


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import test_poison, os\n"
        "from llmvis.cluster.careful import one_by_one\n"
        "for pid in one_by_one(test_poison.give_pid, 2, lambda i: (i,), limit=60): print(pid, flush=True)\n"
    )
    command = [sys.executable, "-c", code]
    parent = subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = int(parent.stdout.readline())
    assert psutil.pid_exists(child)
    parent.kill()
    parent.communicate()
    until = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "the child lives on"
        time.sleep(0.02)


def sleepy(at: int) -> int:
    if at:
        poison.FAULTS["native"]()  # with the GIL: no thread of Python's could end it
    return os.getpid()


def give_pid() -> Any:
    return sleepy


def test_an_item_has_five_times_its_share_of_the_limit_and_a_minute_at_least() -> None:
    assert item_limit(1800, 32) == 281.25
    assert item_limit(1800, 256) == 60
    assert item_limit(4, 256) == 4
    assert item_limit(1800, 1) == 1800
