"""An open index: every file of it checked by its hash, vectors, lists and metadata memory-mapped.

Flipped bits would load without an error and answer wrong, so no file is used before its hash is right;
and since whoever can write an index can write right hashes, no file is trusted for its hash alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmvis.index.ann import ListShards
from llmvis.index.exact import F16, F32, I64, Shard, nearest, take
from llmvis.index.manifest import SOURCE, IndexMismatchError, QueryShapeError, read_current
from llmvis.index.where import mask, parse_where
from llmvis.storage import StorageError, Store, open_store

FEW_ROWS = 10_000
"""Allowed rows that are compared one by one: that takes no longer than a search of lists."""


def open_index(path: str, fingerprint: str | None = None) -> Index:
    """The current version of the index at `path`, every file of it checked.

    With `fingerprint`, the index must have been made by the encoder of that fingerprint.
    Raises `StorageError` where there is no index or a byte of it is damaged and
    `IndexMismatchError` for another model.
    """
    store = open_store(path)
    manifest = read_current(store)
    if fingerprint is not None and manifest["model"]["fingerprint"] != fingerprint:
        raise IndexMismatchError(
            f"{store.uri} was made with {manifest['model']['name']} "
            f"({manifest['model']['fingerprint'][:12]}…), the query comes from a model with fingerprint "
            f"{fingerprint[:12]}…; search with the same model, or encode anew"
        )
    return Index(store, manifest)


class Index:
    """Answers by inner product: exact, or by inverted lists and the exact scores of the best they give.

    One search at a time.
    """

    def __init__(self, store: Store, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        self.dim = int(manifest["model"]["dim"])
        self.rows = int(manifest["rows"])
        self.sources: list[dict[str, Any]] = manifest["sources"]
        """What opens pictures again (`sources.open_reader`); a hit's metadata says which one."""
        self._close = ExitStack()
        self._shards: list[Shard] = []
        self._metadata: list[pa.Table] = []
        first = 0
        for shard in manifest["shards"]:
            vectors, metadata = self._open(store, shard)
            self._shards.append(Shard(first, vectors))
            self._metadata.append(metadata)
            first += len(vectors)
        self._firsts = np.array([shard.first for shard in self._shards], np.int64)
        self._lists = None if manifest["kind"] == "flat" else _open_lists(store, manifest)

    def _open(self, store: Store, shard: dict[str, Any]) -> tuple[F16, pa.Table]:
        """A shard's vectors and metadata; raises `StorageError` where the files are not what the manifest says."""
        names = {part: shard[part]["name"] for part in ("vectors", "metadata")}
        paths = {part: store.fetch(name, shard[part]["sha256"]) for part, name in names.items()}
        try:
            vectors = read_vectors(paths["vectors"])
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
        if not vectors.flags.c_contiguous:
            raise IndexMismatchError(f"shard {names['vectors']} is not in C order; build the index anew")
        if metadata.num_rows != shard["rows"] or metadata.schema.get_field_index("id") < 0:
            raise IndexMismatchError(
                f"{names['metadata']} has not {shard['rows']} rows with an id; build the index anew"
            )
        return vectors, metadata

    def search(
        self, queries: F32, k: int, *, where: str | None = None, exact: bool = False
    ) -> tuple[F32, I64]:
        """The `k` rows of largest inner product for each query, best first.

        `queries (Q, D)` float32 → scores `(Q, k')` float32 and global rows `(Q, k')` int64,
        k' = k, or the number of rows to choose from where that is less. Scores are exact inner products
        with the fp16 that vectors are kept in, also where an approximate index chose the rows.

        Args:
            where: only rows whose metadata fulfil this condition (`where.py`) are found.
            exact: compare with every vector, whatever the kind of the index.

        Raises `IndexMismatchError` for another D, `QueryShapeError` for k < 1 or queries that
        are not finite, `WhereError` for a condition that cannot be read.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise IndexMismatchError(f"queries are {queries.shape}, the index has {self.dim} dimensions")
        if k < 1:
            raise QueryShapeError(f"k is {k}; ask for at least 1")
        if not np.isfinite(queries).all():
            raise QueryShapeError("a query vector is not finite")
        allowed = None if where is None else self._fulfil(where)
        count = self.rows if allowed is None else len(allowed)
        if self._lists is None or exact or self._quicker_exact(count, allowed is not None):
            return nearest(self._shards, queries, k, allowed)
        return self._by_lists(self._lists, queries, min(k, count), allowed)

    def _quicker_exact(self, count: int, filtered: bool) -> bool:
        """Whether as many vectors are allowed as the lists of a search without a condition hold."""
        tuned = self.manifest["tuned"]
        assert self._lists is not None
        return count == 0 or (
            filtered and count <= max(FEW_ROWS, self.rows * tuned["nprobe"] / self._lists.lists)
        )

    def _by_lists(self, lists: ListShards, queries: F32, k: int, allowed: I64 | None) -> tuple[F32, I64]:
        """Compressed vectors name candidates, fp16 vectors the answer; more lists where they are fewer than k."""
        tuned = self.manifest["tuned"]
        share = 1.0 if allowed is None else len(allowed) / self.rows
        probes = min(
            lists.lists, int(np.ceil(tuned["nprobe"] / share))
        )  # as many compared as without condition
        candidates = min(self.rows, int(np.ceil(tuned["candidates"] * max(1.0, k / 10))))
        bits = None if allowed is None else _bitmap(allowed, self.rows)
        scores = np.empty((len(queries), k), np.float32)
        rows = np.empty(scores.shape, np.int64)
        todo = np.arange(len(queries))
        while len(todo):
            found = lists.search(queries[todo], candidates, probes, bits)[1]
            if found.max(initial=-1) >= self.rows:
                raise StorageError("inverted lists name rows that the index has not; build it anew")
            enough = (found >= 0).sum(1) >= k
            for query, near in zip(todo[enough], found[enough], strict=True):
                (scores[query],), (rows[query],) = nearest(
                    self._shards, queries[query : query + 1], k, np.sort(near[near >= 0])
                )
            todo = todo[~enough]
            if probes == lists.lists:
                break
            probes = min(2 * probes, lists.lists)
        if len(todo):  # a graph over the centroids need not reach all of them
            scores[todo], rows[todo] = nearest(self._shards, queries[todo], k, allowed)
        return scores, rows

    def _fulfil(self, where: str) -> I64:
        """Sorted global rows that fulfil a condition; a column that a shard lacks is null there."""
        fields = {field.name: field for table in self._metadata for field in table.schema}
        condition = parse_where(where, list(fields))
        found = [np.empty(0, np.int64)]
        for shard, table in zip(self._shards, self._metadata, strict=True):
            for name in fields.keys() - set(table.column_names):
                table = table.append_column(name, pa.nulls(table.num_rows, fields[name].type))
            found.append(shard.first + np.flatnonzero(mask(table, condition)))
        return np.concatenate(found)

    def vectors(self, rows: I64) -> F32:
        """The vectors `float32 (N, D)` of global rows `(N,)`."""
        return take(self._shards, rows).astype(np.float32)

    def metadata(self, rows: I64) -> list[dict[str, Any]]:
        """The metadata of global rows `(N,)`, in their order; `SOURCE` is a place in `sources`."""
        found = []
        for row in rows:
            shard = int(np.searchsorted(self._firsts, row, side="right")) - 1
            (row_metadata,) = self._metadata[shard].slice(int(row - self._firsts[shard]), 1).to_pylist()
            found.append({**row_metadata, SOURCE: self.manifest["shards"][shard]["source"]})
        return found

    def ids(self) -> set[str]:
        """The `id` of every row."""
        return {row_id for metadata in self._metadata for row_id in metadata["id"].to_pylist()}

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._shards, self._metadata, self._lists = [], [], None
        self._close.close()


def read_vectors(path: Path) -> F16:
    """A .npy file's array, memory-mapped. Raises `ValueError` or `OSError` where it is none."""
    mapped: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped.view(np.ndarray)  # numpy's own class for maps makes each slice slow


def _open_lists(store: Store, manifest: dict[str, Any]) -> ListShards:
    shards: Sequence[dict[str, Any]] = manifest["shards"]
    return ListShards(
        store.read_checked(manifest["trained"]["name"], manifest["trained"]["sha256"]),
        [store.fetch(shard["lists"]["name"], shard["lists"]["sha256"]) for shard in shards],
        [shard["rows"] for shard in shards],
        int(manifest["model"]["dim"]),
    )


def _bitmap(rows: I64, count: int) -> npt.NDArray[np.uint8]:
    flags = np.zeros(count, np.uint8)
    flags[rows] = 1
    return np.packbits(flags, bitorder="little")
