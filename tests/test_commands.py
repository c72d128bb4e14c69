"""The commands as a user types them, with real transformers checkpoints of random weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import hf_models
import pytest
import tiny
from PIL import Image

from llmvis.config import SearchConfig, parse
from llmvis.config_bulk import DatasetConfig, TranslateConfig

ROOT = Path(__file__).resolve().parent.parent


def llmvis(*args: str, expect: int | tuple[int, ...] = 0) -> subprocess.CompletedProcess[str]:
    """Runs `python -m …` in the checkout."""
    env = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    run = subprocess.run(
        [sys.executable, "-m", *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert run.returncode in (expect if isinstance(expect, tuple) else (expect,)), run.stderr
    return run


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pictures, encoded with a CLIP folder by the job and indexed by the job."""
    root = tmp_path_factory.mktemp("commands")
    tiny.pictures(root / "images", 30)
    (root / "images" / "00003.txt").write_text("<script>alert('three')</script>")
    (root / "images" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much")
    hf_models.save_clip(root / "clip")
    encode = llmvis("jobs.encode", "--images", f"{root}/images", "--out", f"{root}/enc", "--model", f"{root}/clip",
                    "--num-cpus", "2", "--json", f"{root}/report.json")  # fmt: skip
    assert "31 in = 30 written + 1 dead letters + 0 duplicates" in encode.stdout
    index = llmvis("jobs.index", "--embeddings", f"{root}/enc", "--out", f"{root}/idx")
    assert "30 vectors × 24" in index.stdout
    return root


def hits(work: Path, *args: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        llmvis("llmvis.cli", "search", "--index", f"{work}/idx", *args, "--json").stdout
    )
    return found


def test_the_report_says_where_the_time_went(work: Path) -> None:
    report = json.loads((work / "report.json").read_text())
    assert report["ledger"]["input"] == 31 and report["items_per_second"] > 0
    assert set(report["seconds"]) == {"list", "read", "decode", "model", "write"}


def test_a_text_gives_k_hits_as_json(work: Path) -> None:
    found = hits(work, "a red flower", "-k", "7")
    assert [h["rank"] for h in found] == list(range(1, 8))
    assert {"rank", "id", "score", "path", "caption"} <= found[0].keys()
    assert all(Path(h["path"]).is_file() for h in found)
    assert len(hits(work, "a red flower", "-k", "100")) == 30


def test_a_picture_finds_itself(work: Path) -> None:
    path = f"{work}/images/00011.png"
    (hit,) = hits(work, "--image", path, "-k", "1")
    assert Path(hit["path"]).name == "00011.png" and hit["score"] == pytest.approx(1, abs=1e-2)


def test_table_page_and_sheet(work: Path) -> None:
    page, sheet = work / "page.html", work / "sheet.png"
    run = llmvis("llmvis.cli", "search", "--index", f"{work}/idx", "flower", "--not", "dog", "--not", "cat", "-k", "30",
                 "--html", str(page), "--sheet", str(sheet))  # fmt: skip
    assert "rank" in run.stdout and "00007.png" in run.stdout.replace("\n", "")
    html = page.read_text()
    assert html.count("data:image/webp;base64,") == 30
    assert "<script>" not in html and "&lt;script&gt;" in html
    with Image.open(sheet) as image:
        assert image.width > 300


def test_dry_run_plans_and_writes_nothing(work: Path) -> None:
    run = llmvis("jobs.encode", "--images", f"{work}/images", "--out", f"{work}/none", "--dry-run",
                 "--model", f"{work}/clip", "--shard-items", "10")  # fmt: skip
    assert "31" in run.stdout and "4 of 10 items" in run.stdout
    assert not (work / "none").exists()


def test_mistakes_are_one_line_that_says_what_to_do(work: Path) -> None:
    other = hf_models.save_siglip(work / "siglip")
    cases = [
        (("jobs.encode", "--images", "nowhere", "--out", f"{work}/x"), "does not exist"),
        (("jobs.encode", "--images", f"{work}/images", "--out", f"{work}/x", "--model", "no/such"), "hf download"),
        (("jobs.encode", "--images", f"{work}/images", "--out", f"{work}/enc", "--model", str(other)), "another plan"),
        (("jobs.index", "--embeddings", f"{work}/images", "--out", f"{work}/x"), "folder of a finished encode job"),
        (("llmvis.cli", "search", "--index", f"{work}/enc", "x"), "is no index"),
        (("llmvis.cli", "search", "--index", f"{work}/idx", "x", "--model", str(other)), "was made with"),
        (("llmvis.cli", "search", "--index", f"{work}/idx"), "nothing to search for"),
        (("llmvis.cli", "search", "--index", f"{work}/idx", "x", "-k", "0"), "--k is 0"),
        (("llmvis.cli", "search", "--index", f"{work}/idx", "x", "--html", "."), "cannot be a file"),
        (("jobs.encode", "--images", "x", "--out", "y", "--num-cpus", "0"), "--num-cpus is 0"),
        (("jobs.encode", "--images", "x", "--out", "y", "--json", "/no/where"), "cannot be a file"),
        (("jobs.index", "--embeddings", f"{work}/enc", "--out", f"{work}/images"), "not empty"),
    ]  # fmt: skip
    for command, words in cases:
        run = llmvis(*command, expect=(1, 2))
        assert words in run.stderr, run.stderr
        assert "Traceback" not in run.stderr, run.stderr


def test_a_dry_run_over_a_job_says_how_far_it_is(work: Path) -> None:
    plan = ("jobs.encode", "--images", f"{work}/images", "--out", f"{work}/enc", "--dry-run", "--model")
    assert "1 of 1 shards are done" in llmvis(*plan, f"{work}/clip").stdout
    shutil.copytree(work / "clip", work / "same")  # a copy is the same model
    assert "1 of 1 shards are done" in llmvis(*plan, f"{work}/same").stdout
    other = hf_models.save_clip(work / "other", seed=1)
    assert "model_fingerprint is" in llmvis(*plan, str(other), expect=1).stderr


def test_a_name_with_escapes_does_not_reach_the_terminal(tmp_path: Path) -> None:
    evil = "e\x1b]0;PWNED\x07vil"
    run = llmvis("jobs.encode", "--images", evil, "--out", str(tmp_path / "x"), expect=1)
    assert "\x1b" not in run.stderr and "PWNED" in run.stderr


@pytest.mark.parametrize(
    "command",
    ["jobs.encode", "jobs.index", "jobs.train", "jobs.evaluate", "llmvis.cli search", "llmvis.cli demo"],
)
def test_every_command_has_help_with_examples(command: str) -> None:
    run = llmvis(*command.split(), "--help")
    assert "xample" in run.stdout and "usage" in run.stdout


def test_a_config_file_gives_values_that_flags_override(work: Path) -> None:
    file = work / "encode.yaml"
    file.write_text(
        f"images: {work}/images\nout: {work}/none\nmodel: {work}/clip\nshard-items: 7\ndry-run: true\n"
    )
    assert "5 of 7 items" in llmvis("jobs.encode", "--config", str(file)).stdout
    assert "2 of 20 items" in llmvis("jobs.encode", "--config", str(file), "--shard-items", "20").stdout
    file.write_text("imagse: x\n")
    assert "unknown imagse" in llmvis("jobs.encode", f"--config={file}", expect=1).stderr


def test_a_config_file_means_what_flags_mean(tmp_path: Path) -> None:
    def read(config: type[Any], text: str, *flags: str) -> Any:
        (tmp_path / "c.yaml").write_text(text)
        return parse(config, "prog", ["--config", str(tmp_path / "c.yaml"), *flags])

    text = "images: in\nout: made\ninstruction: grey\nseeds: 3\ncutout: true\nmodel: null\n"
    one = read(TranslateConfig, text)
    assert (one.instruction, one.seeds, one.cutout, one.model) == (("grey",), (3,), True, None)
    two = read(TranslateConfig, text, "--instruction", "mirror", "--seeds", "1", "2", "--no-cutout")
    assert (two.instruction, two.seeds, two.cutout) == (("mirror",), (1, 2), False)
    several = read(
        TranslateConfig, "images: in\nout: made\ninstruction: [grey, '-10 % contrast']\nseeds: [-1, 2]\n"
    )
    assert (several.instruction, several.seeds) == (("grey", "-10 % contrast"), (-1, 2))
    kept = read(DatasetConfig, "made: [a, b]\nout: set\nbest: 2\nblank: false\n", "--best", "3")
    assert (kept.made, kept.gates.best, kept.gates.blank) == (("a", "b"), 3, False)
    sought = read(SearchConfig, "text: a cup\nindex: idx\nnot: [red, blue]\nk: 3\n", "-k", "4")
    assert (sought.text, sought.not_, sought.k) == ("a cup", ("red", "blue"), 4)
    with pytest.raises(SystemExit):
        read(TranslateConfig, text + "actors: two\n")
