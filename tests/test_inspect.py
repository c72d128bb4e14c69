"""What `llmvis inspect` and `llmvis gc` say and do, on real jobs and indexes, whole, running and damaged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from jobs import index as index_job
from llmvis import cli
from llmvis.cleanup import clean
from llmvis.config import IndexConfig
from llmvis.config_ops import InspectConfig, RetryConfig
from llmvis.index import open_index
from llmvis.inspection import inspect_folder
from llmvis.seeds import copy_seeds
from llmvis.storage import LocalStore, LockedError, StorageError

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """A folder with `enc`, a job of 20 pictures with 2 dead ones, and `idx`, its index."""
    root = tmp_path_factory.mktemp("made")
    tiny.pictures(root / "images", 20)
    (root / "images" / "00003.png").write_bytes(b"<html>")
    (root / "images" / "line\nbreak.png").write_bytes(b"")
    tiny.run(str(root / "images"), str(root / "loop" / "enc"))
    index_job.run(IndexConfig(embeddings=str(root / "loop" / "enc"), out=str(root / "loop" / "idx")))
    return root


@pytest.fixture
def enc(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "loop" / "enc", tmp_path / "enc"))


@pytest.fixture
def idx(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "loop" / "idx", tmp_path / "idx"))


def part(folder: Path, **flags: Any) -> dict[str, Any]:
    (found,) = inspect_folder(str(folder), **flags)["parts"]
    return dict(found)


def test_a_finished_job_is_whole_and_accounted_for(enc: Path) -> None:
    found = part(enc, check_hashes=True)
    assert (found["kind"], found["job"], found["state"], found["problems"]) == (
        "job",
        "encode",
        "finished",
        [],
    )
    assert (
        found["plan"]["items"] == 21 and found["progress"]["shards_done"] == found["progress"]["shards"] == 3
    )
    ledger = found["ledger"]
    assert ledger["balances"] and (ledger["input"], ledger["written"], ledger["dead_lettered"]) == (21, 19, 2)
    assert {letters["reason"]: letters["count"] for letters in found["dead"]} == {
        "empty": 1,
        "not_an_image": 1,
    }
    assert (
        found["dead"][0]["examples"] and found["files"]["data"] == 3 and found["files"]["unreferenced"] == 0
    )
    assert found["seconds"]["model"] > 0 and found["owner"] is None


def test_names_are_shown_escaped_and_json_is_json(enc: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.run_inspect(InspectConfig(path=str(enc)))
    said = capsys.readouterr().out
    assert r"line\nbreak.png" in said and "balances" in said and "finished" in said
    cli.run_inspect(InspectConfig(path=str(enc), json=True))
    assert json.loads(capsys.readouterr().out)["healthy"] is True


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def first(folder: Path) -> Path:
    return min(folder.iterdir())


DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "a marker cut off": (lambda f: cut(f / "_commits/000001.json"), "000001.json", "delete that file"),
    "a marker of another kind": (lambda f: (f / "_commits/000001.json").write_text("{}"), "000001", "delete that file"),
    "a marker that points out": (
        lambda f: (f / "_commits/000001.json").write_text(
            (f / "_commits/000001.json").read_text().replace("data/", "../data/")
        ),
        "000001",
        "delete that file",
    ),
    "a data file gone": (lambda f: first(f / "data").unlink(), "is missing", "same command"),
    "a data file cut off": (lambda f: cut(first(f / "data")), "were written", "same command"),
    "the manifest cut off": (lambda f: cut(f / "manifest.json"), "manifest.json", "delete that file"),
    "books that do not balance": (
        lambda f: (f / "manifest.json").write_text(
            (f / "manifest.json").read_text().replace('"duplicates": 0', '"duplicates": 1')
        ),
        "does not balance",
        "delete that file",
    ),
    "the plan cut off": (lambda f: cut(f / "plan.json"), "plan.json", "new --out"),
    "a plan of another kind": (lambda f: (f / "plan.json").write_text('{"job": 1, "fingerprint": 2, "format": 1}'),
                               "no plan of ours", "new --out"),
    "the plan gone": (lambda f: (f / "plan.json").unlink(), "no plan.json", "new --out"),
    "the listing gone": (lambda f: shutil.rmtree(f / "plan"), "plan/00000.parquet is missing", "new --out"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_with_what_to_do_and_not_cleaned_away(
    enc: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    harm, what, do = DAMAGE[damage]
    harm(enc)
    (problem, *_) = part(enc)["problems"]
    assert what in problem["what"] and do in problem["do"]
    assert part(enc)["state"] != "retry"
    with pytest.raises(SystemExit) as end:
        cli.run_inspect(InspectConfig(path=str(enc)))
    assert end.value.code == 1 and "damaged" in capsys.readouterr().out
    before = {p for p in enc.rglob("*") if p.name != ".lock"}
    try:
        clean(str(enc))
    except StorageError as error:
        assert "nothing is removed" in str(error)
    assert {p for p in enc.rglob("*") if p.name != ".lock"} == before


def test_what_to_do_about_a_damaged_marker_mends_the_job(made: Path, enc: Path, ray_cluster: None) -> None:
    marker = enc / "_commits/000001.json"
    cut(marker)
    marker.unlink()  # what inspect says to do
    tiny.run(str(made / "images"), str(enc))
    assert part(enc)["problems"] == [] and part(enc)["state"] == "finished"


def test_flipped_bits_are_seen_by_their_hash(enc: Path, idx: Path) -> None:
    for folder, file in ((enc, first(enc / "data")), (idx, idx / "shards/000001-00000.npy")):
        data = bytearray(file.read_bytes())
        data[-9] ^= 1
        file.write_bytes(data)
        assert part(folder)["problems"] == []
        (problem,) = part(folder, check_hashes=True)["problems"]
        assert file.name in problem["what"] and "sha256" in problem["what"]


@pytest.mark.parametrize("kind", ["missing", "empty", "foreign"])
def test_a_folder_that_is_none_of_ours_is_said_to_be_that(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "x"
    if kind != "missing":
        folder.mkdir()
    if kind == "foreign":
        (folder / "holiday.png").write_bytes(b"x")
    found = part(folder)
    assert found["state"] == kind and found["problems"][0]["do"]
    with pytest.raises(StorageError, match="nothing is removed"):
        clean(str(folder))
    assert folder.exists() == (kind != "missing") and len(list(tmp_path.rglob("*"))) == (
        kind != "missing"
    ) + (kind == "foreign")


def test_an_index_is_whole_or_said_to_be_damaged(idx: Path) -> None:
    found = part(idx, check_hashes=True)
    assert (found["kind"], found["state"], found["rows"], found["version"]) == ("index", "finished", 19, 1)
    assert found["model"]["name"] == "tiny" and all(f["there"] for s in found["shards"] for f in s["files"])
    (idx / "shards/000001-00000.arrow").unlink()
    assert "000001-00000.arrow is missing" in part(idx)["problems"][0]["what"]
    cut(idx / "CURRENT")
    found = part(idx)
    assert found["state"] == "damaged" and "CURRENT" in found["problems"][0]["what"]
    with pytest.raises(StorageError, match="CURRENT"):
        clean(str(idx))


def test_a_loop_is_looked_through_step_by_step(made: Path, tmp_path: Path) -> None:
    found = inspect_folder(str(made / "loop"))
    assert found["healthy"] and [(p["name"], p["kind"]) for p in found["parts"]] == [
        ("enc", "job"),
        ("idx", "index"),
    ]
    assert clean(str(made / "loop")) == []
    loop = Path(shutil.copytree(made / "loop", tmp_path / "loop"))
    (loop / "thesis.tex").write_text("mine")
    with pytest.raises(StorageError, match=r"other things \(thesis.tex"):
        clean(str(loop))


def test_a_job_that_is_killed_is_running_then_stopped(tmp_path: Path) -> None:
    tiny.pictures(tmp_path / "images", 240)
    out = tmp_path / "out"
    command = [sys.executable, str(TESTS / "tiny.py"), str(tmp_path / "images"), str(out)]
    with (tmp_path / "log").open("w") as log:
        driver = subprocess.Popen(command, env={**os.environ, "TINY_DELAY": "0.2"}, stdout=log, stderr=log)
    try:
        until = time.monotonic() + 120
        while len(LocalStore(out).names("_commits")) < 3:
            assert driver.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
            if out.exists():
                inspect_folder(str(out))  # at any moment
            time.sleep(0.05)
        found = part(out)
        assert found["state"] == "running" and str(driver.pid) in found["owner"] and found["problems"] == []
        assert found["progress"]["items_per_second"] > 0 and found["progress"]["seconds_left"] > 0
        assert found["ledger"]["so_far"] and found["ledger"]["balances"]
        with pytest.raises(LockedError, match=str(driver.pid)):
            clean(str(out))
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    found = part(out)
    assert found["state"] == "stopped" and found["owner"] is None and found["problems"] == []


def test_what_killed_writers_and_retries_left_is_removed_and_nothing_else(
    made: Path, enc: Path, ray_cluster: None
) -> None:
    whole = {p for p in enc.rglob("*") if p.name != ".lock"}
    stale = [
        enc / "data/.aside-1",
        enc / "data/000009-abc.parquet",
        enc / "dead/.aside-2",
        enc / ".aside-plan-x/plan",
    ]
    for path in stale:
        path.mkdir(parents=True) if path.name == "plan" else path.write_bytes(b"12345")
    (enc / "mine.txt").write_text("not ours, and not touched")
    assert part(enc)["files"]["unreferenced"] == 3
    listed = clean(str(enc), dry_run=True)
    assert all(path.exists() for path in stale) and sum(stray.bytes for stray in listed) == 15
    assert {stray.name for stray in listed} == {
        "data/.aside-1", "data/000009-abc.parquet", "dead/.aside-2", ".aside-plan-x",
    }  # fmt: skip
    assert clean(str(enc)) == listed
    assert {p for p in enc.rglob("*") if p.name not in (".lock", "mine.txt")} == whole
    assert part(enc, check_hashes=True)["problems"] == []


def test_a_retry_is_shown_and_what_it_replaced_goes_with_gc(tmp_path: Path, ray_cluster: None) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    tiny.pictures(images, 20)
    good = (images / "00003.png").read_bytes()
    (images / "00003.png").write_bytes(b"")
    tiny.run(str(images), str(out))
    (images / "00003.png").write_bytes(good)
    cli.run_retry(RetryConfig(path=str(out), dead=True, reason=("empty",)))
    found = part(out)
    assert found["state"] == "retry" and found["problems"] == [] and found["ledger"]["written"] == 19
    assert found["dead"][0]["examples"], "the letters of the last result are still to be seen"
    assert clean(str(out)) == [], "readers still need the last result"
    tiny.run(str(images), str(out))
    assert part(out)["state"] == "finished" and part(out)["ledger"]["written"] == 20
    assert sorted(s.name.partition("/")[0] for s in clean(str(out))) == ["data", "dead"]
    assert part(out, check_hashes=True)["problems"] == []


def test_old_versions_of_an_index_go_and_an_open_reader_keeps_its_own(made: Path, idx: Path) -> None:
    enc = str(made / "loop" / "enc")
    index_job.run(IndexConfig(embeddings=enc, out=str(idx)))
    with open_index(str(idx)) as old:
        index_job.run(IndexConfig(embeddings=enc, out=str(idx)))
        assert part(idx)["kept"] == [2, 3]
        assert clean(str(idx)) == []
        assert {s.name.partition("/")[0] for s in clean(str(idx), keep=1)} == {"manifests", "shards"}
        assert part(idx)["kept"] == [3] and part(idx, check_hashes=True)["problems"] == []
        assert len(old.ids()) == 19 and old.search(tiny.unit(tiny.np.ones((1, 48), "f4")), 3)[0].shape == (
            1,
            3,
        )


def test_copied_seeds_are_a_finished_job(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmvis.seeds.load_encoder", tiny.load)
    copy_seeds(str(made / "loop" / "idx"), ["red"], 3, str(tmp_path / "seeds"))
    found = part(tmp_path / "seeds", check_hashes=True)
    assert (found["job"], found["state"], found["problems"]) == ("seeds", "finished", [])
    assert found["ledger"]["written"] == 3
    assert clean(str(tmp_path / "seeds")) == []
    with pytest.raises(StorageError, match="no job with a plan"):
        cli.run_retry(RetryConfig(path=str(tmp_path / "seeds"), dead=True))


def test_an_index_is_made_of_the_kind_asked_for_with_its_curve(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enc, out, plot = str(made / "loop" / "enc"), str(tmp_path / "idx"), tmp_path / "curve.png"
    report = index_job.run(IndexConfig(embeddings=enc, out=out, kind="ivf_sq8", plot=str(plot)))
    assert report["kind"] == "ivf_sq8" and plot.read_bytes().startswith(b"\x89PNG")
    assert report["tuned"]["queries_are"] == "pictures, a proxy", "no model of that name is here"
    assert "recall@10 1.000" in capsys.readouterr().out
    cli.run_inspect(InspectConfig(path=out, verify=True))
    assert "ivf_sq8, recall@10 1.000 of 0.97 asked for" in capsys.readouterr().out
    assert index_job.run(IndexConfig(embeddings=enc, out=out, add=True))["already_there"] == 19
    with pytest.raises(ValueError, match="keeps its kind"):
        index_job.run(IndexConfig(embeddings=enc, out=out, add=True, kind="flat"))
    assert index_job.run(IndexConfig(embeddings=enc, out=out, kind="ivf_rabitq", dry_run=True)) == {}
    assert "1 lists, recall 0.97: asked for" in capsys.readouterr().out
