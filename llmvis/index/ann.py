"""Compressed vectors in inverted lists: train once, add shard by shard, search all shards as one. faiss inside.

A trained index is a blob without vectors; every shard is made from the same blob (its hash is checked
by the caller: lists made under another rotation would mix without an error), and holds only its
inverted lists, memory-mapped. A search finds the nearest centroids once, then scans each shard's lists.

Shape legend: N vectors, D dimensions, Q queries, k answers, P lists probed.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
import numpy.typing as npt

from llmvis.index.exact import F32, I64, best_of, use_threads
from llmvis.storage import StorageError

faiss: Any = _faiss  # its types leave out most of what is used here
KMEANS_ITERATIONS = 10
QUERY_BITS = 4
"""Of a query against RaBitQ codes; 0 (floats) is 150 times slower."""
QUERY_BLOCK = 256
"""Queries that are searched at a time, so that the candidates of many shards fit the memory."""


def train(vectors: F32, factory: str, seed: int = 0) -> bytes:
    """An index without vectors, trained on a sample `float32 (N, D)`: spherical k-means, the same for one seed."""
    use_threads()
    index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    ivf = faiss.extract_index_ivf(index)
    ivf.cp.spherical, ivf.cp.seed, ivf.cp.niter = True, seed, KMEANS_ITERATIONS
    ivf.cp.min_points_per_centroid, ivf.cp.max_points_per_centroid = 1, 10**6  # the sample is the caller's
    if isinstance(faiss.downcast_index(index), faiss.IndexPreTransform):
        rotation = faiss.downcast_VectorTransform(index.chain.at(0))
        rotation.init(seed + 1)
        rotation.is_trained = True
    index.train(vectors)
    return bytes(faiss.serialize_index(index))


def write_lists(blob: bytes, parts: Iterable[tuple[int, F32]], path: Path) -> None:
    """Adds `(first row, float32 (N, D))` parts to a copy of the trained index; writes its lists alone to `path`."""
    use_threads()
    index = _deserialize(blob)
    for first, vectors in parts:
        index.add_with_ids(vectors, np.arange(first, first + len(vectors), dtype=np.int64))
    try:
        faiss.write_InvertedLists(faiss.extract_index_ivf(index).invlists, faiss.FileIOWriter(str(path)))
    except RuntimeError as error:
        raise StorageError(f"{path.parent}: inverted lists cannot be written ({error}); make room") from error


class ListShards:
    """The shards of one trained index, opened for search; one search at a time.

    Raises `StorageError` where the blob and the lists are not of `dim` dimensions, or a shard's lists do
    not hold its `rows`.
    """

    def __init__(self, blob: bytes, paths: Iterable[Path], rows: Iterable[int], dim: int) -> None:
        try:
            self._index = _deserialize(blob)
            self._ivf = faiss.extract_index_ivf(self._index)
            self._lists = [
                faiss.read_InvertedLists(faiss.FileIOReader(str(path)), faiss.IO_FLAG_MMAP) for path in paths
            ]
        except RuntimeError as error:
            raise StorageError(
                f"faiss cannot read an index's lists ({str(error)[:200]}); build it anew"
            ) from error
        self.lists = int(self._ivf.nlist)
        self.code_bytes = int(self._ivf.code_size)
        if self._index.d != dim or self._index.ntotal != 0:
            raise StorageError(f"the trained index is not of {dim} dimensions and empty; build it anew")
        for inverted, count in zip(self._lists, rows, strict=True):
            shape = (inverted.nlist, inverted.code_size)
            if shape != (self.lists, self.code_bytes) or inverted.compute_ntotal() != count:
                raise StorageError("inverted lists are not those of their index and shard; build it anew")
            inverted.prefetch_nthread = 0  # 32 threads a shard and query, for lists that are in memory

    def search(
        self, queries: F32, k: int, probes: int, allowed: npt.NDArray[np.uint8] | None = None
    ) -> tuple[F32, I64]:
        """The `k` nearest by compressed vectors, best first: scores `(Q, k)` and global rows `(Q, k)`, -1 where none.

        allowed: a bitmap of global rows, least bit first; only those are found.
        """
        use_threads()
        blocks = [queries[at : at + QUERY_BLOCK] for at in range(0, len(queries), QUERY_BLOCK)]
        found = [self._search(block, k, min(probes, self.lists), allowed) for block in blocks]
        return np.concatenate([scores for scores, _ in found]), np.concatenate([rows for _, rows in found])

    def _search(
        self, queries: F32, k: int, probes: int, allowed: npt.NDArray[np.uint8] | None
    ) -> tuple[F32, I64]:
        moved = queries
        if isinstance(self._index, faiss.IndexPreTransform):
            moved = self._index.chain.at(0).apply(queries)
        moved = np.ascontiguousarray(moved, dtype=np.float32)
        coarse = faiss.downcast_index(self._ivf.quantizer)
        if isinstance(coarse, faiss.IndexHNSW):
            coarse.hnsw.efSearch = max(64, 2 * probes)
        near, lists = coarse.search(moved, probes)
        parameters = self._parameters(probes, allowed)
        scores = np.empty((len(self._lists), len(queries), k), np.float32)
        rows = np.empty(scores.shape, np.int64)
        self._ivf.nprobe = probes
        for shard, inverted in enumerate(self._lists):
            self._ivf.replace_invlists(inverted, False)
            self._ivf.search_preassigned_c(
                len(queries), faiss.swig_ptr(moved), k, faiss.swig_ptr(lists), faiss.swig_ptr(near),
                faiss.swig_ptr(scores[shard]), faiss.swig_ptr(rows[shard]), False, parameters,
            )  # fmt: skip
        return best_of(list(zip(scores, rows, strict=True)), k)

    def _parameters(self, probes: int, allowed: npt.NDArray[np.uint8] | None) -> Any:
        chosen = {} if allowed is None else {"sel": faiss.IDSelectorBitmap(allowed)}
        if isinstance(self._ivf, faiss.IndexIVFRaBitQ):
            return faiss.IVFRaBitQSearchParameters(nprobe=probes, qb=QUERY_BITS, **chosen)
        return faiss.SearchParametersIVF(nprobe=probes, **chosen)


def _deserialize(blob: bytes) -> Any:
    return faiss.deserialize_index(np.frombuffer(blob, np.uint8))  # owns itself; a downcast copy would not
