"""Evaluation: pools and controls with a fake encoder, then the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llmvis.data import load_emoji
from llmvis.evaluation import EvaluateConfig, evaluate_retrieval, random_control, score, shuffled_control
from llmvis.models.preprocess import SquarePreprocess
from llmvis.models.protocols import EncoderInfo


class Oracle:
    """Knows every name in English: picture i and its English name get the same random direction."""

    def __init__(self) -> None:
        self.info = EncoderInfo(name="oracle", fingerprint="0", dim=32, preprocess=SquarePreprocess(size=8))
        rows = load_emoji().num_rows
        directions = np.random.default_rng(0).normal(size=(rows, 32)).astype(np.float32)
        self._directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
        self._names = {name: i for i, name in enumerate(load_emoji()["caption"].to_pylist())}
        self._next = 0

    def encode_images(self, images: np.ndarray) -> np.ndarray:
        self._next += len(images)
        return self._directions[self._next - len(images) : self._next]

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        return np.stack([self._directions[self._names.get(text, 0)] for text in texts])


def test_pools_controls_and_top_level_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LLMVIS_CACHE", str(tmp_path))  # no clip art here
    monkeypatch.delenv("LLMVIS_OPENCLIPART", raising=False)
    result = evaluate_retrieval(EvaluateConfig(task="retrieval", languages=("en", "ja")), Oracle())
    assert list(result["splits"]) == ["emoji", "en", "en_held_out", "ja", "ja_held_out"]
    assert result["r_at_1"] == result["splits"]["emoji"]["r_at_1"] == 100.0
    assert (
        result["splits"]["en"]["pool"] == 1898 and result["pool"] == result["splits"]["en_held_out"]["pool"]
    )
    assert result["splits"]["ja"]["r_at_10"] < 5.0  # the oracle knows no Japanese
    assert result["controls"]["shuffled"]["r_at_10"] < 10.0
    assert set(result["skipped"]) == {"mixed", "authors"}


def test_random_control_is_exact() -> None:
    control = random_control(200)
    assert (control["r_at_1"], control["r_at_10"], control["median_rank"]) == (0.5, 5.0, 100.5)


def test_shuffled_control_of_a_perfect_encoder_is_near_chance() -> None:
    rows = np.eye(200)
    assert score(rows, rows, [str(i) for i in range(200)])["r_at_1"] == 100.0
    assert shuffled_control(rows, rows)["r_at_1"] < 2.0


def test_a_picture_with_the_same_caption_is_no_wrong_answer() -> None:
    images = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]])
    texts = np.array([[1.0, 0.1], [1.0, 0.1], [0.0, 1.0]])
    assert score(texts, images, ["dog", "Dog", "cat"])["r_at_1"] == 100.0
    assert score(texts, images, ["dog", "hound", "cat"])["r_at_1"] < 100.0


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(ValueError, match="no names in xx: there are en, de"):
        evaluate_retrieval(EvaluateConfig(task="retrieval", languages=("xx",)), Oracle())


def test_the_command_writes_figures_of_the_shipped_model(tmp_path: Path) -> None:
    """On an installation with nothing but the embedded collection, as a newcomer has it."""
    file = tmp_path / "out" / "retrieval.json"
    command = [
        sys.executable,
        "-m",
        "jobs.evaluate",
        "--task",
        "retrieval",
        "--json",
        str(file),
        "--languages",
        "de",
    ]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**clean_environment(), "HOME": str(tmp_path), "COLUMNS": "120"},
    )
    assert run.returncode == 0, run.stderr
    assert "mixed: left out" in run.stdout
    told = json.loads(file.read_text())
    assert told["r_at_10"] >= 58.0  # 60.9 when it shipped
    assert 180 <= told["pool"] <= 200
    assert told["splits"]["de"]["r_at_10"] > 50.0
    assert told["controls"]["random"]["r_at_10"] < 6.0 and told["controls"]["shuffled"]["r_at_10"] < 15.0


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("LLMVIS_")}
