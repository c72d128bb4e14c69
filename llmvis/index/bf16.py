"""Which rows can be among the nearest, by a matrix product in bfloat16: twice as fast, and none that counts is lost.

A processor with bfloat16 instructions multiplies such matrices at twice its float32 rate. Their rounding is
bounded, so a row whose rounded score lies further below the k-th best score so far than the bound cannot be
an answer; what is left, a few rows for each query, is compared exactly by the caller. The bound, for a query q
and a vector x with rounded q', x' and u = 2⁻⁸, the unit roundoff of bfloat16:

    |q·x - q'·x'| ≤ |(q - q')·x| + |q'·(x - x')| ≤ (‖q - q'‖ + u ‖q'‖) ‖x‖        for |xᵢ - xᵢ'| ≤ u |xᵢ|
    |q'·x' - S|   ≤ γ ‖q'‖ ‖x'‖ ≤ γ (1 + u) ‖q'‖ ‖x‖       S summed in float32 in any order, γ = 2 D 2⁻²⁴

‖q - q'‖ is taken from each query, ‖x‖ from the longest vector of a block. So q·x ≥ t gives S ≥ t - bound; and
rounding keeps order, so the product's own last rounding to bfloat16 leaves S' ≥ bfloat16(t - bound).

Knows no shards; torch is loaded when it is first used.

Shape legend: N vectors, D dimensions, Q queries.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

F16 = npt.NDArray[np.float16]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

MOST_LEFT = 1 / 32
"""Of all pairs of a query and a vector: comparing more exactly takes as long as a float32 product of all."""
_ROUNDOFF = 2.0**-8
_TINY = 1e-30
"""Far more than what a processor flushes to zero."""


@functools.cache
def is_native() -> bool:
    """Whether this processor multiplies in bfloat16; elsewhere it is imitated, slowly."""
    import torch

    cpu: Any = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch for a block: by itself it takes one a core, and leaves the core's second to others."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Sieve:
    """Queries `float32 (Q, D)`, held against blocks of no more than `rows` vectors."""

    def __init__(self, queries: F32, rows: int) -> None:
        import torch

        self._torch: Any = torch
        self._queries = torch.from_numpy(queries).bfloat16()
        rounded = self._queries.float().numpy()
        sums = 2 * queries.shape[1] * 2.0**-24 * (1 + _ROUNDOFF)
        bound = _length(queries - rounded) + (_ROUNDOFF + sums) * _length(rounded)
        self._bound = bound * 1.0001  # these lines are computed in floats, too
        # made once: a block's memory is slower to get than to fill
        self._vectors = torch.empty((rows, queries.shape[1]), dtype=torch.bfloat16)
        self._scores = torch.empty(len(queries) * rows, dtype=torch.bfloat16)
        self._above = torch.empty(len(queries) * rows, dtype=torch.bool)

    def decode(self, codes: F16, out: F32) -> None:
        """Vectors `float16 (N, D)` as float32."""
        assert codes.flags.c_contiguous and codes.shape == out.shape
        torch = self._torch
        # torch warns of memory that it may not write to, such as a map; it only reads
        memory = (ctypes.c_uint16 * codes.size).from_address(codes.ctypes.data)
        found = torch.frombuffer(memory, dtype=torch.float16)
        torch.from_numpy(out).copy_(found.view(out.shape))

    def left(self, vectors: F32, least: F32) -> tuple[I64, I64] | None:
        """Which queries, and which of `vectors (N, D)`, can have a product above `least (Q,)`: two arrays of pairs.

        None where they are so many that a float32 product of all is quicker.
        """
        torch, shape = self._torch, (len(least), len(vectors))
        longest = float(_length(vectors).max())
        lowest = torch.from_numpy((least - self._bound * longest - _TINY).astype(np.float32)).bfloat16()
        with torch.inference_mode():
            block = self._vectors[: len(vectors)].copy_(torch.from_numpy(vectors))
            scores, above = (part[: shape[0] * shape[1]].view(shape) for part in (self._scores, self._above))
            torch.mm(self._queries, block.T, out=scores)
            torch.ge(scores, lowest[:, None], out=above)
        found = np.flatnonzero(above.numpy())
        return None if len(found) > MOST_LEFT * above.numel() else np.divmod(found, len(vectors))


def _length(vectors: F32) -> npt.NDArray[np.float64]:
    """`(N,)`: the norm of each."""
    squares: npt.NDArray[np.float64] = np.einsum("nd,nd->n", vectors, vectors)
    return np.sqrt(squares)
