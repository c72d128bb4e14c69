"""Dead letters back to work: what `llmvis retry` leaves behind, and how the next run takes it up. No Ray.

`release` notes all dead letters of a job in `retry.parquet` and takes the markers of the shards
that hold those to be tried again. The manifest and its files stay, so that readers have the
last result until the rerun publishes the next. `take_up` is called by that rerun before it
compares plans: an input that differs is accepted where its row was a dead letter, and nowhere else.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from llmvis.ledger import marker_name, parquet_bytes, read_data
from llmvis.plan import DUPLICATE, SHARDS_A_FILE, Plan, existing, plan_aside, read_shard, regroup
from llmvis.schema import Reason, UserError
from llmvis.sources import Source
from llmvis.storage import Store

RETRY = "retry.parquet"
"""In a job's folder: `id` and `reason` of each letter that was dead when a retry was asked for."""

PASSING = frozenset(
    {Reason.MISSING, Reason.UNREADABLE, Reason.CHANGED, Reason.CRASHED, Reason.TIMEOUT, Reason.OUT_OF_MEMORY}
)
"""Reasons that may be gone although the listing looks as before: a mount, a permission, a file put back,
a node with more memory."""


@dataclass(frozen=True, kw_only=True)
class Released:
    """What a retry put back to work.

    `letters` are tried again by reason, `others` stay dead unless their input is seen to have changed.
    """

    letters: dict[str, int]
    others: dict[str, int]
    shards: int


def release(store: Store, reasons: Collection[str]) -> Released:
    """Puts the dead letters with one of `reasons` back to work. Call it under `store.lock()`.

    A kill at any moment leaves a folder that the job can go on from, and where this can be done again.
    Raises `UserError` where the folder has no dead letter.
    """
    markers = store.read_all_json(store.names("_commits"))
    with_dead = [marker for marker in markers if marker["dead"]]
    asked = [marker for marker in with_dead if set(reasons) & set(marker["reasons"])]
    found = sum((Counter(marker["reasons"]) for marker in with_dead), Counter[str]())
    if not found:
        asked_before = "all were put back before: run the job's command again"
        state = asked_before if store.exists(RETRY) else "there is nothing to retry"
        raise UserError(f"{store.uri} has no dead letters: {state}")
    letters = [read_data(store, marker["dead"]).select(["id", "reason"]) for marker in with_dead]
    if store.exists(RETRY):  # an earlier retry that no run has taken up yet
        letters.append(_asked(store))
    store.write(RETRY, parquet_bytes(pa.concat_tables(letters)))
    store.delete("report.json")  # with it, all markers and the old manifest, the rerun would look finished
    for marker in asked:
        store.delete(marker_name(marker["shard"]))
    return Released(
        letters={reason: count for reason, count in sorted(found.items()) if reason in reasons},
        others={reason: count for reason, count in sorted(found.items()) if reason not in reasons},
        shards=len(asked),
    )


def take_up(store: Store, *, job: str, source: Source, settings: dict[str, Any]) -> None:
    """Makes the plan in `store` one for the input as it is now, where only released dead letters differ.

    Their rows are rewritten in place, so all other items keep their shards; the shards of those that
    changed lose their markers. A row that has gone from the input stays as it was. Where anything
    else differs, nothing is done: comparing plans will say what. Call it under `store.lock()`.
    """
    old = existing(store)
    if old is None or not store.exists(RETRY):
        return
    ids = _asked(store)["id"].combine_chunks().unique()
    with plan_aside(
        job=job, source=source, settings=settings, shard_items=old.shard_items, near=store.scratch
    ) as (new, aside):
        if new.fingerprint != old.fingerprint:
            now = json.loads(json.dumps(new.parts))  # as the old one's were written
            if (old.job, old.parts["settings"], old.parts["source"]) != (job, now["settings"], now["source"]):
                return
            if not _same_but(ids, store, old, aside, new):
                return
            _rewrite(store, old, new, pa.concat_tables(_rows(aside, new, ids, under=True)))
    store.delete(RETRY)


def _asked(store: Store) -> pa.Table:
    return pq.read_table(pa.BufferReader(store.read(RETRY)))


def _same_but(ids: pa.Array, old_store: Store, old: Plan, new_store: Store, new: Plan) -> bool:
    """Whether two listings have the same rows in the same order, those of `ids` left out."""
    before, now = (
        regroup(_rows(store, plan, ids, under=False), old.shard_items)
        for store, plan in ((old_store, old), (new_store, new))
    )
    return all(a is not None and b is not None and _equal(a, b) for a, b in zip_longest(before, now))


def _equal(a: pa.Table, b: pa.Table) -> bool:
    """The same rows; to Arrow, no NaN is like another, so then what would be written decides."""
    return a.equals(b) or parquet_bytes(a.combine_chunks()) == parquet_bytes(b.combine_chunks())


def _rows(store: Store, plan: Plan, ids: pa.Array, *, under: bool) -> Iterator[pa.Table]:
    """A listing's rows, shard by shard: those under `ids`, or all others."""
    for shard in range(plan.shards):
        rows = read_shard(store, shard)
        is_in = pa.compute.is_in(rows["id"], ids)
        yield rows.filter(is_in if under else pa.compute.invert(is_in))


def _rewrite(store: Store, old: Plan, new: Plan, mended: pa.Table) -> None:
    """The old listing with the rows of `mended` in the places of their ids, and the plan for it.

    An id that has another number of rows than before keeps what it had.
    """
    places: dict[str, list[int]] = {}
    for place, row_id in enumerate(mended["id"].to_pylist()):
        places.setdefault(row_id, []).append(place)
    before = Counter(
        row_id
        for rows in _rows(store, old, pa.array(places, pa.string()), under=True)
        for row_id in rows["id"].to_pylist()
    )
    left = {row_id: iter(found) for row_id, found in places.items() if len(found) == before[row_id]}
    bad = size = 0
    for start in range(0, old.shards, SHARDS_A_FILE):
        tables = []
        for shard in range(start, min(start + SHARDS_A_FILE, old.shards)):
            rows = read_shard(store, shard)
            take = [
                len(rows) + next(left[row_id]) if row_id in left else place
                for place, row_id in enumerate(rows["id"].to_pylist())
            ]
            merged = pa.concat_tables([rows, mended]).take(take)
            if not _equal(merged, rows):
                store.delete(marker_name(shard))
            planned = pa.compute.equal(merged["reason"], DUPLICATE).fill_null(False)
            bad += int(pa.compute.sum(pa.compute.and_not(merged["reason"].is_valid(), planned)).as_py() or 0)
            size += int(pa.compute.sum(merged["size"]).as_py() or 0)
            tables.append(merged)
        with (
            store.create(f"plan/{start // SHARDS_A_FILE:05}.parquet") as file,
            pq.ParquetWriter(file, mended.schema, compression="zstd") as writer,
        ):
            for table in tables:
                writer.write_table(table, row_group_size=old.shard_items)
    # the fingerprint is that of the input in its own order, which a mended picture may have changed
    plan = replace(old, fingerprint=new.fingerprint, parts=new.parts, bad=bad, bytes=size)
    store.write_json("plan.json", plan.to_json())
