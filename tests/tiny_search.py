"""A bulk search with the tiny encoder, on the Ray that is connected, or as a driver of its own for tests that kill it.

python tiny_search.py INDEX QUERIES OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tiny

from jobs.search import mapping, queries_of
from llmvis.cluster.jobs import Pool, run_job
from llmvis.cluster.session import session
from llmvis.config_bulk import BatchSearchConfig
from llmvis.index import IndexInfo, build, read_info
from llmvis.schema import item_id
from llmvis.storage import LocalStore

DIM = tiny.INFO.dim
MODEL = {"name": "tiny", "fingerprint": tiny.INFO.fingerprint, "dim": DIM, "licence": "none"}


def vectors_of(count: int, seed: int = 0) -> np.ndarray:
    """Unit vectors as an index keeps them: fp16 (N, D)."""
    return tiny.unit(np.random.default_rng(seed).standard_normal((count, DIM))).astype(np.float16)


def index_of(folder: Path, vectors: np.ndarray, **options: Any) -> list[str]:
    """An index of these vectors; returns the ids of its rows."""
    ids = [item_id(f"{seed}".encode()) for seed in range(len(vectors))]
    table = pa.table(
        {
            "id": ids,
            "path": [f"{i}.png" for i in range(len(vectors))],
            "locator": [f"{i}.png".encode() for i in range(len(vectors))],
            "caption": [f"picture {i}" for i in range(len(vectors))],
            "caption_truncated": [False] * len(vectors),
            "width": pa.array([8] * len(vectors), pa.int32()),
            "height": pa.array([8] * len(vectors), pa.int32()),
            "tag": [f"tag {i % 3}" for i in range(len(vectors))],
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), DIM),
        }
    )
    source = {"kind": "folder", "root": str(folder / "images"), "shown_root": "shown"}
    build(LocalStore(folder), IndexInfo(model=MODEL, source=source), [table], **options)
    return ids


def run(config: BatchSearchConfig) -> dict[str, Any]:
    info = read_info(config.index)
    source = queries_of(config, info)
    work = mapping(config, source, info, tiny.load)
    return run_job(work, source, config.out, Pool(shard_items=config.shard_items), quiet=True)


if __name__ == "__main__":
    with session(num_cpus=2):
        index, queries, out = sys.argv[1:]
        print(json.dumps(run(BatchSearchConfig(index=index, queries=queries, out=out, shard_items=8))))
