"""How much of the synthesis model's speed `jobs.translate` and `jobs.generate` keep.

Two loops over the same requests, in turn, several times: the bare model, on all cores, each
process with one thread and its model loaded; and the whole job, from reading to commit. `ratio`
is the job's rate over the bare loop's, from medians; a job's rate begins with its first shard, so
that starting Ray and loading models is in neither. `benchmarks.translate` and
`benchmarks.generate` are this for one job each.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from llmvis.cluster.session import KEEP_FREED_MEMORY, session
from llmvis.data import load_emoji
from llmvis.images import decode, square
from llmvis.models.load_synthesis import MakeOptions, load_synthesis

INSTRUCTION = "draw it as Twemoji"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to measure with."""

    pictures: int = 512
    """Requests of a run."""
    runs: int = 3
    """Times that both loops run, in turn."""
    model: str | None = None
    """As in the jobs."""
    folder: str = str(Path(tempfile.gettempdir()) / "llmvis-benchmark-bulk")
    """Where inputs and outputs go."""
    json: str | None = None
    """Write the figures there."""


def names(count: int) -> list[str]:
    """Prompts: names of the packaged collection, again from the first where they end."""
    known = load_emoji(columns=["caption"])["caption"].to_pylist()
    return [known[i % len(known)] + (f" {i // len(known)}" if i >= len(known) else "") for i in range(count)]


def write_pictures(folder: Path, count: int) -> None:
    """Pictures of the packaged collection as files; kept between calls."""
    if folder.is_dir() and len(list(folder.iterdir())) == count:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    emoji = load_emoji(columns=["image"])["image"].to_pylist()
    for i in range(count):
        (folder / f"{i:06}.png").write_bytes(emoji[i % len(emoji)]["bytes"])


def _work(part: int, parts: int, task: str, config: Config, ready: Any, go: Any) -> None:
    """One process of the bare loop: gets ready, waits for the others, does its share."""
    model = load_synthesis(config.model, MakeOptions(), task, threads=1)
    prompts = names(config.pictures)[part::parts]
    if task == "translate":
        emoji = load_emoji(columns=["image"])["image"].to_pylist()[:64]
        some = np.stack([np.asarray(square(decode(e["bytes"]).image, model.info.side)) for e in emoji])

        def loop(count: int) -> None:
            for at in range(0, count, 16):
                batch = some[np.arange(at, min(at + 16, count)) % len(some)]
                ids = [str(at + i) for i in range(len(batch))]
                model.translate(batch, [INSTRUCTION] * len(batch), seeds=[0] * len(batch), ids=ids)
    else:

        def loop(count: int) -> None:
            for at in range(0, count, 8):
                batch = prompts[at : min(at + 8, count)]
                model.generate(batch, negatives=[None] * len(batch), seeds=[0] * len(batch), ids=batch)

    loop(4)
    ready.release()
    go.wait()
    loop(len(prompts))


def bare_loop(task: str, config: Config) -> float:
    """Pictures a second of the bare model on all cores, start-up not counted."""
    context = mp.get_context("spawn")
    cores = os.cpu_count() or 1
    ready, go = context.Semaphore(0), context.Event()
    workers = [context.Process(target=_work, args=(i, cores, task, config, ready, go)) for i in range(cores)]
    with patch.dict(os.environ, {**KEEP_FREED_MEMORY, "OMP_NUM_THREADS": "1"}):  # as in the job
        for worker in workers:
            worker.start()
    for _ in workers:
        ready.acquire()
    begun = time.perf_counter()
    go.set()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    return config.pictures / (time.perf_counter() - begun)


def measure(task: str, config: Config, job: Callable[[Path, str, int], dict[str, Any]]) -> dict[str, Any]:
    """The figures, printed and written; `job(folder, name, pictures)` runs the whole job under `folder/name`."""
    rates: dict[str, list[float]] = {"bare": [], "job": []}
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for run in range(config.runs):
        rates["bare"].append(bare_loop(task, config))
        with session():
            for name, count in (("warm", 16), ("out", config.pictures)):
                shutil.rmtree(folder / name, ignore_errors=True)
                report = job(folder, name, count)
            assert report["ledger"]["written"] == config.pictures
            rates["job"].append(float(report["items_per_second"]))
        print(f"run {run + 1}: " + ", ".join(f"{k} {v[-1]:.2f}" for k, v in rates.items()), flush=True)
    median = {k: statistics.median(v) for k, v in rates.items()}
    figures = {
        "ratio": round(median["job"] / median["bare"], 4),
        "task": task,
        "pictures": config.pictures,
        "cores": os.cpu_count(),
        "pictures_per_second": {k: round(v, 2) for k, v in median.items()},
        "runs": {k: [round(x, 3) for x in v] for k, v in rates.items()},
    }
    print(json.dumps(figures, indent=1))
    if config.json:
        Path(config.json).write_text(json.dumps(figures, indent=1) + "\n")
    return figures
