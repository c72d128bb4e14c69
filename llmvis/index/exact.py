"""Exact search over fp16 vectors where they lie, memory-mapped: every one is compared. faiss inside.

A few queries are compared with the fp16 codes themselves, at the speed of memory; many are a matrix
product with small blocks of float32 that stay in the processor's cache. Knows no files and no manifest.

Shape legend: N vectors, D dimensions, Q queries, k answers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import faiss as _faiss
import numpy as np
import numpy.typing as npt

faiss: Any = _faiss  # its types leave out most of what is used here
F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

BLOCK_ROWS = 4096
"""Compared at a time: its float32 (8 MB at 512 dimensions) are used again before they leave the cache."""
FEW_QUERIES = 12
"""To here comparing with fp16 codes one query after the other takes less than the matrix product."""
THREAD_BLOCKS = 16
"""Of work for a thread to be worth its start."""


class Shard(NamedTuple):
    """Vectors `float16 (N, D)` and the global row of the first."""

    first: int
    vectors: F16


def use_threads() -> int:
    """Sets faiss to the threads that OMP_NUM_THREADS allows, or to one a core; returns their number.

    Said each time: other libraries of the process, and Ray, change faiss's own number.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    count = int(given) if given.isdecimal() and int(given) else len(os.sched_getaffinity(0))
    faiss.omp_set_num_threads(count)
    return count


def nearest(shards: Sequence[Shard], queries: F32, k: int, allowed: I64 | None = None) -> tuple[F32, I64]:
    """The `k` rows of largest inner product for each query, best first, of equal ones the earlier.

    `queries (Q, D)` → scores `float32 (Q, k')` and global rows `int64 (Q, k')`; k' is k, or the number of
    rows where that is less. Which of several equal rows are the last of the k is left open.

    allowed: sorted global rows; only those are compared.
    """
    spans = list(_spans(shards, allowed))
    k = min(k, sum(stop - start for _, start, stop in spans))
    if k == 0:
        return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    threads = use_threads()
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if len(queries) > FEW_QUERIES:
        return _by_product(spans, queries, k, allowed)
    threads = max(1, min(threads, len(spans) // THREAD_BLOCKS))
    if threads == 1:
        return best_of([_by_codes(spans, queries, k, allowed)], k)
    with ThreadPoolExecutor(threads) as pool:
        parts = [spans[number::threads] for number in range(threads)]
        return best_of(list(pool.map(lambda part: _by_codes(part, queries, k, allowed), parts)), k)


def take(shards: Sequence[Shard], rows: I64) -> F16:
    """The vectors `float16 (N, D)` of global rows `(N,)`, in their order."""
    order = np.argsort(rows, kind="stable")
    spans = _spans(shards, rows[order])
    found = np.concatenate([_block(span, rows[order])[0] for span in spans])
    result = np.empty_like(found)
    result[order] = found
    return result


def best_of(parts: Sequence[tuple[F32, I64]], k: int) -> tuple[F32, I64]:
    """Answers `(Q, …)` of several parts → the `k` best of all; of equal scores the earlier row. -1 stands for none."""
    scores = np.concatenate([scores for scores, _ in parts], 1)
    rows = np.concatenate([rows for _, rows in parts], 1)
    scores = np.where(rows < 0, np.float32(-np.inf), scores)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


_Span = tuple[Shard, int, int]
"""A shard and where a block of it begins and ends: among its vectors, or among the allowed rows."""


def _spans(shards: Sequence[Shard], allowed: I64 | None) -> Iterator[_Span]:
    for shard in shards:
        begin, end = 0, len(shard.vectors)
        if allowed is not None:
            begin, end = np.searchsorted(allowed, (shard.first, shard.first + end)).tolist()
        for at in range(begin, end, BLOCK_ROWS):
            yield shard, at, min(at + BLOCK_ROWS, end)


def _block(span: _Span, allowed: I64 | None) -> tuple[F16, I64]:
    """Vectors and global rows of a block."""
    shard, start, stop = span
    if allowed is None:
        return shard.vectors[start:stop], np.arange(shard.first + start, shard.first + stop)
    rows = allowed[start:stop]
    return shard.vectors[rows - shard.first], rows


def _by_codes(spans: Sequence[_Span], queries: F32, k: int, allowed: I64 | None) -> tuple[F32, I64]:
    """One query after the other over each block; a heap for each, which faiss keeps."""
    codec = _codec(queries.shape[1])
    scores = np.full((len(queries), k), np.finfo(np.float32).min, np.float32)
    rows = np.full(scores.shape, -1, np.int64)
    scanners = []
    for query in queries:
        scanner = codec.select_InvertedListScanner(faiss.METRIC_INNER_PRODUCT, None, False, None, False)
        scanner.set_query(faiss.swig_ptr(query))
        scanner.set_list(0, 0.0)
        scanners.append(scanner)
    for span in spans:
        vectors, ids = _block(span, allowed)
        codes, id_list = _address(vectors), faiss.swig_ptr(ids)
        for scanner, heap, labels in zip(scanners, scores, rows, strict=True):
            scanner.scan_codes(len(ids), codes, id_list, faiss.swig_ptr(heap), faiss.swig_ptr(labels), k)
    return scores, rows


def _by_product(spans: Sequence[_Span], queries: F32, k: int, allowed: I64 | None) -> tuple[F32, I64]:
    dim = queries.shape[1]
    codec = _codec(dim)
    # below it faiss compares one query at a time, which takes several times as long
    faiss.cvar.distance_compute_blas_threshold = 4 * dim
    decoded = np.empty((BLOCK_ROWS, dim), np.float32)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full(scores.shape, -1, np.int64)
    for span in spans:
        vectors, ids = _block(span, allowed)
        codec.decode_c(_address(vectors), faiss.swig_ptr(decoded), len(ids))
        near, found = faiss.knn(
            queries, decoded[: len(ids)], min(k, len(ids)), metric=faiss.METRIC_INNER_PRODUCT
        )
        better = np.flatnonzero(near[:, 0] > scores[:, -1])
        if len(better):
            parts = [(scores[better], rows[better]), (near[better], ids[found[better]])]
            scores[better], rows[better] = best_of(parts, k)
    return scores, rows


def _codec(dim: int) -> Any:
    return faiss.ScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16)


def _address(vectors: F16) -> Any:
    """For faiss, which takes fp16 as bytes; numpy's own check of kinds stands in the way of memory maps."""
    assert vectors.flags.c_contiguous and vectors.dtype == np.dtype("<f2")
    return faiss.cast_integer_to_uint8_ptr(vectors.ctypes.data)
