"""Builds an index: shards of vectors and metadata, for an approximate one inverted lists beside them, then the swap.

A build writes new files and then swaps CURRENT, so a reader has one version or the next and never a
mix, and a build that is killed changes nothing for readers. Adding writes new shards beside the ones
there. One shard's rows are in memory at a time. It does not know where vectors come from or what a
picture is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from llmvis.folders import files_of_versions, kept_versions
from llmvis.index.compress import EncodeTexts, compress
from llmvis.index.exact import F16
from llmvis.index.manifest import IndexInfo, IndexMismatchError
from llmvis.index.opened import open_index
from llmvis.index.planner import IndexPlan, plan_kind
from llmvis.schema import FORMAT_VERSION
from llmvis.storage import NewFile, Store, sha256_bytes


def build(
    store: Store,
    info: IndexInfo,
    tables: Iterable[pa.Table],
    *,
    plan: IndexPlan | None = None,
    add: bool = False,
    encode_texts: EncodeTexts | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Publishes a new version from tables with an `embedding` column (`fixed_size_list<float16>[D]`).

    All other columns become metadata. Call it under `store.lock()`. Returns the manifest.

    Args:
        plan: kind, recall and size of shards; lists are counted anew from the rows that really come.
            None: exact.
        add: the rows of the current version stay, and of the new ones those come in whose `id` it
            does not have. Kind, recall and lists are the current version's.
        encode_texts: with it an approximate index is tuned on captions, if there are any; else on
            its own pictures, which are easier to find.
        say: takes a line on what is done next.

    Raises:
        IndexMismatchError: a table's dimension is not the model's, or what is added to is of another model.
        IndexPlanError: an approximate index of no rows.
        StorageError: there is nothing to add to.
    """
    plan = plan or plan_kind("flat", 0, int(info.model["dim"]), 1.0)
    store.clear_unfinished()  # of a build that was killed: may be gigabytes
    version = 1 + max(kept_versions(store), default=0)
    in_force = _in_force(store)
    old: dict[str, Any] | None = None
    if add:
        with open_index(store.uri, info.model["fingerprint"]) as opened:
            old = opened.manifest
            tables = _without(tables, opened.ids())
    shards = list(old["shards"]) if old else []
    sources = list(old["sources"]) if old else []
    if info.source not in sources:
        sources.append(info.source)
    before = len(shards)
    dim = int(info.model["dim"])
    for number, group in enumerate(_groups(tables, plan.shard_rows)):
        shard = _write_shard(store, f"shards/{version:06}-{number:05}", group, dim)
        shards.append({**shard, "source": sources.index(info.source)})
    if old and len(shards) == before:
        _sweep(store, old)  # all of it was there; the run that put it there may have been killed then
        return old
    rows = sum(shard["rows"] for shard in shards)
    kind = old["kind"] if old else plan.kind
    manifest = {
        "format": FORMAT_VERSION,
        "version": version,
        "replaces": in_force,  # not always the number before: a build that was killed has one, too
        "kind": kind,
        "metric": "inner_product",
        "dtype": "float16",
        "model": info.model,
        "sources": sources,
        "rows": rows,
        "shards": shards,
        "faiss": faiss.__version__,
    }
    if kind != "flat":
        recall = old["tuned"]["target"] if old else plan.recall
        final = plan_kind(kind, rows, dim, recall)
        manifest |= compress(store, final, shards, version, old=old, encode_texts=encode_texts, say=say)
    data = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
    store.write(f"manifests/{version:06}.json", data)
    store.write("CURRENT", f"{version:06} {sha256_bytes(data)}\n".encode())
    _sweep(store, manifest)
    return manifest


def _without(tables: Iterable[pa.Table], known: set[str]) -> Iterator[pa.Table]:
    """The rows whose id is not known."""
    for table in tables:
        new = [row_id not in known for row_id in table["id"].to_pylist()]
        yield table if all(new) else table.filter(pa.array(new, pa.bool_()))


def _in_force(store: Store) -> int:
    """The version that readers open now; 0 where there is none that they can."""
    match = re.match(rb"(\d{6}) ", store.read("CURRENT")) if store.exists("CURRENT") else None
    return int(match[1]) if match else 0


def _sweep(store: Store, current: dict[str, Any]) -> None:
    """Removes all but the current version and the one that it replaced: a reader may be opening that one."""
    stay = (current["version"], current.get("replaces", current["version"] - 1))
    kept = [v for v in kept_versions(store) if v in stay]
    store.sweep("manifests", {f"manifests/{v:06}.json" for v in kept})
    store.sweep("shards", files_of_versions(store, kept))


def _groups(tables: Iterable[pa.Table], rows: int) -> Iterator[list[pa.Table]]:
    """Tables cut and gathered into groups of `rows` rows, the last one shorter; none is empty."""
    group: list[pa.Table] = []
    room = rows
    for table in tables:
        while table.num_rows > 0:
            head = table.slice(0, room)
            group.append(head)
            table = table.slice(head.num_rows)
            room -= head.num_rows
            if room == 0:
                yield group
                group, room = [], rows
    if group:
        yield group


def _write_shard(store: Store, name: str, tables: list[pa.Table], dim: int) -> dict[str, Any]:
    rows = sum(t.num_rows for t in tables)
    with store.create(f"{name}.npy") as vectors:
        header = {"descr": "<f2", "fortran_order": False, "shape": (rows, dim)}
        np.lib.format.write_array_header_1_0(vectors, header)
        for table in tables:
            vectors.write(_vectors(table["embedding"], dim).tobytes())
    metadata = pa.concat_tables([t.drop_columns(["embedding"]) for t in tables]).combine_chunks()
    with store.create(f"{name}.arrow") as arrow:
        _write_arrow(arrow, metadata)
    return {
        "rows": rows,
        "vectors": {"name": f"{name}.npy", "bytes": vectors.bytes, "sha256": vectors.sha256},
        "metadata": {"name": f"{name}.arrow", "bytes": arrow.bytes, "sha256": arrow.sha256},
    }


def _write_arrow(file: NewFile, table: pa.Table) -> None:
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=table.num_rows)


def _vectors(column: pa.ChunkedArray, dim: int) -> F16:
    """`(N, D)` of a fixed-size-list column. Raises `IndexMismatchError` for another D."""
    found = column.type.list_size
    if found != dim:
        raise IndexMismatchError(f"embeddings have {found} dimensions, the model has {dim}")
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(flat, dtype="<f2").reshape(-1, dim)
