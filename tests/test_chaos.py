"""A short part of the chaos tests (`make chaos` runs the whole): seeded, each fault proved to have fired."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

CHAOS = Path(__file__).parent / "chaos"
sys.path.insert(0, str(CHAOS))

import clocks  # noqa: E402
import disk  # noqa: E402
import judge  # noqa: E402
import kills  # noqa: E402
import nth  # noqa: E402
import small_jobs  # noqa: E402

from llmvis.cluster import jobs as engine  # noqa: E402
from llmvis.ledger import Packing  # noqa: E402

mounts = pytest.mark.skipif(not disk.may_mount(), reason="this process may not mount a small file system")


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> kills.Laboratory:
    return kills.Laboratory(tmp_path_factory.mktemp("chaos") / "laboratory")


@pytest.mark.parametrize("job", ["generate", "search"])
def test_kills_between_data_and_marker_and_of_actor_and_driver_lose_nothing(
    laboratory: kills.Laboratory, tmp_path: Path, job: str
) -> None:
    """Each driver has a Ray of its own here; `make chaos` has one for all, and kills its nodes too."""
    faults = [
        {"role": "commit", "point": "half data", "shard": 1},
        {"role": "commit", "point": "before marker", "shard": 4},
        {"role": "actor", "point": "end apply", "shard": 7},
        {"role": "prepare", "point": "end prepare", "shard": 9},
        {"role": "driver", "point": "before manifest", "shard": None},
    ]
    laid_out = [{"id": str(i), "do": "kill", **fault} for i, fault in enumerate(faults)]
    outcome = laboratory.run_engine(kills.Scenario(job=job, faults=laid_out), tmp_path / "out")
    assert len(outcome.fired) == 5 and outcome.reruns == 1, outcome
    assert outcome.good, outcome.verdict


def test_a_full_disk_in_a_worker_ends_the_job_with_words_and_it_goes_on(
    laboratory: kills.Laboratory, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    fault = {"id": "0", "role": "commit", "point": "half data", "shard": 6, "do": "disk full"}
    laboratory.lay_out([fault])
    run = laboratory.drive("encode", out)
    assert run.returncode == 1 and len(list((laboratory.faults / "fired").iterdir())) == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: {out}: No space left on device; make room"), run.stderr
    assert not (out / "manifest.json").exists()
    assert laboratory.drive("encode", out).returncode == 0
    assert judge.judge_job(out, laboratory.calm("encode")).good


@pytest.mark.parametrize(
    ("job", "point"),
    [
        ("index", "half vectors"), ("index-add", "before current"), ("index-add", "after current"),
        ("index-compact", "half building"), ("index-compact", "whole manifest"), ("index-delete", "half deleted"),
        ("index-delete", "before sweep"),
    ],
)  # fmt: skip
def test_an_index_killed_while_it_is_published_serves_on_and_the_rerun_completes_it(
    laboratory: kills.Laboratory, tmp_path: Path, job: str, point: str
) -> None:
    change(laboratory, job, {"driver": [point]}, tmp_path / "out")


def test_an_approximate_index_whose_driver_and_tasks_are_killed_is_built_as_without(
    laboratory: kills.Laboratory, tmp_path: Path
) -> None:
    """Tasks write its shards and lists; `make chaos` kills nodes, too."""
    points = {"driver": ["half trained"], "task": ["half vectors", "end sample", "whole lists"]}
    change(laboratory, "lists", points, tmp_path / "out")


def change(laboratory: kills.Laboratory, job: str, points: dict[str, list[str]], out: Path) -> None:
    if not (laboratory.work / "new").exists():
        laboratory.prepare_index()
    places = [(role, point) for role, some in points.items() for point in some]
    faults = [
        {"id": str(i), "role": role, "point": point, "shard": None, "do": "kill"}
        for i, (role, point) in enumerate(places)
    ]
    outcome = laboratory.run_index(kills.Scenario(job=job, faults=faults), out)
    assert len(outcome.fired) == len(faults), "a kill did not fire"
    assert outcome.good, outcome.verdict


@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
def test_any_call_to_the_file_system_may_fail(tmp_path: Path, for_ever: bool) -> None:
    for subject in nth.subjects(tmp_path):
        step = 15 if subject.name.startswith("lists") else 3
        found = nth.loop(subject, tmp_path / "runs", for_ever=for_ever, step=step, first=1 + for_ever)
        assert not found.wrong
        assert found.tried == -(-(found.calls - for_ever) // step), "a call was not reached"


@mounts
def test_a_disk_that_is_full_is_told_in_words_and_the_job_goes_on_with_room(tmp_path: Path) -> None:
    failed, done, wrong = disk.every_size(tmp_path, step=40)
    assert not wrong
    assert failed and done, "all or none of the sizes sufficed"


def test_wrong_clocks_spoil_neither_reports_nor_resumption(tmp_path: Path) -> None:
    assert not clocks.trouble(tmp_path)


def test_the_judge_sees_what_is_lost_twice_or_damaged(laboratory: kills.Laboratory, tmp_path: Path) -> None:
    """Of each kind one, so that silence means something."""
    calm, out = laboratory.calm("encode"), tmp_path / "out"
    shutil.copytree(calm, out)
    assert judge.judge_job(out, calm).good
    manifest = json.loads((out / "manifest.json").read_bytes())
    files = manifest["files"]
    for changed, part in ((files[1:], "lost"), ([*files, files[0]], "duplicated")):
        (out / "manifest.json").write_text(json.dumps({**manifest, "files": changed}))
        assert getattr(judge.judge_job(out, calm), part) == files[0]["rows"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "data" / ".aside-1").write_bytes(b"")
    assert "left behind" in str(judge.judge_job(out, calm))
    (out / files[0]["name"]).write_bytes(b"half")
    assert judge.judge_job(out, calm).unreadable == 1


def test_a_job_is_not_taken_for_finished_while_its_manifest_names_what_was_replaced(
    laboratory: kills.Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost file is made again, with other bytes, as by another Arrow; the run dies before its manifest."""
    out = tmp_path / "out"
    small_jobs.run_calmly("encode", laboratory.work, out)
    next((out / "data").iterdir()).unlink()
    with small_jobs.without_ray(), monkeypatch.context() as patched:
        patched.setattr(engine, "publish_manifest", dies)
        source, mapping = small_jobs.job_of("encode", laboratory.work)
        mapping = dataclasses.replace(mapping, packing=Packing(ending="parquet", pack=other_parquet))
        with pytest.raises(KeyboardInterrupt):
            engine.run_job(mapping, source, str(out), engine.Pool(), quiet=True)
    with small_jobs.without_ray():
        small_jobs.run_engine_job("encode", laboratory.work, out)
    assert judge.judge_job(out, laboratory.calm("encode")).good


def other_parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none")
    return bytes(sink.getvalue().to_pybytes())


def dies(*_: object) -> None:
    raise KeyboardInterrupt
