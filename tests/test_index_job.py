"""`jobs.index` on Ray: as in one process, whatever dies in between; compaction, drift, and what it refuses."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from test_approximate import DIM, MODEL, PICTURES, brute_force, found, table, texts, unit
from test_preflight import driver

from jobs import index as index_job
from llmvis import indexing
from llmvis.cleanup import clean
from llmvis.cluster.tally import JobError
from llmvis.cluster.tasks import on_cluster
from llmvis.config import IndexConfig
from llmvis.index import delete, drift, in_turn, open_index, planner, read_info
from llmvis.inspection import inspect_folder
from llmvis.ledger import parquet_bytes
from llmvis.schema import UserError
from llmvis.storage import LocalStore, sha256_bytes

ROWS, FILE_ROWS, SHARD_ROWS = 4000, 150, 1000


def encode_output(folder: Path, first: int, stop: int) -> None:
    """What `jobs.encode` leaves, as far as an index reads it."""
    store, files = LocalStore(folder), []
    for number, at in enumerate(range(first, stop, FILE_ROWS)):
        rows = table(at, min(at + FILE_ROWS, stop))
        data = parquet_bytes(rows)
        store.write(name := f"data/{number:06}.parquet", data)
        files.append({"name": name, "rows": rows.num_rows, "bytes": len(data), "sha256": sha256_bytes(data)})
    about = {
        "format": 1,
        "job": "encode",
        "rows": stop - first,
        "model": MODEL,
        "source": {"root": folder.name},
    }
    store.write_json("manifest.json", {**about, "files": files})


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "SHARD_ROWS", SHARD_ROWS)
    monkeypatch.setattr(planner, "MOST_SHARDS", 1000)


def run(out: Path, enc: Path | None, **flags: Any) -> dict[str, Any]:
    return index_job.run(IndexConfig(embeddings=enc and str(enc), out=str(out), **flags))


# tasks


class MishapError(Exception):
    pass


def fussy(item: tuple[str, str]) -> str:
    what, mark = item
    if what == "fault":
        raise MishapError("of ours")
    if what == "die for ever" or (what == "die once" and not os.path.exists(mark)):
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return what


def test_a_task_whose_worker_dies_is_run_again(tmp_path: Path, ray_cluster: None) -> None:
    items = [(f"{i}", "") for i in range(9)] + [("die once", str(tmp_path / "mark"))]
    done = dict(on_cluster(fussy, items, what="test"))
    assert done == {place: item[0] for place, item in enumerate(items)}
    assert (tmp_path / "mark").exists()


def test_an_error_in_a_task_is_the_driver_s_and_the_rest_is_not_waited_for(ray_cluster: None) -> None:
    with pytest.raises(MishapError, match="of ours"):
        list(on_cluster(fussy, [("fault", "")] + [("0", "")] * 50, what="test"))
    assert list(on_cluster(cores, [0], what="alone", alone=True)) == [(0, 2.0)]
    with pytest.raises(JobError, match="again and again over test, item 0"):
        list(on_cluster(fussy, [("die for ever", os.devnull)], what="test"))


def cores(_: int) -> float:
    return float(ray.get_runtime_context().get_assigned_resources()["CPU"])


# the job


@pytest.mark.parametrize("kind", ["flat", "ivf_sq8", "ivf_rabitq"])
def test_what_ray_builds_is_byte_for_byte_what_one_process_builds(
    tmp_path: Path, kind: Any, small_shards: None, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_output(tmp_path / "enc", 0, ROWS)
    report = run(tmp_path / "ray", tmp_path / "enc", kind=kind, recall=0.95)
    assert report["ledger"]["indexed"] == report["rows"] == ROWS
    monkeypatch.setattr(index_job, "on_cluster", index_job.in_turn)
    run(tmp_path / "here", tmp_path / "enc", kind=kind, recall=0.95)
    one, other = (read_info(str(tmp_path / name)) for name in ("ray", "here"))
    assert len(one["shards"]) == 4 and one == other


DRIVER = """
import sys
import test_index_job as t
from llmvis.index import planner
planner.SHARD_ROWS, planner.MOST_SHARDS = t.SHARD_ROWS, 1000
t.run(t.Path(sys.argv[1]), t.Path(sys.argv[2]), kind="ivf_sq8", recall=0.95, num_cpus=2, add=sys.argv[3] == "add")
"""


@pytest.mark.parametrize("mode", ["build", "add"])
def test_a_driver_killed_among_its_tasks_leaves_the_old_version_and_the_rerun_completes(
    tmp_path: Path, mode: str, small_shards: None
) -> None:
    out = tmp_path / "idx"
    encode_output(tmp_path / "old", 0, 600)
    run(out, tmp_path / "old", kind="ivf_sq8", recall=0.95)
    encode_output(tmp_path / "new", 300, ROWS)
    command = [sys.executable, "-c", DRIVER, str(out), str(tmp_path / "new"), mode]
    with subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True) as driver:
        until = time.monotonic() + 60
        while not (out / "shards/building.json").exists():
            assert driver.poll() is None and time.monotonic() < until
            time.sleep(0.005)
        os.kill(driver.pid, signal.SIGKILL)
    with open_index(str(out)) as index:
        assert index.rows == 600
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    first = 0 if mode == "add" else 300
    with open_index(str(out)) as index:
        assert index.rows == ROWS - first
        assert index.ids() == {f"id{row}" for row in range(first, ROWS)}
        queries = texts(np.arange(first, ROWS, 17), 8)
        true = brute_force(queries, 10, np.arange(first, ROWS)) - first
        np.testing.assert_array_equal(index.search(queries, 10, exact=True)[1], true)
        alike = PICTURES[first:ROWS:17]  # it was tuned on pictures: its captions' model is not here
        true = brute_force(alike, 10, np.arange(first, ROWS)) - first
        assert found(index.search(alike, 10)[1], true) >= 0.93
    assert inspect_folder(str(out), check_hashes=True)["healthy"]
    assert not (out / "shards/building.json").exists()


def test_an_index_is_built_on_two_nodes_that_see_its_folders_and_refused_on_one_that_does_not(
    tmp_path: Path,
) -> None:
    encode_output(tmp_path / "enc", 0, ROWS)
    said = driver("two", tmp_path / "enc", tmp_path / "idx")
    assert said.returncode == 0, said.stderr
    with open_index(str(tmp_path / "idx")) as index:
        assert index.rows == ROWS and len(index.manifest["shards"]) == 4
    said = driver("blind", tmp_path / "enc", tmp_path / "other", tmp_path / "enc")
    assert said.returncode == 1 and f"error: {tmp_path / 'enc'} is not there on 1 of 2 nodes" in said.stderr
    assert not (tmp_path / "other" / "CURRENT").exists()


def test_what_a_task_that_died_left_unfinished_is_cleared_by_the_run_that_went_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def each(function: Any, items: Any, **named: Any) -> Iterator[tuple[int, Any]]:
        (tmp_path / "idx" / f".aside-{named['what']}").mkdir(parents=True)
        return in_turn(function, items, **named)

    encode_output(tmp_path / "enc", 0, 300)
    monkeypatch.setattr(index_job, "in_turn", each)
    run(tmp_path / "idx", tmp_path / "enc", kind="ivf_sq8", recall=0.9)
    assert not clean(str(tmp_path / "idx"))


def test_an_index_that_took_another_s_place_is_asked_anew_what_it_has(tmp_path: Path) -> None:
    """By one process that adds to both."""
    for name, first, stop in (("a", 0, 300), ("b", 300, 500), ("c", 0, 300)):
        encode_output(tmp_path / name, first, stop)
    for first in ("a", "b"):
        shutil.rmtree(tmp_path / "idx", ignore_errors=True)
        run(tmp_path / "idx", tmp_path / first)
        report = run(tmp_path / "idx", tmp_path / "c", add=True)
    assert (report["new"], report["already_there"]) == (300, 0)


def test_an_index_is_compacted_to_another_kind_and_back(tmp_path: Path, small_shards: None) -> None:
    for name, first, stop in (("a", 0, 700), ("b", 500, 800), ("c", 800, 900)):
        encode_output(tmp_path / name, first, stop)
        run(tmp_path / "idx", tmp_path / name, add=name != "a")
    assert [shard["rows"] for shard in read_info(str(tmp_path / "idx"))["shards"]] == [700, 100, 100]
    report = run(tmp_path / "idx", None, compact=True, kind="ivf_sq8", recall=0.9)
    assert (report["kind"], report["rows"], report["new"]) == ("ivf_sq8", 900, 900)
    built = read_info(str(tmp_path / "idx"))
    assert [shard["rows"] for shard in built["shards"]] == [700, 100, 100], "a shard is of one source"
    assert [source["root"] for source in built["sources"]] == ["a", "b", "c"]
    with open_index(str(tmp_path / "idx")) as index:
        queries = texts(np.arange(0, 900, 7), 2)
        np.testing.assert_array_equal(
            index.search(queries, 10, exact=True)[1], brute_force(queries, 10, np.arange(900))
        )
        assert index.metadata(np.array([750]))[0]["id"] == "id750"
    trained = built["trained"]["sha256"]
    run(tmp_path / "idx", None, compact=True)
    assert read_info(str(tmp_path / "idx"))["trained"]["sha256"] == trained, "not trained anew unasked"
    assert run(tmp_path / "idx", None, compact=True, kind="flat")["kind"] == "flat"


def test_what_is_added_from_afar_is_noticed_and_retraining_mends_it(tmp_path: Path) -> None:
    near, far = unit(PICTURES[:2000]), unit(np.random.default_rng(5).standard_normal((1500, DIM)))

    def write(folder: Path, vectors: np.ndarray, first: int) -> None:
        encode_output(folder, first, first + len(vectors))  # a manifest, whose one file is of these vectors
        flat = pa.array(vectors.astype(np.float16).reshape(-1))
        ids = [f"id{first + i}" for i in range(len(vectors))]
        data = parquet_bytes(pa.table({"id": ids, "embedding": pa.FixedSizeListArray.from_arrays(flat, DIM)}))
        store = LocalStore(folder)
        store.write("data/all.parquet", data)
        file = {
            "name": "data/all.parquet",
            "rows": len(ids),
            "bytes": len(data),
            "sha256": sha256_bytes(data),
        }
        store.write_json("manifest.json", {**store.read_json("manifest.json"), "files": [file]})

    out = tmp_path / "idx"
    write(tmp_path / "near", near[:1500], 0)
    assert run(out, tmp_path / "near", kind="ivf_sq8", recall=0.9)["drift"]["why"] is None
    write(tmp_path / "like", near[1500:], 1500)
    same = run(out, tmp_path / "like", add=True)["drift"]
    assert same["why"] is None and 0.9 < same["distance"] < 1.2
    write(tmp_path / "far", far, 2000)
    report = run(out, tmp_path / "far", add=True)
    assert report["drift"]["distance"] > 1.3 and "times as far" in report["drift"]["why"]
    (line,) = report["advice"]
    assert line.endswith(f"python -m jobs.index --out {out} --compact --retrain")
    mended = run(out, None, compact=True, retrain=True)
    assert mended["drift"]["why"] is None and mended["advice"] == []


def test_a_ledger_that_does_not_balance_is_an_error_of_ours() -> None:
    built: dict[str, Any] = {
        "rows": 3,
        "shards": [],
        "version": 1,
        "model": {"name": "", "dim": 2},
        "kind": "flat",
    }
    assert indexing.report(built, 1, 4, Counter(indexed=2, known=1, zero=1), "")["new"] == 2
    for before, rows in ((1, 5), (2, 4)):
        with pytest.raises(AssertionError):
            indexing.report(built, before, rows, Counter(indexed=2, known=1, zero=1), "")
    assert drift(built) is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({}, "give --embeddings"),
        ({"embeddings": "x", "compact": True}, "give --embeddings"),
        ({"compact": True, "add": True}, "leave --add"),
        ({"embeddings": "x", "retrain": True}, "goes with --compact"),
        ({"embeddings": "x", "recall": 0.0}, "it is a share"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        IndexConfig(out="idx", **flags)


def test_an_emptied_index_is_compacted_to_nothing_and_grows_again(tmp_path: Path) -> None:
    encode_output(tmp_path / "enc", 0, 300)
    out = tmp_path / "idx"
    run(out, tmp_path / "enc", kind="ivf_sq8", recall=0.9)
    delete(LocalStore(out), where="mille >= 0")
    report = run(out, None, compact=True)
    assert (report["rows"], report["kind"], report["bytes"]) == (0, "flat", 0)
    with open_index(str(out)) as index:
        assert index.search(texts(np.arange(3), 1), 5)[1].shape == (3, 0)
    assert run(out, tmp_path / "enc", add=True)["rows"] == 300
