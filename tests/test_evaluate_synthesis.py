"""Scores of the synthesis tasks: formulas against hand-made numbers, controls, the command, actors on Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmvis.cluster.evaluate import on_actors
from llmvis.evaluation_synthesis import (
    METRICS,
    Judge,
    Rows,
    commonest,
    distortion,
    evaluate_reconstruct,
    frechet_distance,
    held_out,
    nearest,
    run_rows,
)
from llmvis.metrics import psnr
from llmvis.models.load import load_encoder
from llmvis.models.synthesizer_files import load_synthesizer
from llmvis.models.two_tower import load_two_tower
from llmvis.pictures import Pictures, Row
from llmvis.schema import UserError


def test_frechet_distance_is_that_of_the_formula() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 8)), rng.normal(size=(40, 8)) @ rng.normal(size=(8, 8)) + 1
    a, b = np.cov(x.T), np.cov(y.T)
    roots = np.sqrt(np.linalg.eigvals(a @ b).real.clip(0)).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b) - 2 * roots
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    few = rng.normal(size=(5, 30))  # fewer pictures than features
    assert frechet_distance(few, few + 2) == pytest.approx(4 * 30, rel=1e-9)


def test_distortion_of_a_known_error() -> None:
    real = np.full((2, 16, 16, 3), 100, np.uint8)
    off = real + 51  # a fifth of the range
    scores = distortion(off, real)
    assert scores["psnr"] == pytest.approx(10 * np.log10(25), abs=1e-4)
    assert scores["l1"] == pytest.approx(0.2, abs=1e-6)
    assert distortion(real, real) == {"psnr": pytest.approx(100), "ssim": pytest.approx(1), "l1": 0}
    assert psnr(np.zeros((1, 3)), np.ones((1, 3)))[0] == 0


def test_the_nearest_row_is_found() -> None:
    known = np.random.default_rng(0).integers(0, 255, (9, 4, 4, 3), dtype=np.uint8)
    assert nearest(known[[3, 7]], known).tolist() == [3, 7]


def test_the_constant_caption_is_the_first_of_the_commonest() -> None:
    words = [f"word {i}" for i in range(50)]
    assert commonest(words) == "word 0" and commonest([*words, "word 33"]) == "word 33"


def test_a_set_without_held_out_pictures_is_refused_in_words() -> None:
    rows = [Row(str(i), "", (), str(i), "train") for i in range(3)]
    with pytest.raises(UserError, match="of 3 pictures none is held out"):
        held_out(Pictures(np.zeros((3, 8, 8, 4), np.uint8), rows), None)


def test_reconstruction_is_scored_beside_its_controls() -> None:
    judge = Judge(load_encoder(), load_two_tower().model)

    def perfect(task: str, rows: Rows) -> list[Any]:
        assert task == "reconstruct" and rows.pictures is not None
        return list(rows.pictures)

    result = evaluate_reconstruct(32, perfect, judge, most=6)
    assert set(result["splits"]) == {"emoji", "twemoji", "openmoji", "openmoji-line", "fluent-flat"}
    assert result["psnr"] == pytest.approx(100) and result["fd_lite0"] == pytest.approx(0, abs=1e-6)
    assert max(control["psnr"] for control in result["controls"].values()) < 30
    assert result["grids"][0].captions


@pytest.mark.parametrize("task", ["reconstruct", "translate", "generate", "caption", "imagine", "enhance"])
def test_the_command_writes_figures_and_a_page_of_the_shipped_model(task: str, tmp_path: Path) -> None:
    figures, page = tmp_path / "figures.json", tmp_path / "page.html"
    command = [sys.executable, "-m", "jobs.evaluate", "--task", task, "--max-rows", "3"]
    done = subprocess.run(
        [*command, "--json", str(figures), "--html", str(page)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(figures.read_text(), parse_constant=no_number)
    wanted = {
        "reconstruct": {"psnr", "ssim", "fd_lite0"},
        "translate": {"psnr", "ssim", "l1", "fd_lite0"},
        "generate": {"r_at_1", "r_at_10", "fd_lite0"},
        "caption": {"token_accuracy", "r_at_10"},
        "imagine": {"r_at_1", "r_at_10"},
        "enhance": {"psnr", "ssim", "l1"},
    }[task]
    assert wanted <= result.keys() and result["task"] == task
    assert task == "imagine" or result["seconds"] > 0
    controls = result["controls"].values()
    assert all(set(control) & wanted for control in controls)
    for metric in set(METRICS) & result.keys() - {"seconds"}:
        assert any(metric in control for control in controls), f"{metric} has no control"
    assert page.read_text().count("<img") >= 3 and "<script" not in page.read_text()


def no_number(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_actors_on_ray_give_what_this_process_gives(ray_cluster: None) -> None:
    rows = Rows([f"picture {i}" for i in range(11)], None, list(range(11)))
    rows.how = type(rows.how)(steps=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    here = run_rows(load_synthesizer(), "generate", rows)
    torch.set_num_threads(threads)
    there = on_actors(None, actors=2)("generate", rows)
    assert len(there) == 11 and all((a == b).all() for a, b in zip(here, there, strict=True))
