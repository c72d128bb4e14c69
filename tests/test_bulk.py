"""Translate, generate and data sets as whole jobs with a tiny real model: rows, provenance, masks, exactly once."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import tiny_synthesis
from PIL import Image

from jobs import dataset, generate, translate
from llmvis.config_bulk import DatasetConfig, GenerateConfig, TranslateConfig
from llmvis.gates import GateConfig
from llmvis.ledger import read_data, read_manifest
from llmvis.plan import PlanError
from llmvis.schema import MAKERS, UserError
from llmvis.sources import SourceError, open_source
from llmvis.sources.made import MadeSource
from llmvis.storage import LocalStore

TESTS = Path(__file__).parent


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained synthesis model of 32 px, saved as training saves one."""
    return tiny_synthesis.save(tmp_path_factory.mktemp("model"))


def rows_of(out: Path | str) -> list[dict[str, Any]]:
    """Every row that the manifest names; the ledger must balance and data/ hold nothing else."""
    store = LocalStore(out)
    manifest = read_manifest(store, *MAKERS)
    ledger = manifest["ledger"]
    assert ledger["input"] == ledger["written"] + ledger["dead_lettered"] + ledger["duplicates"]
    assert store.names("data") == sorted(f["name"] for f in manifest["files"])
    rows = [row for file in manifest["files"] for row in read_data(store, file).to_pylist()]
    assert len(rows) == ledger["written"] == len({row["id"] for row in rows})
    return rows


def picture(row: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(row["image"]["bytes"]))


def test_each_picture_is_made_under_each_instruction_and_seed(
    tmp_path: Path, ray_cluster: None, model: str
) -> None:
    tiny.pictures(tmp_path / "in", 3)
    (tmp_path / "in" / "00001.txt").write_text("a noisy square")
    config = TranslateConfig(
        images=str(tmp_path / "in"), out=str(tmp_path / "out"), model=model,
        instruction=("draw it again: {caption}", "grey"), seeds=(0, 7),
    )  # fmt: skip
    translate.run(config)
    rows = rows_of(tmp_path / "out")
    assert Counter((r["source"], r["seed"]) for r in rows) == {
        (f"{i:05}.png", seed): 2 for i in range(3) for seed in (0, 7)
    }
    grey = [r for r in rows if r["prompt"] == "grey"]
    assert len(grey) == 6 and {r["model"] for r in grey} == {"pillow"}
    assert all(np.ptp(np.asarray(picture(r)), axis=2).max() == 0 and picture(r).size == (8, 8) for r in grey)
    made = [r for r in rows if r["model"] != "pillow"]
    assert {r["prompt"] for r in made} == {"draw it again", "draw it again: a noisy square"}
    assert {picture(r).size for r in made} == {(32, 32)} and {len(r["model_fingerprint"]) for r in made} == {
        64
    }
    assert (tmp_path / "out" / "README.md").is_file() and (tmp_path / "out" / "contact-sheet.png").is_file()


def test_a_finished_job_is_left_as_it_is_and_another_request_is_refused(
    tmp_path: Path, ray_cluster: None, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.pictures(tmp_path / "in", 2)
    config: dict[str, Any] = {"images": str(tmp_path / "in"), "out": str(tmp_path / "out")}
    translate.run(TranslateConfig(instruction=("mirror",), **config))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "data").iterdir()}
    translate.run(TranslateConfig(instruction=("mirror",), **config))
    assert "nothing to do" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "data").iterdir()}
    with pytest.raises(PlanError, match="variants"):
        translate.run(TranslateConfig(instruction=("invert",), **config))


def test_a_mask_keeps_what_is_outside_it_to_the_pixel(tmp_path: Path, ray_cluster: None, model: str) -> None:
    rng = np.random.default_rng(0)
    source = rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 20:45] = 255
    for folder, pixels in (("in", source), ("masks", mask)):
        (tmp_path / folder).mkdir()
        Image.fromarray(pixels).save(tmp_path / folder / "a.png")
    Image.fromarray(source).save(tmp_path / "in" / "unmasked.png")
    translate.run(
        TranslateConfig(
            images=str(tmp_path / "in"),
            out=str(tmp_path / "out"),
            model=model,
            mask=str(tmp_path / "masks"),
            instruction=("a red hat", "invert"),
            steps=2,
        )
    )
    rows = {r["prompt"]: np.asarray(picture(r)) for r in rows_of(tmp_path / "out")}
    for made in rows.values():
        np.testing.assert_array_equal(made[mask == 0], source[mask == 0])
    np.testing.assert_array_equal(rows["invert"][mask > 0], 255 - source[mask > 0])
    assert (rows["a red hat"][mask > 0] != source[mask > 0]).any()
    assert read_manifest(LocalStore(tmp_path / "out"), "translate")["ledger"]["dead_by_reason"] == {
        "missing": 2
    }


def test_instructions_come_from_a_column_and_the_users_columns_go_along(
    tmp_path: Path, ray_cluster: None
) -> None:
    names = tiny.pictures(tmp_path, 3)
    table = {"path": names, "how": ["mirror", None, "invert"], "seed": [5, 6, 7], "prompt": list("abc")}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    translate.run(
        TranslateConfig(
            images=str(tmp_path / "rows.parquet"), out=str(tmp_path / "out"), instruction_column="how"
        )
    )
    rows = rows_of(tmp_path / "out")
    assert [(r["prompt"], r["source_seed"], r["source_prompt"]) for r in rows] == [
        ("mirror", 5, "a"),
        ("invert", 7, "c"),
    ]
    assert read_manifest(LocalStore(tmp_path / "out"), "translate")["ledger"]["dead_by_reason"] == {
        "empty": 1
    }


def test_prompts_are_filled_counted_and_made_once(tmp_path: Path, ray_cluster: None, model: str) -> None:
    (tmp_path / "prompts.csv").write_text(
        "prompt,negative,topic\na {colour} star,,sky\na {colour} star,,sky\n,,none\na cloud,rain,sky\n"
    )
    config: dict[str, Any] = {"prompts": str(tmp_path / "prompts.csv"), "model": model, "steps": 2}
    config |= {"fill": ("colour=red,blue",), "variants": 2, "reference": 0.0}
    generate.run(GenerateConfig(out=str(tmp_path / "out"), **config))
    rows = rows_of(tmp_path / "out")
    assert {(r["prompt"], r["negative"], r["topic"]) for r in rows} == {
        ("a blue star", None, "sky"), ("a red star", None, "sky"), ("a cloud", "rain", "sky"),
    }  # fmt: skip
    ledger = read_manifest(LocalStore(tmp_path / "out"), "generate")["ledger"]
    assert (ledger["input"], ledger["written"], ledger["duplicates"]) == (12, 6, 4)
    assert ledger["dead_by_reason"] == {"empty": 2}
    again = tmp_path / "again"
    generate.run(GenerateConfig(out=str(again), shard_items=1, **config))
    assert {r["id"]: r["image"]["bytes"] for r in rows_of(again)} == {
        r["id"]: r["image"]["bytes"] for r in rows
    }


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"prompts": "a {thing}"}, "--fill thing=first,second"),
        ({"prompts": "missing.txt"}, "is no file"),
        ({"prompts": "a star", "fill": ("colour",)}, "write name=first,second"),
        ({"prompts": "a star", "model": "no/such"}, "no/such"),
    ],
)
def test_a_request_that_cannot_be_met_says_what_to_do(
    flags: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        generate.run(GenerateConfig(out=str(tmp_path / "out"), **flags))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"instruction": (" ",)}, "is empty"),
        ({"instruction": ("{captoin} in red",)}, "captoin.* stands for nothing"),
        ({"instruction": ("grey",), "region": " "}, "--region is empty"),
        ({"instruction": ("grey", "denoise"), "strength": 0.5}, "no instruction asks for it"),
        ({"instruction": ("grey",), "steps": 2}, "no instruction asks for it"),
    ],
)
def test_a_translation_that_cannot_mean_what_was_typed_is_refused(
    flags: dict[str, Any], says: str, tmp_path: Path
) -> None:
    tiny.pictures(tmp_path / "in", 1)
    with pytest.raises(UserError, match=says):
        translate.run(TranslateConfig(images=str(tmp_path / "in"), out=str(tmp_path / "out"), **flags))
    assert not (tmp_path / "out").exists()


def test_a_result_among_its_own_sources_is_refused(tmp_path: Path) -> None:
    """It would be a source of the next run, which then could not go on."""
    tiny.pictures(tmp_path / "in", 1)
    for out in ("in", "in/made", "in/../in/made"):
        config = TranslateConfig(
            images=str(tmp_path / "in"), out=str(tmp_path / out), instruction=("grey",), dry_run=True
        )
        with pytest.raises(UserError, match="would count as input"):
            translate.run(config)


def test_a_data_set_leaves_out_what_gates_refuse_and_says_why(tmp_path: Path, ray_cluster: None) -> None:
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "again": (255, 0, 0)}
    (tmp_path / "in").mkdir()
    for name, colour in colours.items():
        pixels = np.full((16, 16, 3), 255, np.uint8)
        pixels[4:12, 4:12] = colour
        Image.fromarray(pixels).save(tmp_path / "in" / f"{name}.png")
        (tmp_path / "in" / f"{name}.txt").write_text(f"a {name} square")
    Image.new("RGB", (16, 16), (9, 9, 9)).save(tmp_path / "in" / "blank.png")
    translate.run(
        TranslateConfig(
            images=str(tmp_path / "in"), out=str(tmp_path / "made"), instruction=("mirror", "rotate left")
        )
    )
    for form in ("parquet", "webdataset", "imagefolder"):
        out = tmp_path / form
        dataset.run(DatasetConfig(made=(str(tmp_path / "made"),), out=str(out), format=form))  # type: ignore[arg-type]
        manifest = read_manifest(
            LocalStore(out / "work" / "rows" if form == "imagefolder" else out), "dataset"
        )
        assert manifest["ledger"]["dead_by_reason"] == {"blank": 2, "duplicate_picture": 4}
        assert manifest["rows"] == 2
        assert "duplicate_picture" in (out / "README.md").read_text()
    kept = rows_of(tmp_path / "parquet")
    assert {r["caption"] for r in kept} <= {"a red square", "a green square", "a again square"}
    metadata = (tmp_path / "imagefolder" / "data" / "metadata.jsonl").read_text()
    listed = [json.loads(line) for line in metadata.splitlines()]
    assert {row["id"] for row in listed} == {row["id"] for row in kept}
    for form in ("parquet", "imagefolder"):  # pictures, and neither contact sheet nor scores
        again = open_source(str(tmp_path / form))
        assert {row["caption"] for table in again.listing() for row in table.to_pylist()} == {
            row["caption"] for row in kept
        }
        assert sum(map(len, MadeSource([str(tmp_path / form)]).listing())) == len(kept)
    with pytest.raises(SourceError, match="--format parquet"):
        open_source(str(tmp_path / "webdataset"))
    for file in ("manifest.json", "plan.json"):
        (tmp_path / "parquet" / file).unlink()
    with pytest.raises(SourceError, match="not finished"):  # its scores are no collection
        open_source(str(tmp_path / "parquet"))
    with pytest.raises(UserError, match="not finished"):
        MadeSource([str(tmp_path / "parquet")])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            {"gates": GateConfig(scorer="no_such_scorers:Mine", min_user_score=1)},
            "no module 'no_such_scorers'",
        ),
        ({"gates": GateConfig(in_index=0.9), "index": "no_such_index"}, "no_such_index"),
    ],
)
def test_who_judges_a_data_set_is_looked_for_before_the_work(
    flags: dict[str, Any], says: str, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.pictures(tmp_path / "in", 1)
    translate.run(TranslateConfig(images="in", out="made", instruction=("grey",)))
    with pytest.raises(UserError, match=says):
        dataset.run(DatasetConfig(made=("made",), out="set", **flags))
    assert not (tmp_path / "set").exists()


def test_gates_by_score_keep_the_best_of_each_group(tmp_path: Path, ray_cluster: None) -> None:
    tiny.pictures(tmp_path / "in", 4)
    asked = ("mirror", "invert", "20 % brighter")
    translate.run(TranslateConfig(images=str(tmp_path / "in"), out=str(tmp_path / "made"), instruction=asked))
    gates = GateConfig(best=1, duplicates=False, blank=False)
    dataset.run(DatasetConfig(made=(str(tmp_path / "made"),), out=str(tmp_path / "set"), gates=gates))
    rows = rows_of(tmp_path / "set")
    assert len(rows) == 4 == len({row["source_id"] for row in rows})
    assert read_manifest(LocalStore(tmp_path / "set"), "dataset")["ledger"]["dead_by_reason"] == {
        "not_best": 8
    }


def driver(*arguments: str) -> subprocess.Popen[bytes]:
    """The job in a process of its own, with its own Ray."""
    command = [sys.executable, str(TESTS / "tiny_synthesis.py"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_one_to_many_survives_kills_of_driver_actor_and_writer(tmp_path: Path) -> None:
    """200 sources × 3 instructions × 2 seeds: 1,200 rows, none twice, and the bytes of an unkilled run."""
    tiny.pictures(tmp_path / "in", 200)
    (tmp_path / "kills").mkdir()
    (tmp_path / "calm").mkdir()
    for fired in ("actor", "writer"):
        (tmp_path / "calm" / fired).touch()  # this one's processes live
    killed = (str(tmp_path / "in"), str(tmp_path / "out"), str(tmp_path / "kills"), "3")
    process = driver(*killed)
    until = time.monotonic() + 120
    while len(LocalStore(tmp_path / "out").names("_commits")) < 9:
        assert process.poll() is None and time.monotonic() < until, "no progress"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait(60) == -signal.SIGKILL
    assert not (tmp_path / "out" / "manifest.json").exists(), "the kill came too late to prove anything"
    assert driver(*killed).wait(240) == 0
    assert sorted(p.name for p in (tmp_path / "kills").iterdir()) == ["actor", "writer"], (
        "a kill did not fire"
    )
    rows = rows_of(tmp_path / "out")
    asked = Counter((r["source"], r["prompt"], r["seed"]) for r in rows)
    assert len(rows) == 1_200 == len(asked)
    assert driver(killed[0], str(tmp_path / "quiet"), str(tmp_path / "calm"), "3").wait(240) == 0
    quiet = {r["id"]: r["image"]["bytes"] for r in rows_of(tmp_path / "quiet")}
    assert {r["id"]: r["image"]["bytes"] for r in rows} == quiet
