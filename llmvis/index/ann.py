"""Compressed vectors in inverted lists: train once, add shard by shard, search all shards as one. faiss inside.

A trained index is a blob without vectors; every shard is made from the same blob (its hash is checked
by the caller: lists made under another rotation would mix without an error), and holds only its
inverted lists, memory-mapped. A search finds the nearest centroids once, then scans each shard's lists.

Shape legend: N vectors, D dimensions, Q queries, k answers, P lists probed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
import numpy.typing as npt

from llmvis.index import gpu
from llmvis.index.exact import F32, FEW_QUERIES, I64, Mask, best_of, use_threads
from llmvis.index.planner import KMEANS_ITERATIONS
from llmvis.storage import StorageError

faiss: Any = _faiss  # its types leave out most of what is used here
FIT_OF = 16
"""Of so many vectors one is measured against its centroid."""
BREADTH, QUERY_BREADTH = 64, 256
"""Of the search for the nearest centroids in a graph, for pictures and for queries: at 64 it finds all of 4,096
centroids' nearest for pictures, and .96 of the nearest 16 for texts, which lie apart; at 256 all."""
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
    gpu.assign_on_gpu(ivf)
    index.train(vectors)
    return bytes(faiss.serialize_index(index))


def write_lists(blob: bytes, parts: Iterable[tuple[int, F32]], path: Path) -> float:
    """Adds `(first row, float32 (N, D))` parts to a copy of the trained index; writes its lists alone to `path`.

    Returns how well they fit: the mean cosine with the centroid of their list, of every `FIT_OF`th.
    """
    use_threads()
    index = _deserialize(blob)
    coarse = faiss.downcast_index(faiss.extract_index_ivf(index).quantizer)
    if isinstance(coarse, faiss.IndexHNSW):
        coarse.hnsw.efSearch = BREADTH
    fits = []
    for first, vectors in parts:
        index.add_with_ids(vectors, np.arange(first, first + len(vectors), dtype=np.int64))
        fits.append(_nearest_lists(index, vectors[::FIT_OF], 1)[1])
    try:
        faiss.write_InvertedLists(faiss.extract_index_ivf(index).invlists, faiss.FileIOWriter(str(path)))
    except RuntimeError as error:
        raise StorageError(f"{path.parent}: inverted lists cannot be written ({error}); make room") from error
    return float(np.concatenate(fits).mean())


def _nearest_lists(index: Any, vectors: F32, probes: int) -> tuple[F32, F32, I64]:
    """Vectors as lists see them `(N, D)`; of each the nearest centroids: cosines and lists `(N, probes)`."""
    moved = vectors
    if isinstance(index, faiss.IndexPreTransform):
        moved = index.chain.at(0).apply(vectors)
    moved = np.ascontiguousarray(moved, dtype=np.float32)
    coarse = faiss.downcast_index(faiss.extract_index_ivf(index).quantizer)
    if isinstance(coarse, faiss.IndexHNSW):
        coarse.hnsw.efSearch = max(QUERY_BREADTH, 4 * probes)
    near, lists = coarse.search(moved, probes)
    return moved, near, lists


class ListShards:
    """The shards of one trained index, opened for search; one search at a time. To be closed.

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

    def close(self) -> None:
        """Unmaps the lists."""
        for inverted in self._lists:  # Python cannot destroy them; an index destroys those that it owned
            self._ivf.replace_invlists(inverted, True)
        self._lists = []

    def __enter__(self) -> ListShards:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def search(self, queries: F32, k: int, probes: int, allowed: Mask | None = None) -> tuple[F32, I64]:
        """The `k` nearest by compressed vectors, best first: scores `(Q, k)` and global rows `(Q, k)`, -1 where none.

        allowed: `(N,)` over all global rows; only those are found.
        """
        use_threads()
        probes = min(probes, self.lists)
        batch = allowed is None and len(queries) > FEW_QUERIES and max(k, probes) <= gpu.MOST
        if batch and self._on_gpu is not None:
            return self._on_gpu.search(np.ascontiguousarray(queries), k, probes)
        blocks = [queries[at : at + QUERY_BLOCK] for at in range(0, len(queries), QUERY_BLOCK)]
        bits = None if allowed is None else np.packbits(allowed, bitorder="little")
        found = [self._search(block, k, probes, bits) for block in blocks]
        return np.concatenate([scores for scores, _ in found]), np.concatenate([rows for _, rows in found])

    @functools.cached_property
    def _on_gpu(self) -> gpu.ListsOnGpu | None:
        """None where there is no GPU that they fit on, of a kind that it searches."""
        flat = isinstance(faiss.downcast_index(self._ivf.quantizer), faiss.IndexFlat)
        if not (gpu.available() and flat and isinstance(self._index, faiss.IndexIVFScalarQuantizer)):
            return None
        try:
            return gpu.ListsOnGpu(self._index, self._lists)
        except RuntimeError:
            return None

    def _search(
        self, queries: F32, k: int, probes: int, bits: npt.NDArray[np.uint8] | None
    ) -> tuple[F32, I64]:
        moved, near, lists = _nearest_lists(self._index, queries, probes)
        parameters = self._parameters(probes, bits)
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

    def _parameters(self, probes: int, bits: npt.NDArray[np.uint8] | None) -> Any:
        chosen = {} if bits is None else {"sel": faiss.IDSelectorBitmap(bits)}
        if isinstance(self._ivf, faiss.IndexIVFRaBitQ):
            return faiss.IVFRaBitQSearchParameters(nprobe=probes, qb=QUERY_BITS, **chosen)
        return faiss.SearchParametersIVF(nprobe=probes, **chosen)


def _deserialize(blob: bytes) -> Any:
    return faiss.deserialize_index(np.frombuffer(blob, np.uint8))  # owns itself; a downcast copy would not
