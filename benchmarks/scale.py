"""What a collection of any size costs, from unit costs measured on this machine: core-hours, bytes, requests.

`measure` takes the unit costs in time of one core, which a busy machine does not stretch much; `estimate` is
arithmetic on them. `ratio` is the share of a picture's time that the model on CPUs takes, the rest being listing,
decoding and counting up. It knows no prices and no GPU: models were not measured on one, so put in your own
pictures a second. Time to move bytes over a network is not in it, nor what retries cost.

    python -m benchmarks.scale --measure --json benchmarks/scale.json     # minutes
    python -m benchmarks.scale --images 100000000 1000000000
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import tracemalloc
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.encode import make_pictures
from llmvis.cluster.session import KEEP_FREED_MEMORY
from llmvis.images import decode
from llmvis.index import IndexInfo, build
from llmvis.ledger import parquet_bytes, publish_manifest, publish_shard
from llmvis.models.load import load_encoder
from llmvis.plan import make_plan
from llmvis.schema import DEAD_LETTER, encoded
from llmvis.sources import open_source
from llmvis.storage import LocalStore

UNITS = Path(__file__).with_name("scale.json")
SHARD_ITEMS = 256
LIST_PAGE = 1000
"""Names that S3 gives for one LIST request."""
SHARD_PUTS = 3
"""Objects of a shard: rows, dead letters if there are any, marker."""


@dataclass(frozen=True, kw_only=True)
class Units:
    """What one item or shard costs: times on one core, bytes on disk or in the driver."""

    decode_ms: float
    encode_ms: float
    row_bytes: float
    index_bytes: float
    plan_bytes: float
    list_items_s: float
    plan_memory_bytes: float
    finish_shard_ms: float
    finish_shard_memory_bytes: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a whole collection costs."""

    images: int
    shards: int
    decode_core_hours: float
    encode_core_hours: float
    node_hours: float
    days: float
    rows_gb: float
    index_gb: float
    plan_gb: float
    list_hours: float
    driver_gb: float
    finish_minutes: float
    lists: int
    gets: int
    puts: int


def estimate(units: Units, images: int, *, node_cores: int = 16, nodes: int = 16) -> Estimate:
    """The cost of encoding and indexing `images` pictures on `nodes` nodes of `node_cores` cores, without a GPU."""
    shards = -(-images // SHARD_ITEMS)
    decoding, encoding = (images * ms / 3.6e6 for ms in (units.decode_ms, units.encode_ms))
    node_hours = (decoding + encoding) / node_cores
    planning, finishing = images * units.plan_memory_bytes, shards * units.finish_shard_memory_bytes
    return Estimate(
        images=images,
        shards=shards,
        decode_core_hours=decoding,
        encode_core_hours=encoding,
        node_hours=node_hours,
        days=node_hours / nodes / 24,
        rows_gb=images * units.row_bytes / 1e9,
        index_gb=images * units.index_bytes / 1e9,
        plan_gb=images * units.plan_bytes / 1e9,
        list_hours=images / units.list_items_s / 3600,
        driver_gb=max(planning, finishing) / 1e9,
        finish_minutes=shards * units.finish_shard_ms / 6e4,
        lists=-(-images // LIST_PAGE),
        gets=images,
        puts=SHARD_PUTS * shards,
    )


def measure(folder: Path) -> Units:
    """The unit costs, of 256 px JPEGs and the packaged model, one thread."""
    import torch

    torch.set_num_threads(1)
    make_pictures(folder / "pictures", 400, 256)
    encoder, data = load_encoder(), [p.read_bytes() for p in sorted((folder / "pictures").rglob("*.jpg"))]
    preprocess = encoder.info.preprocess
    begun = time.process_time()
    batch = np.stack([preprocess(decode(d, target=preprocess.side).image) for d in data])
    decode_ms = (time.process_time() - begun) * 1e3 / len(data)
    encoder.encode_images(batch[:32])
    begun = time.process_time()
    embeddings = np.concatenate([encoder.encode_images(batch[i : i + 32]) for i in range(0, len(batch), 32)])
    encode_ms = (time.process_time() - begun) * 1e3 / len(data)
    plan_bytes, rate, plan_memory = _listing(folder)
    row_bytes, index_bytes = _files(folder, embeddings)
    finish_ms, finish_memory = _shards(folder)
    return Units(
        decode_ms=decode_ms, encode_ms=encode_ms, row_bytes=row_bytes, index_bytes=index_bytes,
        plan_bytes=plan_bytes, list_items_s=rate, plan_memory_bytes=plan_memory,
        finish_shard_ms=finish_ms, finish_shard_memory_bytes=finish_memory,
    )  # fmt: skip


def _listing(folder: Path, count: int = 40_000) -> tuple[float, float, float]:
    """Of planning a local folder: bytes on disk an item, items a second, bytes of memory an item."""
    peaks = []
    for part in (count // 4, count):
        root = folder / f"names-{part}"
        for i in range(part):
            if i % 1000 == 0:
                (root / f"{i // 1000:05}").mkdir(parents=True)
            (root / f"{i // 1000:05}" / f"{i:09}.jpg").write_bytes(b"x")
        source, out = open_source(str(root)), folder / f"plan-{part}"
        begun = time.process_time()
        make_plan(out, job="encode", source=source, settings={}, shard_items=SHARD_ITEMS)
        seconds = time.process_time() - begun
        tracemalloc.start()
        make_plan(folder / f"again-{part}", job="encode", source=source, settings={}, shard_items=SHARD_ITEMS)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    size = sum(f.stat().st_size for f in out.iterdir())
    return size / count, count / seconds, (peaks[1] - peaks[0]) / (count - count // 4)


def _files(folder: Path, embeddings: np.ndarray, rows: int = 20_480) -> tuple[float, float]:
    """Bytes a row in data/ and a vector in an index, with captions of five words."""
    dim, rng = embeddings.shape[1], np.random.default_rng(0)
    words = np.array(
        [
            "a",
            "the",
            "red",
            "blue",
            "old",
            "small",
            "bird",
            "house",
            "tree",
            "on",
            "in",
            "with",
            "near",
            "sea",
            "boat",
        ]
    )
    vectors = embeddings[rng.integers(0, len(embeddings), rows)] + rng.normal(0, 0.01, (rows, dim))
    flat = pa.array(vectors.astype(np.float16).reshape(-1))
    values = {
        "id": [rng.bytes(16).hex() for _ in range(rows)],
        "path": [f"{i // 1000:05}/{i:09}.jpg" for i in range(rows)],
        "locator": [f"{i // 1000:05}/{i:09}.jpg".encode() for i in range(rows)],
        "caption": [" ".join(rng.choice(words, 5)) for _ in range(rows)],
        "caption_truncated": [False] * rows,
        "width": [256] * rows,
        "height": [256] * rows,
        "embedding": pa.FixedSizeListArray.from_arrays(flat, dim),
    }
    table = pa.table(values, schema=encoded(dim, []))
    size = sum(len(parquet_bytes(table.slice(at, SHARD_ITEMS))) for at in range(0, rows, SHARD_ITEMS))
    store = LocalStore(folder / "index")
    about = {"name": "scale", "fingerprint": "0" * 64, "dim": dim, "licence": "none"}
    manifest = build(store, IndexInfo(model=about, source={}), [table])
    parts = [shard[part]["bytes"] for shard in manifest["shards"] for part in ("vectors", "metadata")]
    return size / rows, sum(parts) / rows


def _shards(folder: Path, count: int = 2_000) -> tuple[float, float]:
    """Of finishing a job, a shard: milliseconds to read the marker and count it, bytes of memory."""
    root = folder / "shards"
    for i in range(count):
        (root / f"{i:09}.jpg").parent.mkdir(exist_ok=True)
        (root / f"{i:09}.jpg").write_bytes(b"x")
    plan = make_plan(
        folder / "shard-plan", job="encode", source=open_source(str(root)), settings={}, shard_items=1
    )
    store = LocalStore(folder / "finished")
    row, dead = pa.table({"id": ["x"]}), DEAD_LETTER.empty_table()
    seconds = dict.fromkeys(("list", "read", "decode", "model"), 0.1)
    for shard in range(plan.shards):
        publish_shard(store, shard, row, dead, items=1, duplicates=0, seconds=seconds, started=0.0)
    begun = time.process_time()
    publish_manifest(store, plan, {})
    took = time.process_time() - begun
    tracemalloc.start()
    publish_manifest(store, plan, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return took * 1e3 / count, peak / count


def model_share(units: Units) -> float:
    """Of the time of one core that a picture takes."""
    others = units.decode_ms + units.finish_shard_ms / SHARD_ITEMS + 1e3 / units.list_items_s
    return units.encode_ms / (units.encode_ms + others)


@dataclass(frozen=True, kw_only=True)
class Config:
    images: tuple[int, ...] = (100_000_000, 1_000_000_000)
    """Sizes of collections."""
    node_cores: int = 16
    """Cores of a node."""
    nodes: int = 16
    """Nodes at work."""
    measure: bool = False
    """Measure the unit costs anew, on this machine, instead of reading them."""
    json: str | None = None
    """Write the figures there, the unit costs among them."""


NAMES = {
    "shards": "shards of 256",
    "decode_core_hours": "decode, core-hours",
    "encode_core_hours": "model on CPUs, core-hours",
    "node_hours": "both, node-hours",
    "days": "both, days on all nodes",
    "rows_gb": "data/ with embeddings, GB",
    "index_gb": "exact index, GB",
    "plan_gb": "plan/, GB",
    "list_hours": "listing, hours",
    "driver_gb": "driver's memory for it, GB",
    "finish_minutes": "counting it up, minutes",
    "lists": "S3 LIST requests",
    "gets": "S3 GET requests, pictures",
    "puts": "S3 PUT requests, at most",
}


def shown(value: float) -> str:
    """A figure with what digits it deserves."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.3g}"


def main(config: Config) -> None:
    if config.measure:
        if "MALLOC_ARENA_MAX" not in os.environ:  # the memory settings of the jobs' workers, from the start
            again = [sys.executable, "-m", "benchmarks.scale", *sys.argv[1:]]
            os.execve(sys.executable, again, os.environ | KEEP_FREED_MEMORY)
        with tempfile.TemporaryDirectory() as folder:
            taken = asdict(measure(Path(folder)))
        units = Units(**{name: float(f"{value:.4g}") for name, value in taken.items()})
    else:
        units = Units(**json.loads(UNITS.read_text())["units"])
    found = [
        asdict(estimate(units, n, node_cores=config.node_cores, nodes=config.nodes)) for n in config.images
    ]
    if config.json:
        estimates = dict(zip(map(str, config.images), found, strict=True))
        figures = {"ratio": round(model_share(units), 4), "units": asdict(units), "estimates": estimates}
        Path(config.json).write_text(json.dumps(figures, indent=1) + "\n")
    table = Table("", *(f"{n:,}" for n in config.images))
    for name, title in NAMES.items():
        table.add_row(title, *(shown(one[name]) for one in found))
    Console(width=80).print(table)
    print(f"{config.nodes} nodes of {config.node_cores} cores. Model on GPUs: not measured.")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
