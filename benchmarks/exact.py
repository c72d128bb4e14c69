"""How near exact search comes to what the machine can do.

Many queries are held against a bare float32 matrix product of the same shape, one query against reading the
same bytes, measured in the same run, in turn. `ratio` is the smallest of the three shares; on a processor that
multiplies in bfloat16 batches may be quicker than the product. Times of a shared machine differ from run to
run: medians, and ceilings beside them. torch is loaded, as it is wherever texts are read.

    python -m benchmarks.exact --rows 100000 --json exact.json
"""

from __future__ import annotations

import json
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from benchmarks.index import Config as IndexConfig
from benchmarks.index import make
from benchmarks.synthetic import Collection, median, seconds
from llmvis.index import Index
from llmvis.index.exact import use_threads


@dataclass(frozen=True, kw_only=True)
class Config:
    rows: int = 100_000
    """Vectors."""
    dim: int = 512
    """Their dimensions."""
    runs: int = 5
    """Times that each is measured; medians count."""
    json: str | None = None
    """Write the figures there."""


def figures_of(index: Index, collection: Collection, config: Config) -> dict[str, Any]:
    pictures, figures = collection.pictures, dict[str, Any]()
    for count in (1024, 64):
        queries = collection.texts(np.arange(count) % config.rows, 2)
        product = np.empty((count, 8192), np.float32)

        def sgemm(queries: np.ndarray = queries, product: np.ndarray = product) -> None:
            for at in range(0, len(pictures), 8192):
                block = pictures[at : at + 8192]
                np.matmul(queries, block.T, out=product[:, : len(block)])

        ours, bare = seconds(config.runs, lambda q=queries: index.search(q, 10), sgemm)
        figures[f"{count} queries"] = share(ours, bare, "sgemm_s")
    codes = pictures.astype(np.float16).view(np.uint64)
    query = collection.texts(np.arange(1), 2)
    threads = use_threads()
    parts = np.array_split(codes, threads)
    with ThreadPoolExecutor(threads) as pool:
        ours, read = seconds(
            5 * config.runs, lambda: index.search(query, 10), lambda: list(pool.map(np.max, parts)), rest=0.0
        )
    figures["1 query"] = share(ours, read, "read_s")
    return figures


def share(ours: list[float], ceiling: list[float], name: str) -> dict[str, Any]:
    """Medians, the ratio of them, and the least and the greatest ratio of one pair of runs."""
    ratios = [c / o for o, c in zip(ours, ceiling, strict=True)]
    return {
        "s": round(median(ours), 4),
        name: round(median(ceiling), 4),
        "ratio": round(median(ceiling) / median(ours), 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def main(config: Config) -> dict[str, Any]:
    collection = Collection(config.rows, config.dim)
    folder = Path(tempfile.mkdtemp(prefix="llmvis-exact-"))
    try:
        index, _ = make(folder, "flat", collection, IndexConfig(rows=config.rows, dim=config.dim))
        exact = figures_of(index, collection, config)
    finally:
        shutil.rmtree(folder)
    figures = {
        "ratio": min(each["ratio"] for each in exact.values()),
        "rows": config.rows, "dim": config.dim, "vectors": "synthetic", "torch": torch.__version__, **exact,
    }  # fmt: skip
    print(json.dumps(figures, indent=1))
    if config.json:
        Path(config.json).write_text(json.dumps(figures, indent=1) + "\n")
    return figures


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
