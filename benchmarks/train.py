"""What Ray Train costs: steps a second of a stage on one Ray worker over those of the bare loop.

Both do the same steps with the same data, evaluations and saved states, each in processes of its
own with the same number of threads, in turn, several times. `ratio` is of medians.

    python -m benchmarks.train --steps 120 --runs 3 --json train.json
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: int = 120
    """Steps of each run; the first line of metrics begins the time."""
    runs: int = 3
    """Times that each loop runs, in turn."""
    preset: str = "small"
    """Size of the model."""
    batch_size: int = 16
    """Rows of a batch."""
    max_rows: int = 100
    """Pictures of each part of the recipe."""
    folder: str = str(Path(tempfile.gettempdir()) / "llmvis-benchmark-train")
    """Where runs go; fitted pictures are kept between them."""
    json: str | None = None
    """Write the figures there."""


def rate(config: Config, workers: int) -> float:
    """Steps a second of the tokenise stage: on Ray with one worker, or bare with none."""
    out = Path(config.folder, f"workers-{workers}")
    for name in ("tokenizer", "train-tokenize"):
        shutil.rmtree(out / name, ignore_errors=True)
    command = [
        *(sys.executable, "-m", "jobs.train", "--stage", "tokenize", "--out", str(out)),
        *("--workers", str(workers), "--preset", config.preset, "--steps", str(config.steps)),
        *("--batch-size", str(config.batch_size), "--max-rows", str(config.max_rows)),
        *("--log-every", "10", "--save-every", "60", "--evaluate-every", str(10**6), "--threads", "1"),
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=env, capture_output=True)
    lines = [json.loads(line) for line in (out / "train-tokenize" / "metrics.jsonl").read_text().splitlines()]
    times = {line["step"]: line["time"] for line in lines if line["kind"] == "train"}
    first, last = min(times), max(times)
    return (last - first) / (times[last] - times[first])


def main(config: Config) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"bare": [], "ray": []}
    for run in range(config.runs):
        rates["bare"].append(rate(config, 0))
        rates["ray"].append(rate(config, 1))
        print(
            f"run {run + 1}: " + ", ".join(f"{k} {v[-1]:.3f} steps/s" for k, v in rates.items()), flush=True
        )
    median = {k: statistics.median(v) for k, v in rates.items()}
    figures = {
        "ratio": round(median["ray"] / median["bare"], 4),
        "steps_per_second": {k: round(v, 4) for k, v in median.items()},
        "runs": {k: [round(x, 4) for x in v] for k, v in rates.items()},
        "preset": config.preset,
        "batch_size": config.batch_size,
    }
    print(json.dumps(figures, indent=1))
    if config.json:
        Path(config.json).write_text(json.dumps(figures, indent=1) + "\n")
    return figures


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
