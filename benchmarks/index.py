"""What compressed indexes cost and give: against autofaiss on the same vectors, and against exact search.

Vectors are synthetic, after CLIP's: clusters of clusters on a sphere, texts away from pictures by a gap,
each near a picture. Recall is that of texts. autofaiss gets the same vectors and memory in an environment of
its own, which is made at first use. `ratio` is our CPU seconds to build over its, of the kind that our planner
chooses for that memory; null where its environment cannot be had.

    python -m benchmarks.index --rows 100000 --json index.json
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tyro

from benchmarks.synthetic import Collection, median, seconds
from llmvis.folders import files_of_manifest
from llmvis.index import Index, IndexInfo, build, open_index, plan_index, plan_kind
from llmvis.search import search
from llmvis.storage import LocalStore

PEER = Path(__file__).parent / ".autofaiss"
PEER_NEEDS = ["autofaiss==2.18.0", "faiss-cpu==1.13.2", "setuptools==80.9.0", "numpy<2", "pyarrow<18"]
"""With newer setuptools and pyarrow it does not start."""


@dataclass(frozen=True, kw_only=True)
class Config:
    rows: int = 100_000
    """Vectors."""
    dim: int = 512
    """Their dimensions."""
    recall: float = 0.97
    """That ours are tuned for."""
    memory: float = 4.0
    """GB of memory that either may use to search."""
    runs: int = 3
    """Times that each search is measured; medians count."""
    peer: bool = True
    """Build with autofaiss, too."""
    json: str | None = None
    """Write the figures there."""


def make(folder: Path, kind: str, collection: Collection, config: Config) -> tuple[Index, float]:
    """The index, opened, and the CPU seconds of its build."""
    flat = pa.array(collection.pictures.astype(np.float16).reshape(-1))
    ids = [f"{row:032x}" for row in range(config.rows)]
    plain = dict.fromkeys(("width", "height"), pa.array(np.full(config.rows, 512, np.int32)))
    table = pa.table(
        {
            "id": ids, "path": [f"pictures/{row}.jpg" for row in range(config.rows)],
            "caption": [str(row) for row in range(config.rows)], "locator": pa.array([b""] * config.rows),
            "caption_truncated": pa.array(np.zeros(config.rows, bool)), **plain,
            "embedding": pa.FixedSizeListArray.from_arrays(flat, config.dim),
        }
    )  # fmt: skip
    model = {"name": "synthetic", "fingerprint": "0" * 64, "dim": config.dim, "licence": "none"}
    begun = time.process_time()
    build(
        LocalStore(folder), IndexInfo(model=model, source={"shown_root": "/"}), [table],
        plan=plan_kind(kind, config.rows, config.dim, config.recall),  # type: ignore[arg-type]
        encode_texts=lambda texts: collection.texts(np.array([int(text) for text in texts]), 1),
    )  # fmt: skip
    used = time.process_time() - begun
    return open_index(str(folder)), used


def figures_of(
    index: Index,
    built: float,
    folder: Path,
    queries: np.ndarray,
    true: np.ndarray,
    flat: Index,
    config: Config,
) -> dict[str, Any]:
    got = index.search(queries, 10)[1]
    ours, exact = seconds(
        config.runs, lambda: index.search(queries, 10), lambda: flat.search(queries, 10, exact=True)
    )
    manifest = index.manifest
    held = sum(shard["lists"]["bytes"] for shard in manifest["shards"]) + manifest["trained"]["bytes"]
    opened = seconds(1, lambda: first_hit(folder, queries[:1]))[0]
    return {
        "recall_at_10": round(float((got[:, :, None] == true[:, None, :]).any(2).mean()), 4),
        "tuned": {
            key: manifest["tuned"][key] for key in ("nprobe", "candidates", "recall_at_10", "share_of_exact")
        },
        "factory": manifest["factory"],
        "queries_a_second": round(len(queries) / median(ours), 1),
        "exact_queries_a_second": round(len(queries) / median(exact), 1),
        "times_exact": round(median(exact) / median(ours), 2),
        "bytes": held,
        "bytes_a_vector": round(held / config.rows, 1),
        "files_bytes_a_vector": round(
            sum(f["bytes"] for f in files_of_manifest(manifest).values()) / config.rows, 1
        ),
        "build_cpu_s": round(built, 1),
        "cold_start_s": round(opened[0], 2),
    }


def first_hit(folder: Path, query: np.ndarray) -> None:
    """Opens an index, whose files are all checked, and searches it once."""
    with open_index(str(folder)) as index:
        assert search(index, query, 10)


def metadata_ms(index: Index, runs: int) -> float:
    """Of ten hits at random places."""
    chance = np.random.default_rng(5)
    rows = [chance.integers(0, index.rows, 10) for _ in range(200)]
    index.metadata(rows[0])
    (times,) = seconds(runs, lambda: [index.metadata(each) for each in rows])
    return round(median(times) / len(rows) * 1000, 4)


def peer(folder: Path, collection: Collection, queries: np.ndarray, true: np.ndarray, config: Config) -> Any:
    """autofaiss's figures; None where it cannot be installed."""
    python = PEER / "bin" / "python"
    if not (PEER / "ready").exists():
        venv.create(PEER, with_pip=True)
        installed = subprocess.run([python, "-m", "pip", "install", "--quiet", *PEER_NEEDS])
        if installed.returncode:
            print("note: autofaiss cannot be installed, so there is no ratio", file=sys.stderr)
            return None
        (PEER / "ready").touch()
    (folder / "vectors").mkdir()
    np.save(folder / "vectors" / "0.npy", collection.pictures)
    np.save(folder / "queries.npy", queries)
    np.save(folder / "true.npy", true)
    cores = os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = Path(__file__).with_name("autofaiss_peer.py")
    subprocess.run(
        [python, script, folder, str(config.memory), cores], check=True, env=env, stdout=sys.stderr
    )
    return json.loads((folder / "peer.json").read_text())


def main(config: Config) -> dict[str, Any]:
    collection = Collection(config.rows, config.dim)
    folder = Path(tempfile.mkdtemp(prefix="llmvis-index-"))
    memory = int(config.memory * 1e9)
    try:
        flat, _ = make(folder / "flat", "flat", collection, config)
        queries = collection.texts(np.random.default_rng(3).permutation(config.rows)[:500], 4)
        true = flat.search(queries, 10, exact=True)[1]
        chosen = plan_index(
            max(config.rows, 200_001), config.dim, memory_bytes=memory, recall=config.recall
        ).kind
        figures: dict[str, Any] = {
            "ratio": None, "rows": config.rows, "dim": config.dim, "vectors": "synthetic", "memory_gb": config.memory,
            "chosen": chosen, "metadata_of_10_ms": metadata_ms(flat, config.runs),
        }  # fmt: skip
        for kind in ("ivf_sq8", "ivf_rabitq"):
            index, built = make(folder / kind, kind, collection, config)
            figures[kind] = figures_of(index, built, folder / kind, queries, true, flat, config)
            index.close()
            shutil.rmtree(folder / kind)
        if config.peer and (found := peer(folder, collection, queries, true, config)):
            ours = figures[chosen]
            figures["autofaiss"] = {**found, "bytes_a_vector": round(found["bytes"] / config.rows, 1)}
            figures["ratio"] = round(ours["build_cpu_s"] / found["build_cpu_s"], 3)
            figures["recall_less_autofaiss"] = round(ours["recall_at_10"] - found["recall_at_10"], 4)
            figures["bytes_ratio"] = round(ours["bytes"] / found["bytes"], 3)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(figures, indent=1))
    if config.json:
        Path(config.json).write_text(json.dumps(figures, indent=1) + "\n")
    return figures


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
