"""An exact index over embeddings: fp16 vectors and Arrow metadata, both memory-mapped, both hashed.

    CURRENT                → `000001 <sha256 of its manifest>`
    manifests/000001.json  → model, dimension, shards with their hashes
    shards/000001-00000.npy, .arrow

A build writes new files and then swaps CURRENT, so a reader has one version or the
next and never a mix. Adding writes new shards beside the ones there. No file is opened for
use before its hash is checked: flipped bits would load without an error and answer wrong.
The only module that imports faiss; it does not know where vectors come from or what a picture is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmvis.schema import FORMAT_VERSION, UserError
from llmvis.storage import NewFile, StorageError, Store, open_store, sha256_bytes

F32 = npt.NDArray[np.float32]

SOURCE = "_source"
"""In a hit's metadata: which of the index's sources opens its picture."""
SHARD_ROWS = 1_000_000
BLOCK_ROWS = 65_536
"""Rows that are in memory as float32 at a time while a shard is scanned."""


class QueryShapeError(UserError):
    """A question that no index can answer: no k, or a vector that is not finite."""


class IndexMismatchError(StorageError):
    """An index that does not go with the model or the question."""


@dataclass(frozen=True, kw_only=True)
class IndexInfo:
    """What an index is of: the encoder that made its vectors and the collection they stand for."""

    model: dict[str, Any]  # name, fingerprint, dim, licence
    source: dict[str, Any]  # opens the pictures again: sources.open_reader


def build(store: Store, info: IndexInfo, tables: Iterable[pa.Table], *, add: bool = False) -> dict[str, Any]:
    """Publishes a new version from tables with an `embedding` column (`fixed_size_list<float16>[D]`).

    All other columns become metadata. Streams: one table and one shard's metadata in
    memory. Call it under `store.lock()`. Returns the manifest.

    add: the rows of the current version stay, and of the new ones those come in whose `id` it
    does not have.

    Raises:
        IndexMismatchError: a table's dimension is not the model's, or what is added to is of another model.
        StorageError: there is nothing to add to.
    """
    version = 1 + max((int(name[-11:-5]) for name in store.names("manifests")), default=0)
    before = _in_force(store)
    shards: list[dict[str, Any]] = []
    sources: list[dict[str, Any]] = []
    if add:
        with open_index(store.uri, info.model["fingerprint"]) as old:
            shards, sources = list(old.manifest["shards"]), list(old.sources)
            tables = _without(tables, old.ids())
    if info.source not in sources:
        sources.append(info.source)
    for number, group in enumerate(_groups(tables, SHARD_ROWS)):
        name = f"shards/{version:06}-{number:05}"
        shard = _write_shard(store, name, group, int(info.model["dim"]))
        shards.append({**shard, "source": sources.index(info.source)})
    if add and not any(shard["vectors"]["name"].startswith(f"shards/{version:06}") for shard in shards):
        there = _current(store)  # all of it was there; the run that put it there may have been killed then
        _sweep(store, there)
        return there
    manifest = {
        "format": FORMAT_VERSION,
        "version": version,
        "replaces": before,  # not always the number before: a build that was killed has one, too
        "kind": "flat",
        "metric": "inner_product",
        "dtype": "float16",
        "model": info.model,
        "sources": sources,
        "rows": sum(s["rows"] for s in shards),
        "shards": shards,
        "faiss": faiss.__version__,
    }
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
    versions = (current["version"], current.get("replaces", current["version"] - 1))
    manifests = {f"manifests/{v:06}.json" for v in versions} & set(store.names("manifests"))
    shards = [shard for name in manifests for shard in store.read_json(name)["shards"]]
    store.sweep("manifests", manifests)
    store.sweep("shards", {shard[part]["name"] for shard in shards for part in ("vectors", "metadata")})


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


def _vectors(column: pa.ChunkedArray, dim: int) -> npt.NDArray[np.float16]:
    """`(N, D)` of a fixed-size-list column. Raises `IndexMismatchError` for another D."""
    found = column.type.list_size
    if found != dim:
        raise IndexMismatchError(f"embeddings have {found} dimensions, the model has {dim}")
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(flat, dtype="<f2").reshape(-1, dim)


class FlatIndex:
    """An open index; `search` compares a query with every vector."""

    def __init__(self, store: Store, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        self.dim = int(manifest["model"]["dim"])
        self.rows = int(manifest["rows"])
        self.sources: list[dict[str, Any]] = manifest["sources"]
        """What opens pictures again (`sources.open_reader`); a hit's metadata says which one."""
        self._close = ExitStack()
        self._shards = [self._open(store, shard) for shard in manifest["shards"]]

    def _open(self, store: Store, shard: dict[str, Any]) -> tuple[npt.NDArray[np.float16], pa.Table]:
        """A shard's vectors and metadata; raises `StorageError` where the files are not what the manifest says."""
        names = {part: shard[part]["name"] for part in ("vectors", "metadata")}
        paths = {part: store.fetch(name, shard[part]["sha256"]) for part, name in names.items()}
        try:  # a right hash says who wrote a file, not that it is harmless
            vectors = np.load(paths["vectors"], mmap_mode="r", allow_pickle=False)
            mapped = self._close.enter_context(pa.memory_map(str(paths["metadata"])))
            metadata = pa.ipc.open_file(mapped).read_all()
            metadata.validate()
        except (ValueError, OSError) as error:
            raise StorageError(
                f"shard {names['vectors']} of {store.uri} cannot be read ({' '.join(str(error).split())[:200]}); "
                "build the index anew"
            ) from error
        if vectors.dtype != np.dtype("<f2") or vectors.shape != (shard["rows"], self.dim):
            raise IndexMismatchError(
                f"shard {names['vectors']} is {vectors.dtype} {vectors.shape}, not float16 "
                f"{(shard['rows'], self.dim)}; build the index anew"
            )
        if metadata.num_rows != shard["rows"] or metadata.schema.get_field_index("id") < 0:
            raise IndexMismatchError(
                f"{names['metadata']} has not {shard['rows']} rows with an id; build the index anew"
            )
        return vectors, metadata

    def search(self, queries: F32, k: int) -> tuple[F32, npt.NDArray[np.int64]]:
        """The `k` rows of largest inner product for each query, best first.

        `queries (Q, D)` float32 → scores `(Q, k')` float32 and global rows `(Q, k')` int64,
        k' = min(k, rows). Exact up to the fp16 that vectors are kept in. Raises
        `IndexMismatchError` for another D and `QueryShapeError` for k < 1 or queries that
        are not finite.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise IndexMismatchError(f"queries are {queries.shape}, the index has {self.dim} dimensions")
        if k < 1:
            raise QueryShapeError(f"k is {k}; ask for at least 1")
        if not np.isfinite(queries).all():
            raise QueryShapeError("a query vector is not finite")
        k = min(k, self.rows)
        best = np.empty((len(queries), 0), np.float32)
        rows = np.empty((len(queries), 0), np.int64)
        start = 0
        for vectors, _ in self._shards:
            for at in range(0, len(vectors), BLOCK_ROWS):
                block = vectors[at : at + BLOCK_ROWS].astype(np.float32)
                scores, found = faiss.knn(
                    queries, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT
                )
                best, rows = _merge(best, rows, scores, found + start + at, k)
            start += len(vectors)
        return best, rows

    def metadata(self, rows: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
        """The metadata of global rows `(N,)`, in their order; `SOURCE` is a place in `sources`."""
        sizes = np.array([len(vectors) for vectors, _ in self._shards])
        ends = np.cumsum(sizes)
        found = []
        for row in rows:
            shard = int(np.searchsorted(ends, row, side="right"))
            local = int(row - (ends[shard] - sizes[shard]))
            (row_metadata,) = self._shards[shard][1].slice(local, 1).to_pylist()
            found.append({**row_metadata, SOURCE: self.manifest["shards"][shard]["source"]})
        return found

    def ids(self) -> set[str]:
        """The `id` of every row."""
        return {row_id for _, metadata in self._shards for row_id in metadata["id"].to_pylist()}

    def __enter__(self) -> FlatIndex:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._shards = []
        self._close.close()


def _merge(
    best: F32, rows: npt.NDArray[np.int64], scores: F32, found: npt.NDArray[np.int64], k: int
) -> tuple[F32, npt.NDArray[np.int64]]:
    """The k best of two lists for each query; of equal scores the earlier row comes first."""
    both, all_rows = np.concatenate([best, scores], 1), np.concatenate([rows, found], 1)
    order = np.lexsort((all_rows, -both), axis=1)[:, :k]
    return np.take_along_axis(both, order, 1), np.take_along_axis(all_rows, order, 1)


def open_index(path: str, fingerprint: str | None = None) -> FlatIndex:
    """The current version of the index at `path`, every file of it checked.

    With `fingerprint`, the index must have been made by the encoder of that fingerprint.
    Raises `StorageError` where there is no index or a byte of it is damaged and
    `IndexMismatchError` for another model.
    """
    store = open_store(path)
    manifest = _current(store)
    if fingerprint is not None and manifest["model"]["fingerprint"] != fingerprint:
        raise IndexMismatchError(
            f"{store.uri} was made with {manifest['model']['name']} "
            f"({manifest['model']['fingerprint'][:12]}…), the query comes from a model with fingerprint "
            f"{fingerprint[:12]}…; search with the same model, or encode anew"
        )
    return FlatIndex(store, manifest)


def read_info(path: str) -> dict[str, Any]:
    """The manifest of the index at `path`, checked, without opening its vectors."""
    return _current(open_store(path))


def _current(store: Store) -> dict[str, Any]:
    if not store.exists("CURRENT"):
        raise StorageError(f"{store.uri} is no index; make one with python -m jobs.index")
    match = re.fullmatch(rb"(\d{6}) ([0-9a-f]{64})\n", store.read("CURRENT"))
    if match is None:
        raise StorageError(f"{store.place('CURRENT')} is damaged; build the index anew")
    name = f"manifests/{match[1].decode()}.json"
    store.read_checked(name, match[2].decode())
    manifest = store.read_json(name)
    if manifest.get("format") != FORMAT_VERSION or manifest.get("kind") != "flat":
        raise StorageError(
            f"{store.uri} has format {manifest.get('format')}, kind {manifest.get('kind')!r}; "
            "this version cannot read it"
        )
    if problem := _problem(manifest):
        raise StorageError(f"{store.uri}: {name} is not one of llmvis: {problem}; build the index anew")
    return manifest


def _problem(manifest: dict[str, Any]) -> str | None:
    """What is wrong with a manifest, whose hash is right: whoever can write an index can write that too."""
    model, sources, shards = (manifest.get(key) for key in ("model", "sources", "shards"))
    if not isinstance(model, dict) or not _whole(model.get("dim"), 1):
        return "it names no model with a dimension"
    if not all(isinstance(model.get(key), str) for key in ("name", "fingerprint")):
        return "its model has no name and fingerprint"
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        return "it has no list of sources"
    if not isinstance(shards, list):
        return "it has no list of shards"
    for shard in shards:
        if not isinstance(shard, dict) or not _whole(shard.get("rows"), 1):
            return "a shard has no number of rows"
        if not _whole(shard.get("source"), 0) or shard["source"] >= len(sources):
            return f"a shard is of source {shard.get('source')!r}"
        for part, ending in (("vectors", "npy"), ("metadata", "arrow")):
            file = shard.get(part)
            if not isinstance(file, dict) or not isinstance(file.get("sha256"), str):
                return f"a shard has no hash of its {part}"
            if not re.fullmatch(rf"shards/\d{{6}}-\d{{5}}\.{ending}", str(file.get("name"))):
                return f"a shard's {part} are said to lie in {file.get('name')!r}"
    rows = sum(shard["rows"] for shard in shards)
    return None if manifest.get("rows") == rows else f"it counts {manifest.get('rows')!r} rows for {rows}"


def _whole(value: object, least: int) -> bool:
    return type(value) is int and value >= least
