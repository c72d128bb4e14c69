"""How much of the machine `jobs.encode` turns into embeddings.

Three loops over the same pictures, in turn, several times: decode alone, model alone, and
the job. Each uses all cores. The ceiling is the slower of the first two; `ratio` is
the job's rate over it, from medians. Where the same cores must decode and run the model, no job
can be faster than 1 / (1 / decode + 1 / model): `possible` is that rate over the ceiling. What
starts once a session (Ray's own actors, worker processes) is warm, as it is in the bare loops.

    python -m benchmarks.encode --images 5000 --runs 3 --json encode.json
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
import tyro
from PIL import Image

from jobs.encode import mapping
from llmvis.cluster.jobs import Pool, run_job
from llmvis.cluster.session import KEEP_FREED_MEMORY, session
from llmvis.config import EncodeConfig
from llmvis.data import load_emoji
from llmvis.images import decode
from llmvis.models.load import describe_encoder, load_encoder
from llmvis.sources import open_source


@dataclass(frozen=True, kw_only=True)
class Config:
    images: int = 5000
    """Pictures, made once: JPEG, an emoji on a coloured ground with noise."""
    side: int = 256
    """Their width and height, pixels: what img2dataset makes of a collection by default."""
    runs: int = 3
    """Times that each loop runs, in turn."""
    model: str | None = None
    """As in `jobs.encode`."""
    folder: str = str(Path(tempfile.gettempdir()) / "llmvis-benchmark")
    """Where pictures and outputs go."""
    json: str | None = None
    """Write the figures there."""


def _images(config: Config) -> Path:
    return Path(config.folder, f"images-{config.images}-{config.side}")


def make_pictures(folder: Path, count: int, side: int) -> None:
    """Deterministic; kept between calls."""
    if folder.is_dir() and len(list(folder.rglob("*.jpg"))) == count:
        return
    shutil.rmtree(folder, ignore_errors=True)
    emoji = [row["bytes"] for row in load_emoji(columns=["image"])["image"].to_pylist()]
    rng = np.random.default_rng(0)
    for i in range(count):
        ground = np.linspace(*rng.integers(0, 255, (2, 3)), side)[:, None] + rng.normal(0, 8, (side, side, 3))
        image = Image.fromarray(ground.clip(0, 255).astype(np.uint8))
        art = decode(emoji[i % len(emoji)]).image.resize((side // 2, side // 2))
        image.paste(art, (int(rng.integers(0, side // 2)), int(rng.integers(0, side // 2))))
        path = folder / f"{i // 1000:03}" / f"{i:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)


def _work(part: int, parts: int, kind: str, config: Config, ready: Any, go: Any) -> None:
    """One process of a bare loop: gets ready, waits for the others, does its share."""
    import torch

    torch.set_num_threads(1)
    info = describe_encoder(config.model)
    paths = sorted(_images(config).rglob("*.jpg"))[part::parts]
    if kind == "decode":

        def loop() -> None:
            for path in paths:
                info.preprocess(decode(path.read_bytes(), target=info.preprocess.side).image)
    else:
        encoder = load_encoder(config.model)
        some = [decode(p.read_bytes(), target=info.preprocess.side).image for p in paths[:256]]
        batch = np.stack([info.preprocess(image) for image in some])
        encoder.encode_images(batch[:32])

        def loop() -> None:
            for at in range(0, len(paths), 256):
                encoder.encode_images(batch[: len(paths) - at])

    ready.release()
    go.wait()
    loop()


def bare_loop(kind: str, config: Config) -> float:
    """Pictures a second of `decode` or `model` alone, on all cores, start-up not counted."""
    context = mp.get_context("spawn")
    cores = os.cpu_count() or 1
    ready, go = context.Semaphore(0), context.Event()
    workers = [context.Process(target=_work, args=(i, cores, kind, config, ready, go)) for i in range(cores)]
    with patch.dict(os.environ, KEEP_FREED_MEMORY):  # as in the job
        for worker in workers:
            worker.start()
    for _ in workers:
        ready.acquire()
    begun = time.perf_counter()
    go.set()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    return config.images / (time.perf_counter() - begun)


def job(config: Config, images: str, name: str) -> float:
    """Pictures a second of the job on a folder."""
    out = Path(config.folder, name)
    shutil.rmtree(out, ignore_errors=True)
    encode = EncodeConfig(images=images, out=str(out), model=config.model)
    source = open_source(images)
    report = run_job(
        mapping(encode, source, describe_encoder(config.model)), source, str(out), Pool(), quiet=True
    )
    assert report["ledger"]["written"] == report["ledger"]["input"]
    return float(report["items_per_second"])


def main(config: Config) -> dict[str, Any]:
    make_pictures(_images(config), config.images, config.side)
    rates: dict[str, list[float]] = {"decode": [], "model": [], "job": []}
    loops: dict[str, Callable[[], float]] = {k: lambda k=k: bare_loop(k, config) for k in ("decode", "model")}  # type: ignore[misc]
    for run in range(config.runs):
        for name, loop in loops.items():
            rates[name].append(loop())
        with session():
            job(config, str(_images(config) / "000"), "warm")
            rates["job"].append(job(config, str(_images(config)), "out"))
        print(f"run {run + 1}: " + ", ".join(f"{k} {v[-1]:.2f}" for k, v in rates.items()), flush=True)
    median = {k: statistics.median(v) for k, v in rates.items()}
    ceiling = min(median["decode"], median["model"])
    figures = {
        "ratio": round(median["job"] / ceiling, 4),
        "ceiling": "decode" if median["decode"] < median["model"] else "model",
        "images": config.images,
        "side": config.side,
        "cores": os.cpu_count(),
        "possible": round(1 / (1 / median["decode"] + 1 / median["model"]) / ceiling, 4),
        "images_per_second": {k: round(v, 2) for k, v in median.items()},
        "runs": {k: [round(x, 3) for x in v] for k, v in rates.items()},
    }
    print(json.dumps(figures, indent=1))
    if config.json:
        Path(config.json).write_text(json.dumps(figures, indent=1) + "\n")
    return figures


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
