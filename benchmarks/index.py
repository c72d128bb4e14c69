"""How near a search comes to what the machine can do, and what compressed vectors cost and give.

Vectors are synthetic, after CLIP's: clusters of clusters on a sphere, texts away from pictures by a gap,
each near a picture. Exact search is held against a bare matrix product of the same shape (many queries)
and against reading the same bytes (one query), measured in the same run, in turn. `ratio` is the smallest
of the three. Times of a shared machine differ from run to run: medians, and ceilings beside them.

    python -m benchmarks.index --rows 100000 --json index.json
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tyro

from llmvis.folders import files_of_manifest
from llmvis.index import Index, IndexInfo, build, open_index, plan_kind
from llmvis.storage import LocalStore


@dataclass(frozen=True, kw_only=True)
class Config:
    rows: int = 100_000
    """Vectors."""
    dim: int = 512
    """Their dimensions."""
    recall: float = 0.97
    """That the approximate kinds are tuned for."""
    runs: int = 5
    """Times that each is measured; medians count."""
    json: str | None = None
    """Write the figures there."""


def unit(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


class Collection:
    """Pictures and texts in one space, with a gap between them."""

    def __init__(self, rows: int, dim: int) -> None:
        chance = np.random.default_rng(0)
        coarse = chance.standard_normal((64, dim), np.float32)
        fine = coarse[chance.integers(0, 64, 4096)] + chance.standard_normal((4096, dim), np.float32)
        self._gap = unit(chance.standard_normal((1, dim)))
        pictures = fine[chance.integers(0, 4096, rows)]
        pictures += 1.5 * chance.standard_normal((rows, dim), np.float32)
        self.pictures = unit(unit(pictures) + 0.5 * self._gap)

    def texts(self, rows: np.ndarray, seed: int) -> np.ndarray:
        """A text for each of these pictures: near it, across the gap, with noise as long as 0.8 of it."""
        dim = self.pictures.shape[1]
        noise = np.random.default_rng(seed).standard_normal((len(rows), dim)) / dim**0.5
        return unit(self.pictures[rows] - self._gap + 0.8 * noise)


def seconds(runs: int, *calls: Callable[[], Any]) -> list[float]:
    """The median of each; they run in turn, so that a busy minute falls on all."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(runs):
        for call, times in zip(calls, found, strict=True):
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
    return [statistics.median(times) for times in found]


def make(folder: Path, kind: str, collection: Collection, config: Config) -> tuple[Index, float]:
    """The index, opened, and the CPU seconds of its build."""
    flat = pa.array(collection.pictures.astype(np.float16).reshape(-1))
    captions = [str(row) for row in range(config.rows)]
    vectors = pa.FixedSizeListArray.from_arrays(flat, config.dim)
    table = pa.table({"id": captions, "caption": captions, "embedding": vectors})
    model = {"name": "synthetic", "fingerprint": "0" * 64, "dim": config.dim, "licence": "none"}
    begun = time.process_time()
    build(
        LocalStore(folder), IndexInfo(model=model, source={}), [table],
        plan=plan_kind(kind, config.rows, config.dim, config.recall),  # type: ignore[arg-type]
        encode_texts=lambda texts: collection.texts(np.array([int(text) for text in texts]), 1),
    )  # fmt: skip
    return open_index(str(folder)), time.process_time() - begun


def exact_figures(index: Index, collection: Collection, config: Config) -> dict[str, Any]:
    pictures, figures = collection.pictures, dict[str, Any]()
    for count in (1024, 64):
        queries = collection.texts(np.arange(count) % config.rows, 2)
        product = np.empty((count, 8192), np.float32)

        def sgemm(queries: np.ndarray = queries, product: np.ndarray = product) -> None:
            for at in range(0, len(pictures), 8192):
                block = pictures[at : at + 8192]
                np.matmul(queries, block.T, out=product[:, : len(block)])

        ours, bare = seconds(config.runs, lambda q=queries: index.search(q, 10), sgemm)
        figures[f"{count} queries"] = {
            "s": round(ours, 4),
            "sgemm_s": round(bare, 4),
            "ratio": round(bare / ours, 3),
        }
    codes = pictures.astype(np.float16).view(np.uint64)
    query = collection.texts(np.arange(1), 2)
    ours, read = seconds(3 * config.runs, lambda: index.search(query, 10), lambda: codes.max())
    figures["1 query"] = {"s": round(ours, 4), "read_s": round(read, 4), "ratio": round(read / ours, 3)}
    return figures


def approximate_figures(
    index: Index, built: float, flat: Index, collection: Collection, config: Config
) -> dict[str, Any]:
    rows = np.random.default_rng(3).permutation(config.rows)[:500]
    queries = collection.texts(rows, 4)
    true = flat.search(queries, 10)[1]
    got = index.search(queries, 10)[1]
    ours, exact = seconds(config.runs, lambda: index.search(queries, 10), lambda: flat.search(queries, 10))
    manifest = index.manifest
    lists = sum(shard["lists"]["bytes"] for shard in manifest["shards"]) + manifest["trained"]["bytes"]
    return {
        "recall_at_10": round(float((got[:, :, None] == true[:, None, :]).any(2).mean()), 4),
        "tuned": {
            key: manifest["tuned"][key] for key in ("nprobe", "candidates", "recall_at_10", "share_of_exact")
        },
        "factory": manifest["factory"],
        "queries_a_second": round(len(queries) / ours, 1),
        "exact_queries_a_second": round(len(queries) / exact, 1),
        "bytes_a_vector": round(lists / config.rows, 1),
        "files_bytes_a_vector": round(
            sum(f["bytes"] for f in files_of_manifest(manifest).values()) / config.rows, 1
        ),
        "build_cpu_s": round(built, 1),
    }


def main(config: Config) -> dict[str, Any]:
    collection = Collection(config.rows, config.dim)
    folder = Path(tempfile.mkdtemp(prefix="llmvis-index-"))
    try:
        flat, _ = make(folder / "flat", "flat", collection, config)
        exact = exact_figures(flat, collection, config)
        figures: dict[str, Any] = {
            "ratio": min(each["ratio"] for each in exact.values()),
            "rows": config.rows, "dim": config.dim, "vectors": "synthetic", "exact": exact,
        }  # fmt: skip
        for kind in ("ivf_sq8", "ivf_rabitq"):
            index, built = make(folder / kind, kind, collection, config)
            figures[kind] = approximate_figures(index, built, flat, collection, config)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(figures, indent=1))
    if config.json:
        Path(config.json).write_text(json.dumps(figures, indent=1) + "\n")
    return figures


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
