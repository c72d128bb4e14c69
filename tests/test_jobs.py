"""The job engine: nothing lost, nothing twice, whatever is killed; every bad input has its reason."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import catalogue
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from PIL import Image

from llmvis.cluster.jobs import Pool, fit, run_job
from llmvis.images import MAX_BYTES, MAX_PIXELS
from llmvis.ledger import LedgerError, publish_manifest, publish_shard, read_data, read_manifest
from llmvis.plan import Plan, PlanError
from llmvis.schema import DEAD_LETTER, Reason, item_id
from llmvis.sources import SourceError, SourceOptions, open_source
from llmvis.storage import LocalStore, LockedError

TESTS = Path(__file__).parent


def check_whole(out: Path, names: list[str]) -> list[dict[str, Any]]:
    """Each of `names` exactly once; every file in data/ whole and named by the manifest."""
    store = LocalStore(out)
    manifest = read_manifest(store, "encode")
    rows = [row for file in manifest["files"] for row in read_data(store, file).to_pylist()]
    assert Counter(row["id"] for row in rows) == Counter(item_id(n.encode()) for n in names)
    assert store.names("data") == sorted(f["name"] for f in manifest["files"])
    for name in store.names("data"):
        pq.read_table(store.path(name))
    ledger = manifest["ledger"]
    assert ledger["input"] == ledger["written"] + ledger["dead_lettered"] + ledger["duplicates"]
    return rows


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


def test_every_bad_input_of_the_catalogue_gets_its_reason(tmp_path: Path, ray_cluster: None) -> None:
    images = tmp_path / "images"
    expected = catalogue.write(images)
    (images / "dangling.png").symlink_to("nowhere")
    os.mkfifo(images / "pipe.png")
    expected |= {"dangling.png": Reason.LINK, "pipe.png": Reason.UNREADABLE}
    report: Any = tiny.run(str(images), str(tmp_path / "out"), shard_items=16)
    store = LocalStore(tmp_path / "out")
    manifest = read_manifest(store, "encode")
    dead = {r["source"]: r["reason"] for f in manifest["dead"] for r in read_data(store, f).to_pylist()}
    good = {r["path"] for f in manifest["files"] for r in read_data(store, f).to_pylist()}
    assert dead == {name: str(reason) for name, reason in expected.items() if reason}
    assert good == {name for name, reason in expected.items() if reason is None}
    assert report["ledger"]["dead_by_reason"] == dict(sorted(Counter(dead.values()).items()))
    assert report["ledger"]["input"] == len(expected)


def test_the_catalogue_and_the_largest_pictures_stay_under_the_stated_memory(
    tmp_path: Path, ray_cluster: None
) -> None:
    """README: a decode task stays below 1.5 GiB with the default caps."""
    images, out = tmp_path / "images", str(tmp_path / "out")
    expected = catalogue.write(images)
    rgba = Image.new("RGBA", (9_400, 9_400), (200, 30, 30, 90))  # 88 million pixels, to be composited
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba.save(images / "large.png", compress_level=1, exif=exif)
    Image.new("I;16", (9_400, 9_400), 30_000).save(images / "large grey.png", compress_level=1)
    (images / "large bits.png").write_bytes(catalogue.bomb(9_000))
    source = open_source(str(images))
    mapping = tiny.mapping(source)
    prepare = dataclasses.replace(mapping.prepare, max_pixels=MAX_PIXELS, max_bytes=MAX_BYTES)  # type: ignore[type-var]
    watched = dataclasses.replace(mapping, prepare=tiny.Watched(prepare, str(tmp_path / "peaks")))
    report = run_job(watched, source, out, Pool(shard_items=16), quiet=True)
    bad = sum(reason is not None for reason in expected.values())
    assert report["ledger"]["written"] == len(expected) - bad + 3
    peaks = [int(line) for line in (tmp_path / "peaks").read_text().split()]
    assert len(peaks) >= 2 and max(peaks) > 2**29  # the large ones were decoded
    assert max(peaks) < 1.5 * 2**30


def test_rows_carry_caption_size_and_a_unit_vector(tmp_path: Path, ray_cluster: None) -> None:
    images = tmp_path / "images"
    tiny.pictures(images, 3)
    (images / "00000.txt").write_text("a caption\n")
    (images / "00001.txt").write_text("long " * 1000)
    tiny.run(str(images), str(tmp_path / "out"))
    rows = check_whole(tmp_path / "out", ["00000.png", "00001.png", "00002.png"])
    rows.sort(key=lambda r: r["path"])
    assert [r["caption"] and r["caption"][:9] for r in rows] == ["a caption", "long long", None]
    assert [(r["caption_truncated"], r["width"], r["height"]) for r in rows] == [
        (False, 8, 8),
        (True, 8, 8),
        (False, 8, 8),
    ]
    vectors = np.array([r["embedding"] for r in rows], np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)


def test_the_same_file_twice_is_one_row_and_counted(tmp_path: Path, ray_cluster: None) -> None:
    names = tiny.pictures(tmp_path, 5)
    pq.write_table(pa.table({"path": [*names, names[1], names[1], names[4]]}), tmp_path / "rows.parquet")
    report: Any = tiny.run(str(tmp_path / "rows.parquet"), str(tmp_path / "out"), shard_items=2)
    assert report["ledger"]["duplicates"] == 3
    check_whole(tmp_path / "out", names)


def test_an_empty_collection_is_refused(tmp_path: Path, ray_cluster: None) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "notes.md").write_text("x")
    with pytest.raises(SourceError, match=r"holds no pictures: 1 \.md files passed over"):
        tiny.run(str(tmp_path / "images"), str(tmp_path / "out"))


def test_a_good_row_is_not_lost_to_a_bad_one_with_its_key(tmp_path: Path, ray_cluster: None) -> None:
    tiny.pictures(tmp_path, 2)
    rows = pa.table({"path": ["gone.png", "00000.png", "00001.png"], "key": ["a", "a", "b"]})
    pq.write_table(rows, tmp_path / "rows.parquet")
    source = open_source(str(tmp_path / "rows.parquet"), SourceOptions(id_column="key"))
    report = run_job(tiny.mapping(source), source, str(tmp_path / "out"), Pool(), quiet=True)
    ledger = report["ledger"]
    assert (ledger["written"], ledger["dead_lettered"], ledger["duplicates"]) == (2, 0, 1)


def test_a_file_over_the_cap_is_not_read(tmp_path: Path, ray_cluster: None) -> None:
    tiny.pictures(tmp_path / "images", 2)
    with open(tmp_path / "images" / "film.png", "wb") as file:
        file.truncate(50 << 30)  # sparse: reading it would take all memory
    report: Any = tiny.run(str(tmp_path / "images"), str(tmp_path / "out"))
    assert report["ledger"]["dead_by_reason"] == {"too_large": 1}


def test_a_cluster_is_not_started_where_there_is_nothing_to_do(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.pictures(tmp_path / "images", 2)
    tiny.run(str(tmp_path / "images"), str(tmp_path / "out"))

    def refuse(num_cpus: int | None) -> None:
        raise AssertionError("a cluster was started")

    monkeypatch.setattr("llmvis.cluster.jobs.session", refuse)
    assert tiny.run(str(tmp_path / "images"), str(tmp_path / "out"))["already_done"]
    tiny.pictures(tmp_path / "images", 3)
    with pytest.raises(PlanError):
        tiny.run(str(tmp_path / "images"), str(tmp_path / "out"))
    with pytest.raises(AssertionError, match="a cluster was started"):  # it would have been seen
        tiny.run(str(tmp_path / "images"), str(tmp_path / "new"))


def test_a_lost_data_file_is_made_again(tmp_path: Path, ray_cluster: None) -> None:
    names = tiny.pictures(tmp_path / "images", 20)
    tiny.run(str(tmp_path / "images"), str(tmp_path / "out"))
    victim = next((tmp_path / "out" / "data").iterdir())
    victim.unlink()
    report: Any = tiny.run(str(tmp_path / "images"), str(tmp_path / "out"))
    assert report["shards_resumed"] == 2
    check_whole(tmp_path / "out", names)


def test_the_report_accounts_for_every_stage(tmp_path: Path, ray_cluster: None) -> None:
    tiny.pictures(tmp_path / "images", 20)
    report: Any = tiny.run(str(tmp_path / "images"), str(tmp_path / "out"))
    assert all(seconds > 0 for seconds in report["seconds"].values()), report["seconds"]


def test_a_finished_job_runs_no_model_and_changes_no_byte(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.pictures(tmp_path / "images", 20)
    tiny.run(str(tmp_path / "images"), str(tmp_path / "out"))
    before = snapshot(tmp_path / "out")
    monkeypatch.setattr("llmvis.cluster.jobs._run_shards", lambda *a: pytest.fail("worked again"))
    report: Any = tiny.run(str(tmp_path / "images"), str(tmp_path / "out"))
    assert report["already_done"]
    assert snapshot(tmp_path / "out") == before


def test_other_input_or_settings_are_refused_by_name(tmp_path: Path, ray_cluster: None) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    tiny.pictures(images, 10)
    tiny.run(str(images), str(out))
    (images / "00003.txt").write_text("a caption that was not there")
    with pytest.raises(PlanError, match=r"changed: 00003\.png"):
        tiny.run(str(images), str(out))
    (images / "00003.txt").unlink()
    (images / "00007.png").write_bytes((images / "00001.png").read_bytes() + b"longer")
    with pytest.raises(PlanError, match=r"changed: 00007\.png"):
        tiny.run(str(images), str(out))
    tiny.pictures(images, 11)
    with pytest.raises(PlanError, match="11 items, were 10"):
        tiny.run(str(images), str(out))
    (tmp_path / "other").mkdir()
    with pytest.raises(PlanError, match="not empty"):
        tiny.run(str(tmp_path / "other"), str(images))


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    with LocalStore(tmp_path / "out").lock(), pytest.raises(LockedError, match="in use by process"):
        tiny.run(str(tmp_path), str(tmp_path / "out"))


def test_books_that_do_not_balance_are_not_published(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    rows, dead = pa.table({"id": ["a"]}), DEAD_LETTER.empty_table()
    with pytest.raises(LedgerError):
        publish_shard(store, 0, rows, dead, items=2, duplicates=0, seconds={}, started=0)
    publish_shard(store, 0, rows, dead, items=1, duplicates=0, seconds={}, started=0)
    counts = {"items": 2, "duplicates": 0, "bad": 0, "bytes": 0, "shards": 1, "shard_items": 2}
    plan = Plan(job="x", fingerprint="", parts={"source": {}}, **counts)
    with pytest.raises(LedgerError):
        publish_manifest(store, plan, {})
    assert not store.exists("manifest.json")


def driver(images: Path, out: Path, calls: Path, delay: float = 0.05) -> subprocess.Popen[str]:
    """The job in a process group of its own, with its own Ray."""
    env = {**os.environ, "TINY_CALLS": str(calls), "TINY_DELAY": str(delay)}
    command = [sys.executable, str(TESTS / "tiny.py"), str(images), str(out)]
    with calls.with_suffix(".log").open("w") as log:  # a pipe that nobody reads would fill up
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log, text=True)


def wait_for_commits(out: Path, count: int, process: subprocess.Popen[str], seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while len(LocalStore(out).names("_commits")) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "no progress"
        time.sleep(0.002)


def last_json(said: str) -> str:
    """The last line that is an object: Ray prints what its workers say to stdout, too."""
    return [line for line in said.splitlines() if line.startswith("{")][-1]


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out = process.communicate(timeout=180)[0]
    assert process.returncode == 0, out
    report: dict[str, Any] = json.loads(last_json(out))
    return report


def calls_of(path: Path) -> list[tuple[int, int]]:
    return [(int(a), int(b)) for a, b in (line.split() for line in path.read_text().splitlines())]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_driver_killed_at_a_random_moment_goes_on(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    images, out, calls = tmp_path / "images", tmp_path / "out", tmp_path / "calls"
    names = tiny.pictures(images, 240)  # 30 shards
    process = driver(images, out, calls)
    wait_for_commits(out, rng.randint(1, 20), process)
    time.sleep(rng.random() * 0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "manifest.json").exists(), "the kill came too late to prove anything"
    done = len(LocalStore(out).names("_commits"))
    report = finish(driver(images, out, calls))
    assert report["shards_resumed"] >= done
    check_whole(out, names)
    assert not list(out.rglob(".aside-*"))


def test_a_killed_actor_is_replaced_and_its_shard_done_once(tmp_path: Path) -> None:
    images, out, calls = tmp_path / "images", tmp_path / "out", tmp_path / "calls"
    names = tiny.pictures(images, 240)
    process = driver(images, out, calls, delay=0.1)
    wait_for_commits(out, 3, process)
    victim = calls_of(calls)[-1][0]
    os.kill(victim, signal.SIGKILL)
    at = len(calls_of(calls))
    finish(process)
    assert not Path(f"/proc/{victim}").exists()
    assert victim not in {pid for pid, _ in calls_of(calls)[at + 1 :]}, "the kill did not fire"
    check_whole(out, names)


def test_a_node_removed_in_mid_job_is_made_up_for(tmp_path: Path) -> None:
    names = tiny.pictures(tmp_path / "images", 320)
    env = {**os.environ, "TINY_DELAY": "0.2"}
    command = [sys.executable, str(TESTS / "three_nodes.py"), str(tmp_path / "images"), str(tmp_path / "out")]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    said = json.loads(last_json(run.stdout))
    assert said["alive_before"] == 3 and said["alive_after"] == 2
    assert 0 < said["commits_at_removal"] < 40
    assert said["on_victim"] > 0, "the node had nothing to lose"
    check_whole(tmp_path / "out", names)


@pytest.mark.parametrize(
    ("pool", "cpus", "gpus", "shards", "expected"),
    [
        (Pool(), 8, 0, 100, (8, 0)),
        (Pool(), 8, 0, 3, (3, 0)),
        (Pool(), 8, 2, 100, (2, 1)),
        (Pool(gpus_per_actor=0.25), 8, 2, 100, (8, 0.25)),
        (Pool(gpus_per_actor=0), 8, 2, 100, (8, 0)),
        (Pool(actors=1), 8, 0, 100, (1, 0)),
        (Pool(actors=4, gpus_per_actor=1), 1, 0, 100, (4, 1)),  # nodes that are still to come
    ],
)
def test_a_pool_fits_the_cluster_or_is_taken_at_its_word(
    pool: Pool, cpus: int, gpus: float, shards: int, expected: tuple[int, float]
) -> None:
    assert fit(pool, cpus, gpus, shards) == expected
