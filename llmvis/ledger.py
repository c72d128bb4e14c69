"""What a job has done: markers of finished shards, the manifest, and books that must balance. No Ray.

A shard counts when its marker is there, a job when its manifest is. Whatever else a
killed run left behind is named by neither and is swept away.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmvis.plan import Plan
from llmvis.schema import FORMAT_VERSION, SCORES, ItemError, Reason
from llmvis.storage import StorageError, Store, sha256_bytes


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a shard's rows become one file: `pack` gives its bytes, `ending` its kind. Picklable."""

    ending: str
    pack: Callable[[pa.Table], bytes]


def parquet_bytes(table: pa.Table) -> bytes:
    """A table as a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_index=False)
    return bytes(sink.getvalue().to_pybytes())


PARQUET = Packing(ending="parquet", pack=parquet_bytes)


class LedgerError(AssertionError):
    """The books do not balance: a fault of ours, and a reason not to publish."""


def marker_name(shard: int) -> str:
    return f"_commits/{shard:06}.json"


def committed(store: Store) -> set[int]:
    """Shards with a marker whose files are all there, in their full length."""
    sizes = store.sizes("data") | store.sizes("dead")
    markers = store.read_all_json(store.names("_commits"))
    return {
        marker["shard"]
        for marker in markers
        if all(
            file is None or sizes.get(file["name"]) == file["bytes"]
            for file in (marker["data"], marker["dead"])
        )
    }


def dead_row(row_id: str, source: str, stage: str, error: ItemError) -> dict[str, str]:
    """A row of `schema.DEAD_LETTER`."""
    return {
        "id": row_id,
        "source": source,
        "stage": stage,
        "reason": str(error.reason),
        "detail": error.detail[:500],
    }


def publish_shard(
    store: Store,
    shard: int,
    rows: pa.Table,
    dead: pa.Table,
    *,
    items: int,
    duplicates: int,
    seconds: dict[str, float],
    started: float,
    packing: Packing = PARQUET,
) -> dict[str, Any]:
    """Data, then dead letters, then the marker that makes them count; returns the marker.

    File names hold the content's hash: a shard done twice writes the same name or
    another complete file, and the marker names one of them.
    """
    if rows.num_rows + dead.num_rows + duplicates != items:
        raise LedgerError(f"shard {shard}: {rows.num_rows} + {dead.num_rows} + {duplicates} is not {items}")
    begun = time.perf_counter()
    data = _publish_table(store, "data", shard, rows, packing)
    lost = _publish_table(store, "dead", shard, dead, PARQUET)
    marker: dict[str, Any] = {
        "shard": shard,
        "items": items,
        "duplicates": duplicates,
        "data": data,
        "dead": lost,
        "reasons": dict(sorted(Counter(dead["reason"].to_pylist()).items())),
        "seconds": {**seconds, "write": time.perf_counter() - begun},
        "started": started,
        "ended": time.time(),
    }
    store.write_json(marker_name(shard), marker)
    return marker


def _publish_table(
    store: Store, folder: str, shard: int, table: pa.Table, packing: Packing
) -> dict[str, Any] | None:
    if table.num_rows == 0:
        return None
    data = packing.pack(table)
    sha256 = sha256_bytes(data)
    name = f"{folder}/{shard:06}-{sha256[:12]}.{packing.ending}"
    store.write(name, data)
    return {"name": name, "rows": table.num_rows, "bytes": len(data), "sha256": sha256}


def publish_manifest(store: Store, plan: Plan, about: dict[str, Any]) -> dict[str, Any]:
    """Adds up the markers, checks the ledger, writes `manifest.json`, sweeps away what it does not name.

    `about` is the job's own part (model, schema, …). Raises `LedgerError` if an item is
    unaccounted for, and then publishes nothing.
    """
    markers = store.read_all_json([marker_name(shard) for shard in range(plan.shards)])
    data = [m["data"] for m in markers if m["data"]]
    dead = [m["dead"] for m in markers if m["dead"]]
    reasons: Counter[str] = Counter()
    for marker in markers:
        reasons.update(marker["reasons"])
    ledger = {
        "input": plan.items,
        "written": sum(f["rows"] for f in data),
        "dead_lettered": sum(f["rows"] for f in dead),
        "duplicates": sum(m["duplicates"] for m in markers),
        "dead_by_reason": dict(sorted(reasons.items())),
    }
    check_ledger(ledger, plan)
    manifest = {
        "format": FORMAT_VERSION,
        "job": plan.job,
        "fingerprint": plan.fingerprint,
        **about,
        "source": plan.parts["source"],
        "rows": ledger["written"],
        "files": data,
        "dead": dead,
        "ledger": ledger,
    }
    replaced = _files_of_last(store)
    store.write_json("manifest.json", manifest)
    store.sweep("data", {f["name"] for f in data} | replaced)
    store.sweep("dead", {f["name"] for f in dead} | replaced)
    store.sweep("_commits", {marker_name(shard) for shard in range(plan.shards)})
    return manifest


def _files_of_last(store: Store) -> set[str]:
    """What the manifest names that is about to be replaced, after a retry: who reads by it still finds its files."""
    try:
        last = store.read_json("manifest.json") if store.exists("manifest.json") else {}
    except StorageError:  # damaged; a new one is what it needs
        last = {}
    return {file["name"] for part in ("files", "dead") for file in last.get(part, [])}


def check_ledger(ledger: dict[str, Any], plan: Plan) -> None:
    """input = written + dead-lettered + duplicates, and as many duplicates as planned."""
    out = ledger["written"] + ledger["dead_lettered"] + ledger["duplicates"]
    if out != plan.items or ledger["duplicates"] != plan.duplicates:
        raise LedgerError(f"{plan.items} items in, {out} accounted for: {ledger}")
    unknown = set(ledger["dead_by_reason"]) - set(Reason)
    if unknown or sum(ledger["dead_by_reason"].values()) != ledger["dead_lettered"]:
        raise LedgerError(f"dead letters do not add up: {ledger}")


def read_manifest(store: Store, *jobs: str) -> dict[str, Any]:
    """The manifest of a finished job, one of `jobs`. Raises `StorageError` with what to do where there is none."""
    if not store.exists("manifest.json"):
        state = (
            "it was begun and is not finished: run it again and it goes on"
            if store.exists("plan.json") or store.exists(f"{SCORES}/plan.json")
            else "there is no manifest.json in it; give a job's --out"
        )
        raise StorageError(f"{store.uri} is not the folder of a finished {' or '.join(jobs)} job: {state}")
    manifest = store.read_json("manifest.json")
    if manifest.get("job") not in jobs:
        raise StorageError(
            f"{store.uri} is the output of {manifest.get('job')!r}, not of {' or '.join(map(repr, jobs))}"
        )
    if manifest.get("format") != FORMAT_VERSION:
        raise StorageError(
            f"{store.uri} has format {manifest.get('format')}; this version reads {FORMAT_VERSION}"
        )
    return manifest


def read_data(store: Store, file: dict[str, Any]) -> pa.Table:
    """One data file of a manifest, whole, after its hash is checked."""
    return pq.read_table(pa.BufferReader(store.read_checked(file["name"], file["sha256"])), use_threads=False)
