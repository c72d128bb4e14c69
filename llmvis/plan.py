"""What a job will do, what it has done, and the books that must balance. No Ray.

A job's output folder holds

    plan.json            fingerprint, source, settings, number of shards
    plan/00000.parquet   the listing, one row group a shard
    data/, dead/         immutable files named by shard and content
    _commits/000000.json one marker a finished shard
    manifest.json        written last: the files that count, and the ledger
    report.json          where the time went

A shard counts when its marker is there; a job when its manifest is. Whatever else
a killed run left behind is not named by either and is swept away.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from tqdm import tqdm

from llmvis.schema import FORMAT_VERSION, LISTING, ItemError, Reason, UserError
from llmvis.sources import Source
from llmvis.storage import StorageError, Store, sha256_bytes, sha256_file

SHARDS_A_FILE = 128
DUPLICATE = "duplicate"
"""In a listing's `reason`: not bad, but an id that an earlier row has; counted, not written."""


class PlanError(UserError):
    """The output folder belongs to other work; the message says what differs."""


class LedgerError(AssertionError):
    """The books do not balance: a fault of ours, and a reason not to publish."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A job's work, fixed before it starts. `items = shards' rows`; `todo` is what no marker covers."""

    job: str
    fingerprint: str
    parts: dict[str, Any]
    items: int
    duplicates: int
    bad: int
    bytes: int
    shards: int
    shard_items: int

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT_VERSION, **self.__dict__}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Plan:
        if value.get("format") != FORMAT_VERSION:
            raise PlanError(
                f"plan.json has format {value.get('format')}, this version reads {FORMAT_VERSION}"
            )
        return cls(**{key: value[key] for key in cls.__dataclass_fields__})


def make_plan(folder: Path, *, job: str, source: Source, settings: dict[str, Any], shard_items: int) -> Plan:
    """Lists `source` into `folder/00000.parquet`, … and returns the plan for it.

    Streams: memory is 16 bytes an item (to find ids that occur twice) and one shard's rows.
    `settings` is everything beside the input that changes the output.
    """
    folder.mkdir(parents=True)
    schema = pa.schema([*LISTING, *source.user_columns])
    names, ids, bad, size = _write_listing(folder, source.listing(), schema, shard_items)
    items = len(ids)
    duplicates = _later_occurrences(ids)
    if len(duplicates):
        _flag_duplicates(folder, names, duplicates, schema, shard_items)
    hashes = [sha256_file(folder / name) for name in names]
    parts = {
        "source": source.describe(),
        "inputs": {"items": items, "sha256": sha256_bytes("".join(hashes).encode())},
        "settings": settings,
    }
    return Plan(
        job=job,
        fingerprint=sha256_bytes(json.dumps([FORMAT_VERSION, job, parts], sort_keys=True).encode()),
        parts=parts,
        items=items,
        duplicates=len(duplicates),
        bad=bad,
        bytes=size,
        shards=math.ceil(items / shard_items),
        shard_items=shard_items,
    )


def _write_listing(
    folder: Path, chunks: Iterator[pa.Table], schema: pa.Schema, shard_items: int
) -> tuple[list[str], npt.NDArray[np.uint64], int, int]:
    """Row groups of `shard_items`; returns file names, ids `(N, 2)`, the bad rows' count, bytes listed."""
    names: list[str] = []
    bar = tqdm(desc="list", unit=" items", mininterval=10, delay=10)  # seen only where it takes long
    ids: list[npt.NDArray[np.uint64]] = []
    bad = size = 0
    writer: pq.ParquetWriter | None = None
    for shard, rows in enumerate(_regroup(chunks, shard_items)):
        if shard % SHARDS_A_FILE == 0:
            if writer:
                writer.close()
            names.append(f"{shard // SHARDS_A_FILE:05}.parquet")
            writer = pq.ParquetWriter(folder / names[-1], schema, compression="zstd")
        assert writer is not None
        writer.write_table(rows, row_group_size=shard_items)
        raw = b"".join(bytes.fromhex(i) for i in rows["id"].to_pylist())
        ids.append(np.frombuffer(raw, np.uint64).reshape(-1, 2))
        bad += rows.num_rows - rows["reason"].null_count
        size += int(pa.compute.sum(rows["size"]).as_py() or 0)
        bar.update(rows.num_rows)
    bar.close()
    if writer:
        writer.close()
    return names, np.concatenate(ids) if ids else np.empty((0, 2), np.uint64), bad, size


def _regroup(chunks: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of exactly `rows`, the last one shorter."""
    held: list[pa.Table] = []
    count = 0
    for chunk in chunks:
        held.append(chunk)
        count += chunk.num_rows
        while count >= rows:
            table = pa.concat_tables(held)
            yield table.slice(0, rows)
            held, count = [table.slice(rows)], count - rows
    if count:
        yield pa.concat_tables(held)


def _later_occurrences(ids: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Sorted row numbers of ids that an earlier row has. `ids (N, 2)`."""
    order = np.lexsort((ids[:, 1], ids[:, 0]))  # stable: the first occurrence stays first
    same = (ids[order[1:]] == ids[order[:-1]]).all(axis=1)
    return np.sort(order[1:][same])


def _flag_duplicates(
    folder: Path, names: list[str], rows: npt.NDArray[np.int64], schema: pa.Schema, shard_items: int
) -> None:
    """Rewrites the listing with `reason = duplicate` at `rows`."""
    start = 0
    for name in names:
        aside = folder / f"{name}.new"
        with pq.ParquetFile(folder / name) as old, pq.ParquetWriter(aside, schema, compression="zstd") as new:
            for group in range(old.num_row_groups):
                table = old.read_row_group(group)
                mark = np.zeros(table.num_rows, bool)
                mark[rows[(rows >= start) & (rows < start + table.num_rows)] - start] = True
                reason = pa.compute.if_else(pa.array(mark), DUPLICATE, table["reason"])
                at = table.schema.get_field_index("reason")
                new.write_table(
                    table.set_column(at, schema.field("reason"), reason), row_group_size=shard_items
                )
                start += table.num_rows
        aside.replace(folder / name)


def read_shard(folder: Path, shard: int) -> pa.Table:
    """The listing's rows of one shard."""
    file, group = divmod(shard, SHARDS_A_FILE)
    with pq.ParquetFile(folder / f"{file:05}.parquet") as listing:
        return listing.read_row_group(group, use_threads=False)


@contextmanager
def plan_aside(
    *, job: str, source: Source, settings: dict[str, Any], shard_items: int, near: Path | None = None
) -> Iterator[tuple[Plan, Path]]:
    """A plan whose listing lies in a temporary folder, gone after the block unless moved away."""
    with tempfile.TemporaryDirectory(prefix=".aside-plan-", dir=near, ignore_cleanup_errors=True) as folder:
        listing = Path(folder) / "plan"
        yield make_plan(listing, job=job, source=source, settings=settings, shard_items=shard_items), listing


def adopt(store: Store, *, job: str, source: Source, settings: dict[str, Any], shard_items: int) -> Plan:
    """The plan for `store`: a new one, or the one already there where it is for the same work.

    Call it under `store.lock()`. Raises `PlanError` where the folder holds other work,
    naming the input or the setting that differs.
    """
    old = Plan.from_json(store.read_json("plan.json")) if store.exists("plan.json") else None
    size = old.shard_items if old else shard_items  # a resumed job keeps its shards
    with plan_aside(job=job, source=source, settings=settings, shard_items=size, near=store.root) as (
        new,
        folder,
    ):
        if old is None:
            _refuse_foreign(store)
            store.delete("plan")
            folder.rename(store.path("plan"))
            store.write_json("plan.json", new.to_json())
            return new
        if old.fingerprint != new.fingerprint:
            raise PlanError(_difference(store, old, new, folder))
    return old


def _refuse_foreign(store: Store) -> None:
    """Raises `PlanError` if the folder has files that no job of ours made."""
    ours = {"plan", ".lock", "data", "dead", "_commits"}
    foreign = [
        p.name for p in store.root.iterdir() if p.name not in ours and not p.name.startswith(".aside-")
    ]
    if foreign:
        raise PlanError(
            f"{store.root} is not empty ({foreign[0]}, …) and holds no job; choose a new folder for --out"
        )


def _difference(store: Store, old: Plan, new: Plan, folder: Path) -> str:
    """What differs between two plans, for people."""
    found = [f"job is {new.job}, was {old.job}"] if old.job != new.job else []
    for part in ("settings", "source"):
        before, now = old.parts[part], new.parts[part]
        keys = sorted(before.keys() | now.keys())
        found += [
            f"{key} is {_short(now.get(key))}, was {_short(before.get(key))}"
            for key in keys
            if before.get(key) != now.get(key)
        ]
    if not found and old.parts["inputs"] != new.parts["inputs"]:
        found.append(_input_difference(store.path("plan"), old, folder, new))
    return (
        f"{store.root} holds a job with another plan: {'; '.join(found) or 'another format'}. "
        "Choose a new --out, or delete this one if it is not needed."
    )


def _input_difference(old_folder: Path, old: Plan, new_folder: Path, new: Plan) -> str:
    counts = f"{new.items} items, were {old.items}" if new.items != old.items else "the input has changed"
    for shard in range(min(old.shards, new.shards)):
        before, now = read_shard(old_folder, shard), read_shard(new_folder, shard)
        if before.equals(now):
            continue
        for a, b in zip(before.to_pylist(), now.to_pylist(), strict=False):
            if a != b:
                what = "changed" if a["id"] == b["id"] else "appeared or vanished near"
                return f"{counts}; {what}: {b['path']}"
    return counts


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def marker_name(shard: int) -> str:
    return f"_commits/{shard:06}.json"


def committed(store: Store) -> set[int]:
    """Shards with a marker."""
    return {int(Path(name).stem) for name in store.names("_commits")}


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
) -> dict[str, Any]:
    """Data, then dead letters, then the marker that makes them count; returns the marker.

    File names hold the content's hash: a shard done twice writes the same name or
    another complete file, and the marker names one of them.
    """
    if rows.num_rows + dead.num_rows + duplicates != items:
        raise LedgerError(f"shard {shard}: {rows.num_rows} + {dead.num_rows} + {duplicates} is not {items}")
    marker: dict[str, Any] = {
        "shard": shard,
        "items": items,
        "duplicates": duplicates,
        "data": _publish_table(store, "data", shard, rows),
        "dead": _publish_table(store, "dead", shard, dead),
        "reasons": dict(sorted(Counter(dead["reason"].to_pylist()).items())),
        "seconds": seconds,
    }
    store.write_json(marker_name(shard), marker)
    return marker


def _publish_table(store: Store, folder: str, shard: int, table: pa.Table) -> dict[str, Any] | None:
    if table.num_rows == 0:
        return None
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_index=False)
    data = sink.getvalue().to_pybytes()
    sha256 = hashlib.sha256(data).hexdigest()
    name = f"{folder}/{shard:06}-{sha256[:12]}.parquet"
    store.write(name, data)
    return {"name": name, "rows": table.num_rows, "bytes": len(data), "sha256": sha256}


def publish_manifest(store: Store, plan: Plan, about: dict[str, Any]) -> dict[str, Any]:
    """Adds up the markers, checks the ledger, writes `manifest.json`, sweeps away what it does not name.

    `about` is the job's own part (model, schema, …). Raises `LedgerError` if an item is
    unaccounted for, and then publishes nothing.
    """
    markers = [store.read_json(marker_name(shard)) for shard in range(plan.shards)]
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
    store.write_json("manifest.json", manifest)
    store.sweep("data", {f["name"] for f in data})
    store.sweep("dead", {f["name"] for f in dead})
    store.sweep("_commits", {marker_name(shard) for shard in range(plan.shards)})
    return manifest


def check_ledger(ledger: dict[str, Any], plan: Plan) -> None:
    """input = written + dead-lettered + duplicates, and as many duplicates as planned."""
    out = ledger["written"] + ledger["dead_lettered"] + ledger["duplicates"]
    if out != plan.items or ledger["duplicates"] != plan.duplicates:
        raise LedgerError(f"{plan.items} items in, {out} accounted for: {ledger}")
    unknown = set(ledger["dead_by_reason"]) - set(Reason)
    if unknown or sum(ledger["dead_by_reason"].values()) != ledger["dead_lettered"]:
        raise LedgerError(f"dead letters do not add up: {ledger}")


def read_manifest(store: Store, job: str) -> dict[str, Any]:
    """The manifest of a finished `job`. Raises `StorageError` with what to do where there is none."""
    if not store.exists("manifest.json"):
        state = (
            "was begun and is not finished: run it again and it goes on"
            if store.exists("plan.json")
            else "is none"
        )
        raise StorageError(f"{store.root} is not a finished {job} job; it {state}")
    manifest = store.read_json("manifest.json")
    if manifest.get("job") != job:
        raise StorageError(f"{store.root} is the output of {manifest.get('job')!r}, not of {job!r}")
    if manifest.get("format") != FORMAT_VERSION:
        raise StorageError(
            f"{store.root} has format {manifest.get('format')}; this version reads {FORMAT_VERSION}"
        )
    return manifest


def read_data(store: Store, file: dict[str, Any]) -> pa.Table:
    """One data file of a manifest, whole, after its hash is checked."""
    data = store.read(file["name"])
    if sha256_bytes(data) != file["sha256"]:
        raise StorageError(
            f"{store.path(file['name'])} is damaged: its sha256 is not the manifest's; run the job anew"
        )
    return pq.read_table(pa.BufferReader(data), use_threads=False)
