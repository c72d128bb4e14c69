"""An open index: every file of it checked by its hash, vectors, lists and metadata memory-mapped."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from llmvis.index import gpu
from llmvis.index.ann import ListShards
from llmvis.index.exact import F32, FEW_QUERIES, I64, Mask, Shard, nearest, nearest_of, take
from llmvis.index.manifest import IndexMismatchError, QueryShapeError, check_fingerprint, read_current
from llmvis.index.rows import Rows
from llmvis.index.shard import open_vectors, several
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
    while True:
        manifest = read_current(store)
        if fingerprint is not None:
            check_fingerprint(store, manifest, fingerprint)
        try:
            return Index(store, manifest)
        except StorageError:
            if read_current(store)["version"] == manifest["version"]:
                raise  # else two changes came while it was being opened, and its files are gone


class Index:
    """Answers by inner product: exact, or by inverted lists and the exact scores of the best they give.

    One search at a time.
    """

    def __init__(self, store: Store, manifest: dict[str, Any]) -> None:
        self.manifest = manifest
        self.dim = int(manifest["model"]["dim"])
        self.total = int(manifest["rows"])
        """Rows in its shards, the deleted ones too: what global rows count."""
        self.sources: list[dict[str, Any]] = manifest["sources"]
        """What opens pictures again (`sources.open_reader`); a hit's metadata says which one."""
        self._shards: list[Shard] = []
        first = 0
        opened = several(lambda shard: open_vectors(store, shard, self.dim), manifest["shards"])
        for shard, vectors in zip(manifest["shards"], opened, strict=True):
            self._shards.append(Shard(first, vectors))
            first += shard["rows"]
        self._lists = None if manifest["kind"] == "flat" else _open_lists(store, manifest)
        self._rows = Rows(store, manifest)
        self.rows = self._rows.count
        """Rows that are found, all but the deleted ones."""

    def search(
        self, queries: F32, k: int, *, where: str | None = None, exact: bool = False
    ) -> tuple[F32, I64]:
        """The `k` rows of largest inner product for each query, best first.

        `queries (Q, D)` float32 → scores `(Q, k')` float32 and global rows `(Q, k')` int64,
        k' = k, or the number of living rows to choose from where that is less. Scores are exact inner products
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
        allowed = self._rows.allowed(where)
        count = self.rows if where is None or allowed is None else int(np.count_nonzero(allowed))
        if self._lists is None or exact or self._quicker_exact(count, allowed is not None):
            return self._exact(queries, k, allowed)
        return self._by_lists(self._lists, queries, min(k, count), allowed, count)

    def _exact(self, queries: F32, k: int, allowed: Mask | None) -> tuple[F32, I64]:
        """By a GPU where there is one for a batch; what it has not surely found, and all else, by the processor."""
        few = len(queries) <= FEW_QUERIES or 2 * k > gpu.MOST
        if few or allowed is not None or self._on_gpu is None:
            return nearest(self._shards, queries, k, allowed)
        return self._proven(*self._on_gpu.propose(queries, k), queries, min(k, self.total))

    def _proven(self, proposed: I64, others: F32, queries: F32, k: int) -> tuple[F32, I64]:
        """The best of proposed rows `(Q, c)`; of all rows, where the others' best score `(Q,)` may be as good."""
        scores, rows = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
        for query, some in enumerate(proposed):
            scores[query], rows[query] = nearest_of(self._shards, queries[query], some, k)
        open_ = np.flatnonzero(scores[:, -1] <= others)
        if len(open_):
            scores[open_], rows[open_] = nearest(self._shards, queries[open_], k)
        return scores, rows

    @functools.cached_property
    def _on_gpu(self) -> gpu.FlatOnGpu | None:
        """None where there is no GPU that the vectors fit on."""
        if not self._shards or not gpu.available():
            return None
        try:
            return gpu.FlatOnGpu([shard.vectors for shard in self._shards])
        except RuntimeError:
            return None

    def _quicker_exact(self, count: int, masked: bool) -> bool:
        """Whether as many vectors are allowed as the lists of a search of all hold."""
        tuned = self.manifest["tuned"]
        assert self._lists is not None
        return count == 0 or (
            masked and count <= max(FEW_ROWS, self.total * tuned["nprobe"] / self._lists.lists)
        )

    def _by_lists(
        self, lists: ListShards, queries: F32, k: int, allowed: Mask | None, count: int
    ) -> tuple[F32, I64]:
        """Compressed vectors name candidates, fp16 vectors the answer; more lists where they are fewer than k."""
        tuned = self.manifest["tuned"]
        # as many are compared as in a search of all
        probes = min(lists.lists, int(np.ceil(tuned["nprobe"] * self.total / count)))
        candidates = min(count, int(np.ceil(tuned["candidates"] * max(1.0, k / 10))))
        scores = np.empty((len(queries), k), np.float32)
        rows = np.empty(scores.shape, np.int64)
        todo = np.arange(len(queries))
        while len(todo):
            found = lists.search(queries[todo], candidates, probes, allowed)[1]
            if found.max(initial=-1) >= self.total:
                raise StorageError("inverted lists name rows that the index has not; build it anew")
            enough = (found >= 0).sum(1) >= k
            for query, near in zip(todo[enough], found[enough], strict=True):
                scores[query], rows[query] = nearest_of(self._shards, queries[query], near[near >= 0], k)
            todo = todo[~enough]
            if probes == lists.lists:
                break
            probes = min(2 * probes, lists.lists)
        if len(todo):  # a graph over the centroids need not reach all of them
            scores[todo], rows[todo] = nearest(self._shards, queries[todo], k, allowed)
        return scores, rows

    def vectors(self, rows: I64) -> F32:
        """The vectors `float32 (N, D)` of global rows `(N,)`."""
        return take(self._shards, rows).astype(np.float32)

    def metadata(self, rows: I64) -> list[dict[str, Any]]:
        """The metadata of global rows `(N,)`, in their order; `SOURCE` is a place in `sources`."""
        return self._rows.metadata(rows)

    def columns(self, rows: I64, names: Sequence[str]) -> pa.Table:
        """These text columns of the metadata of global rows `(N,)`, in their order, and `SOURCE` (see `metadata`)."""
        return self._rows.columns(rows, names)

    def ids(self) -> set[str]:
        """The `id` of every living row."""
        return self._rows.ids()

    def rows_of(self, ids: pa.Array) -> I64:
        """The global row of each of `ids (N,)`, texts, among the living: the first one; -1 where there is none."""
        return self._rows.rows_of(ids)

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._lists is not None:
            self._lists.close()
        self._shards, self._lists = [], None
        self.__dict__.pop("_on_gpu", None)
        self._rows.close()


def _open_lists(store: Store, manifest: dict[str, Any]) -> ListShards:
    shards: Sequence[dict[str, Any]] = manifest["shards"]
    return ListShards(
        store.read_checked(manifest["trained"]["name"], manifest["trained"]["sha256"]),
        several(lambda shard: store.fetch(shard["lists"]["name"], shard["lists"]["sha256"]), shards),
        [shard["rows"] for shard in shards],
        int(manifest["model"]["dim"]),
    )
