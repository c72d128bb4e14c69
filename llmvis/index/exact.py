"""Exact search over fp16 vectors where they lie, memory-mapped: every one is compared. faiss inside.

A few queries are compared with the fp16 codes themselves, at the speed of memory; many are a matrix
product with small blocks of float32 that stay in the processor's cache. Knows no files and no manifest.

Shape legend: N vectors, D dimensions, Q queries, k answers.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import faiss as _faiss
import numpy as np
import numpy.typing as npt

from llmvis.index import bf16

faiss: Any = _faiss  # its types leave out most of what is used here
F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

BLOCK_ROWS = 4096
"""Compared at a time: its float32 (8 MB at 512 dimensions) are used again before they leave the cache."""
FEW_QUERIES = 12
"""To here comparing with fp16 codes one query after the other takes less than the matrix product."""
SIEVE_WORK = 2**37
"""Multiplications from which bfloat16 saves as much time as it takes to load torch."""
GATHER_SHARE = 16
"""Of a block with fewer than one allowed row in so many, these are gathered; of others faiss passes over the rest."""
FEW_ANSWERS = 256
"""To here they are sorted all at once."""
ALONE = 8
"""Times as many rows at a time for a single query."""
THREAD_ROWS = 8 * BLOCK_ROWS
"""For a thread to be worth its start."""


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


def nearest(shards: Sequence[Shard], queries: F32, k: int, allowed: Mask | None = None) -> tuple[F32, I64]:
    """The `k` rows of largest inner product for each query, best first, of equal ones the earlier.

    `queries (Q, D)` → scores `float32 (Q, k')` and global rows `int64 (Q, k')`; k' is k, or the number of
    rows where that is less. Which of several equal rows are the last of the k is left open.

    allowed: `(N,)` over global rows, those of shards that are not here among them; only these are compared.
    """
    alone = len(queries) == 1 and allowed is None  # nobody else needs a block while it is in the cache
    threads = use_threads()
    most = _even(shards, threads) if alone else BLOCK_ROWS
    blocks = list(_blocks(shards, allowed, most))
    k = min(k, sum(block.size for block in blocks))
    if k == 0:
        return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if len(queries) > FEW_QUERIES:
        return _by_product(blocks, queries, k)
    bits = None if allowed is None else np.packbits(allowed, bitorder="little")
    threads = max(1, min(threads, sum(len(block.vectors) for block in blocks) // THREAD_ROWS))
    if threads == 1:
        return best_of([_by_codes(blocks, queries, k, bits)], k)
    parts = [blocks[number::threads] for number in range(threads)]
    return best_of(list(_pool(threads).map(lambda part: _by_codes(part, queries, k, bits), parts)), k)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)  # kept: to start threads takes a tenth of a short search


def _even(shards: Sequence[Shard], threads: int) -> int:
    """Rows of a block for a single query: no more than `ALONE` usual ones, and the same share for each thread."""
    rows = max((len(shard.vectors) for shard in shards), default=0)
    rounds = -(-rows // (threads * BLOCK_ROWS * ALONE))
    return max(1, -(-rows // max(1, threads * rounds)))


def nearest_of(shards: Sequence[Shard], query: F32, rows: I64, k: int) -> tuple[F32, I64]:
    """The `k` best of some global rows, all different, for one query `(D,)`: scores `(k,)` and rows `(k,)`.

    Scores are to the bit those that `nearest` gives a few queries.
    """
    rows = np.sort(rows)
    block = _Block(0, take(shards, rows), len(rows), None)
    scores, places = best_of([_by_codes([block], query[None], min(k, len(rows)), None)], k)
    return scores[0], rows[places[0]]


def take(shards: Sequence[Shard], rows: I64) -> F16:
    """The vectors `float16 (N, D)` of global rows `(N,)`, in their order."""
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    found = np.empty((len(rows), shards[0].vectors.shape[1]), np.float16)
    for shard in shards:
        begin, end = np.searchsorted(ordered, (shard.first, shard.first + len(shard.vectors))).tolist()
        if begin < end:
            found[order[begin:end]] = shard.vectors[ordered[begin:end] - shard.first]
    return found


def best_of(parts: Sequence[tuple[F32, I64]], k: int) -> tuple[F32, I64]:
    """Answers `(Q, …)` of several parts → the `k` best, of equal scores the earlier row first. -1 stands for none.

    Of many, which of several equal ones are the last of the k is left open.
    """
    scores = np.concatenate([scores for scores, _ in parts], 1)
    rows = np.concatenate([rows for _, rows in parts], 1)
    scores = np.where(rows < 0, np.float32(-np.inf), scores)
    if scores.shape[1] > max(4 * k, FEW_ANSWERS):  # sorting few takes less than sorting all
        near = np.argpartition(-scores, k, axis=1)[:, :k]
        scores, rows = np.take_along_axis(scores, near, 1), np.take_along_axis(rows, near, 1)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


class _Block(NamedTuple):
    """Vectors of one shard that are compared at a time."""

    first: int
    """Global row of the first."""
    vectors: F16
    size: int
    """Allowed ones."""
    allowed: Mask | None
    """Which; None: all."""

    def gathered(self) -> tuple[F16, I64]:
        """The allowed vectors, side by side, and their global rows."""
        if self.allowed is None:
            return self.vectors, self.rows()
        places = np.flatnonzero(self.allowed)
        return self.vectors[places], self.first + places

    def rows(self) -> I64:
        return np.arange(self.first, self.first + len(self.vectors))


def _blocks(shards: Sequence[Shard], allowed: Mask | None, most: int) -> Iterator[_Block]:
    """All that hold an allowed row, of no more than `most` rows."""
    for shard in shards:
        for at in range(0, len(shard.vectors), most):
            vectors, first = shard.vectors[at : at + most], shard.first + at
            some = None if allowed is None else allowed[first : first + len(vectors)]
            count = len(vectors) if some is None else int(np.count_nonzero(some))
            if count:
                yield _Block(first, vectors, count, None if count == len(vectors) else some)


def _by_codes(
    blocks: Sequence[_Block], queries: F32, k: int, bits: npt.NDArray[np.uint8] | None
) -> tuple[F32, I64]:
    """One query after the other over each block; a heap for each, which faiss keeps.

    bits: the allowed ones of all global rows, least bit first.
    """
    codec = _codec(queries.shape[1])
    selector = None if bits is None else faiss.IDSelectorBitmap(bits)
    scores = np.full((len(queries), k), np.finfo(np.float32).min, np.float32)
    rows = np.full(scores.shape, -1, np.int64)
    every = [_scanner(codec, query, None) for query in queries]
    some = every if selector is None else [_scanner(codec, query, selector) for query in queries]
    for block in blocks:
        scanners = every
        if block.allowed is not None and block.size * GATHER_SHARE >= len(block.vectors):
            vectors, ids, scanners = block.vectors, block.rows(), some
        else:
            vectors, ids = block.gathered()
        codes, id_list = _address(vectors), faiss.swig_ptr(ids)
        for scanner, heap, labels in zip(scanners, scores, rows, strict=True):
            scanner.scan_codes(len(ids), codes, id_list, faiss.swig_ptr(heap), faiss.swig_ptr(labels), k)
    return scores, rows


def _scanner(codec: Any, query: F32, selector: Any) -> Any:
    scanner = codec.select_InvertedListScanner(faiss.METRIC_INNER_PRODUCT, None, False, selector, False)
    scanner.set_query(faiss.swig_ptr(query))
    scanner.set_list(0, 0.0)
    return scanner


def _by_product(blocks: Sequence[_Block], queries: F32, k: int) -> tuple[F32, I64]:
    dim = queries.shape[1]
    # below it faiss compares one query at a time, which takes several times as long
    faiss.cvar.distance_compute_blas_threshold = 4 * dim
    work = len(queries) * dim * sum(block.size for block in blocks)
    if not _sieve_pays(work):
        return _by_blocks(blocks, queries, k, None)
    with bf16.threads(use_threads()):
        return _by_blocks(blocks, queries, k, bf16.Sieve(queries, BLOCK_ROWS))


def _by_blocks(blocks: Sequence[_Block], queries: F32, k: int, sieve: bf16.Sieve | None) -> tuple[F32, I64]:
    """All queries against one block after the other; with a sieve only what it leaves is compared in float32."""
    dim = queries.shape[1]
    scores = np.full((len(queries), k), -np.inf, np.float32)
    rows = np.full(scores.shape, -1, np.int64)
    for vectors, ids in _decoded(blocks, dim, _decode if sieve is None else sieve.decode):
        if sieve is not None and (rows[:, -1] >= 0).all():
            left = sieve.left(vectors, scores[:, -1])
            if left is not None:
                query, place = left
                exact = _products(queries, query, vectors, place)
                better = exact > scores[query, -1]
                _merge(scores, rows, query[better], exact[better], ids[place[better]])
                continue
        use_threads()
        near, found = faiss.knn(queries, vectors, min(k, len(ids)), metric=faiss.METRIC_INNER_PRODUCT)
        if sieve is not None:  # by one arithmetic all of them, so that equal vectors have equal scores
            every = np.repeat(np.arange(len(queries)), found.shape[1])
            near = _products(queries, every, vectors, found.ravel()).reshape(near.shape)
        better = np.flatnonzero(near.max(1) > scores[:, -1])
        if len(better):
            parts = [(scores[better], rows[better]), (near[better], ids[found[better]])]
            scores[better], rows[better] = best_of(parts, k)
    return scores, rows


def _sieve_pays(work: int) -> bool:
    """Whether bfloat16 is quicker; where torch is not loaded yet, its loading counts."""
    return (work >= SIEVE_WORK or "torch" in sys.modules) and bf16.is_native()


def _decoded(
    blocks: Sequence[_Block], dim: int, decode: Callable[[F16, F32], None]
) -> Iterator[tuple[F32, I64]]:
    """Allowed vectors and their global rows, good until the next: blocks with few allowed ones come together."""
    decoded, ids, held = np.empty((BLOCK_ROWS, dim), np.float32), np.empty(BLOCK_ROWS, np.int64), 0
    for number, block in enumerate(blocks, 1):
        vectors, ids[held : held + block.size] = block.gathered()
        decode(vectors, decoded[held : held + block.size])
        held += block.size
        if number == len(blocks) or held + blocks[number].size > BLOCK_ROWS:
            yield decoded[:held], ids[:held]
            held = 0


def _decode(codes: F16, out: F32) -> None:
    _codec(codes.shape[1]).decode_c(_address(codes), faiss.swig_ptr(out), len(codes))


def _products(queries: F32, query: I64, vectors: F32, place: I64) -> F32:
    """The inner product of each pair `(P,)` of a query and a vector.

    In one thread: faiss's would wait, busily, for more to do while torch's multiply on the same cores.
    """
    faiss.omp_set_num_threads(1)
    found = np.empty(len(query), np.float32)
    query, place = np.ascontiguousarray(query), np.ascontiguousarray(place)
    faiss.pairwise_indexed_inner_product(
        queries.shape[1], len(query), faiss.swig_ptr(queries), faiss.swig_ptr(query),
        faiss.swig_ptr(vectors), faiss.swig_ptr(place), faiss.swig_ptr(found),
    )  # fmt: skip
    use_threads()  # torch may have the same OpenMP, and would stay at one
    return found


def _merge(scores: F32, rows: I64, query: I64, new_scores: F32, new_rows: I64) -> None:
    """Puts pairs `(P,)`, in order of their queries, among the best `(Q, k)` of each query."""
    if not len(query):
        return
    asked, first, count = np.unique(query, return_index=True, return_counts=True)
    column = np.arange(len(query)) - np.repeat(first, count)
    line = np.repeat(np.arange(len(asked)), count)
    some = np.full((len(asked), int(count.max())), -np.inf, np.float32)
    theirs = np.full(some.shape, -1, np.int64)
    some[line, column], theirs[line, column] = new_scores, new_rows
    parts = [(scores[asked], rows[asked]), (some, theirs)]
    scores[asked], rows[asked] = best_of(parts, scores.shape[1])


def _codec(dim: int) -> Any:
    return faiss.ScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16)


def _address(vectors: F16) -> Any:
    """For faiss, which takes fp16 as bytes; numpy's own check of kinds stands in the way of memory maps."""
    assert vectors.flags.c_contiguous and vectors.dtype == np.dtype("<f2")
    return faiss.cast_integer_to_uint8_ptr(vectors.ctypes.data)
