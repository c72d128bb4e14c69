"""What a job will do: its items in shards, fixed and fingerprinted before it starts. No Ray.

A job's output folder holds

    plan.json            fingerprint, source, settings, number of shards
    plan/00000.parquet   the listing, one row group a shard
    data/, dead/         immutable files named by shard and content
    _commits/000000.json one marker a finished shard
    manifest.json        written last: the files that count, and the ledger
    report.json          where the time went
    work/                what a job of several passes needs between them

This module makes and compares plans; `ledger` has what comes after.
"""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
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

from llmvis.schema import FORMAT_VERSION, LISTING, UserError
from llmvis.sources import Source, SourceError
from llmvis.storage import LocalStore, StorageError, Store, sha256_bytes, sha256_file

SHARDS_A_FILE = 128
LISTING_FOLDER = "plan"
DUPLICATE = "duplicate"
"""In a listing's `reason`: not bad, but an id that an earlier row has; counted, not written."""


class PlanError(UserError):
    """The output folder belongs to other work; the message says what differs."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A job's work, fixed before it starts.

    `bad` counts the rows that the listing itself found bad, `bytes` what it saw of the rest.
    """

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

    Streams: memory is some 60 bytes an item (to find ids that occur twice) and one shard's
    rows. `settings` is everything beside the input that changes the output. Raises
    `SourceError` where the source has no items.
    """
    folder.mkdir(parents=True)
    schema = pa.schema([*LISTING, *source.user_columns])
    names, ids, bad, size = _write_listing(folder, source.listing(), schema, shard_items)
    items = len(ids)
    if not items:
        raise SourceError(
            f"{source.describe()['root']} holds no pictures: {'; '.join(source.notes()) or 'it is empty'}"
        )
    duplicates = _later_occurrences(ids, bad)
    bad[duplicates] = False
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
        bad=int(bad.sum()),
        bytes=size,
        shards=math.ceil(items / shard_items),
        shard_items=shard_items,
    )


def _write_listing(
    folder: Path, chunks: Iterator[pa.Table], schema: pa.Schema, shard_items: int
) -> tuple[list[str], npt.NDArray[np.uint64], npt.NDArray[np.bool_], int]:
    """Row groups of `shard_items`; returns file names, ids `(N, 2)`, bad rows `(N,)`, bytes listed."""
    names: list[str] = []
    bar = tqdm(desc="list", unit=" items", mininterval=10, delay=10)  # seen only where it takes long
    ids: list[npt.NDArray[np.uint64]] = []
    bad: list[npt.NDArray[np.bool_]] = []
    size = 0
    writer: pq.ParquetWriter | None = None
    for shard, rows in enumerate(regroup(chunks, shard_items)):
        if shard % SHARDS_A_FILE == 0:
            if writer:
                writer.close()
            names.append(f"{shard // SHARDS_A_FILE:05}.parquet")
            writer = pq.ParquetWriter(folder / names[-1], schema, compression="zstd")
        assert writer is not None
        writer.write_table(rows, row_group_size=shard_items)
        raw = b"".join(bytes.fromhex(i) for i in rows["id"].to_pylist())
        ids.append(np.frombuffer(raw, np.uint64).reshape(-1, 2))
        bad.append(rows["reason"].is_valid().to_numpy())
        size += int(pa.compute.sum(rows["size"]).as_py() or 0)
        bar.update(rows.num_rows)
    bar.close()
    if writer:
        writer.close()
    if not ids:
        return names, np.empty((0, 2), np.uint64), np.empty(0, bool), 0
    return names, np.concatenate(ids), np.concatenate(bad), size


def regroup(chunks: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
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


def _later_occurrences(ids: npt.NDArray[np.uint64], bad: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Sorted row numbers of ids `(N, 2)` that another row stands for: the first good one, else the first."""
    order = np.lexsort((bad, ids[:, 1], ids[:, 0]))  # stable
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


def read_shard(store: Store, shard: int) -> pa.Table:
    """The rows of one shard in the listing `plan/` of a store."""
    number, group = divmod(shard, SHARDS_A_FILE)

    def read() -> pa.Table:
        with store.open(f"{LISTING_FOLDER}/{number:05}.parquet") as file, pq.ParquetFile(file) as listing:
            return listing.read_row_group(group, use_threads=False)

    return store.attempt(read)


@contextmanager
def plan_aside(
    *, job: str, source: Source, settings: dict[str, Any], shard_items: int, near: Path | None = None
) -> Iterator[tuple[Plan, LocalStore]]:
    """A plan whose listing lies in a temporary store, gone after the block unless moved away."""
    with tempfile.TemporaryDirectory(prefix=".aside-plan-", dir=near, ignore_cleanup_errors=True) as folder:
        aside = LocalStore(folder)
        listing = aside.path(LISTING_FOLDER)
        try:
            plan = make_plan(listing, job=job, source=source, settings=settings, shard_items=shard_items)
        except OSError as error:  # Arrow writes the listing past the store, which would have said this
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StorageError(
                f"{Path(folder).parent}: {os.strerror(error.errno)}; make room and run the job again"
            ) from error
        yield plan, aside


def adopt(store: Store, *, job: str, source: Source, settings: dict[str, Any], shard_items: int) -> Plan:
    """The plan for `store`: a new one, or the one already there where it is for the same work.

    Call it under `store.lock()`. Raises `PlanError` where the folder holds other work,
    naming the input or the setting that differs.
    """
    store.clear_unfinished()
    old = existing(store)
    if old is None:
        refuse_foreign(store, {LISTING_FOLDER, "data", "dead", "_commits", "work"})
    size = old.shard_items if old else shard_items  # a resumed job keeps its shards
    with plan_aside(job=job, source=source, settings=settings, shard_items=size, near=store.scratch) as (
        new,
        aside,
    ):
        if old is None:
            store.delete(LISTING_FOLDER)
            for name in aside.names(LISTING_FOLDER):
                store.put(name, aside.path(name))
            store.write_json("plan.json", new.to_json())
            return new
        check_same(store, old, new, aside)
    return old


def existing(store: Store) -> Plan | None:
    """The plan that `store` holds, if any."""
    return Plan.from_json(store.read_json("plan.json")) if store.exists("plan.json") else None


def check_same(store: Store, old: Plan, new: Plan, aside: Store) -> None:
    """Raises `PlanError` unless both plans are for the same work; `aside` has the new one's listing."""
    if old.fingerprint != new.fingerprint:
        raise PlanError(_difference(store, old, new, aside))


def refuse_foreign(store: Store, ours: set[str]) -> None:
    """Raises `PlanError` if the folder has anything but `ours`: it is somebody's, not a job's."""
    foreign = [name for name in store.top() if name not in ours | {".lock"}]
    if foreign:
        raise PlanError(
            f"{store.uri} is not empty ({foreign[0]}, …) and not ours; choose a new folder for --out"
        )


def _difference(store: Store, old: Plan, new: Plan, aside: Store) -> str:
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
        found.append(_input_difference(store, old, aside, new))
        found[-1] += " (if it was mended after it became a dead letter: llmvis retry)"
    return (
        f"{store.uri} holds a job with another plan: {'; '.join(found) or 'another format'}. "
        "Choose a new --out, or delete this one if it is not needed."
    )


def _input_difference(before_store: Store, old: Plan, now_store: Store, new: Plan) -> str:
    counts = f"{new.items} items, were {old.items}" if new.items != old.items else "the input has changed"
    for shard in range(min(old.shards, new.shards)):
        before, now = read_shard(before_store, shard), read_shard(now_store, shard)
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
