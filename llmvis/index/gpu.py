"""Search and training on a GPU, where faiss has one: exact search of batches, lists of scalar codes, k-means.

**Not run so far: written for faiss-gpu 1.15 without a GPU at hand.** What needs none (the merging of lists, the
check of answers) is tested; the rest has tests marked `gpu`.

A GPU only proposes: the caller's fp16 vectors give the scores, and of exact search the proof that no row is
missed. It knows no deleted rows and no conditions, for faiss selects no ids there; with those the processor searches.

Shape legend: N vectors, D dimensions, Q queries, k answers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import faiss as _faiss
import numpy as np
import numpy.typing as npt

faiss: Any = _faiss  # its types know nothing of GPUs
F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

MOST = 2_048
"""Answers, and lists probed, that faiss finds on a GPU."""
BLOCK_ROWS = 65_536


def available() -> bool:
    """Whether this faiss was made for GPUs, and there is one."""
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


@functools.cache
def _resources() -> Any:
    return faiss.StandardGpuResources()  # holds memory, so one for all


def assign_on_gpu(ivf: Any) -> None:
    """Has the k-means of `ivf.train` assign vectors on all GPUs: nearly all of what training takes."""
    if available():
        ivf.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlat(ivf.d, ivf.metric_type))


class FlatOnGpu:
    """All vectors of an index on one GPU, as the fp16 that they are. Raises `RuntimeError` where they do not fit."""

    def __init__(self, vectors: Sequence[F16]) -> None:
        config = faiss.GpuIndexFlatConfig()
        config.useFloat16 = True
        index = faiss.GpuIndexFlatIP(_resources(), vectors[0].shape[1], config)
        self._index, self._longest = fill(index, vectors)

    def propose(self, queries: F32, k: int) -> tuple[I64, F32]:
        """See `propose`."""
        return propose(self._index, self._longest, queries, k)


def fill(index: Any, vectors: Sequence[F16]) -> tuple[Any, float]:
    """Adds them, in float32 as faiss takes them; returns the norm of the longest, too."""
    longest = 0.0
    for shard in vectors:
        for at in range(0, len(shard), BLOCK_ROWS):
            block = shard[at : at + BLOCK_ROWS].astype(np.float32)
            index.add(block)
            longest = max(longest, float(np.linalg.norm(block, axis=1).max()))
    return index, longest


def propose(index: Any, longest: float, queries: F32, k: int) -> tuple[I64, F32]:
    """Rows `(Q, c)` among which the `k` best are likely, and `(Q,)` the largest score that another row can have.

    The index rounds queries to fp16 and sums in float32. So its scores differ from the true ones by no more than
    `(‖q - fp16(q)‖ + γ ‖q‖) ‖x‖`; γ is taken four times as large as that of float32 sums in any order.
    """
    count = min(2 * k + 16, MOST, index.ntotal)
    scores, rows = index.search(queries, count)
    if count == index.ntotal:
        return rows, np.full(len(queries), -np.inf, np.float32)
    rounded = queries.astype(np.float16).astype(np.float32)
    sums = 4 * queries.shape[1] * 2.0**-24 * np.linalg.norm(queries, axis=1)
    bound = (np.linalg.norm(queries - rounded, axis=1) + sums) * longest
    return rows, (scores[:, -1] + bound).astype(np.float32)


class ListsOnGpu:
    """The lists of all shards on one GPU. Raises `RuntimeError` where they do not fit, or are of no kind for GPUs."""

    def __init__(self, trained: Any, lists: Sequence[Any]) -> None:
        self._index = faiss.index_cpu_to_gpu(_resources(), 0, merged(trained, lists))

    def search(self, queries: F32, k: int, probes: int) -> tuple[F32, I64]:
        self._index.nprobe = probes
        scores, rows = self._index.search(queries, k)
        return scores, rows


def merged(trained: Any, lists: Sequence[Any]) -> Any:
    """A copy of a trained index that holds the inverted lists of all shards; the trained one has empty lists after."""
    empty = faiss.ArrayInvertedLists(trained.nlist, trained.code_size)
    empty.this.disown()
    trained.replace_invlists(empty, True)  # those of the shard that it searched last would be copied, too
    ivf = faiss.clone_index(trained)
    for shard in lists:
        for number in range(ivf.nlist):
            if size := shard.list_size(number):
                ivf.invlists.add_entries(number, size, shard.get_ids(number), shard.get_codes(number))
    ivf.ntotal = ivf.invlists.compute_ntotal()
    return ivf
