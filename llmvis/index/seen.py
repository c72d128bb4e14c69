"""Whether a vector is near one that was kept before, without comparing it with all of them. faiss inside.

Kept vectors lie in lists around centroids of spherical k-means, as fp16, and a question looks into the few
lists that are nearest to it; rows are added as they are kept. Knows no files and no pictures.

Shape legend: N vectors, D dimensions.
"""

from __future__ import annotations

import faiss
import numpy as np
import numpy.typing as npt

from llmvis.index.ann import train
from llmvis.index.exact import F32, use_threads
from llmvis.index.planner import LEAST_POINTS_A_LIST, list_count

PROBES = 8
"""Lists that are looked into. Of 100,000 mixes of real embeddings, a third of them near copies, 8 of 512 lists
missed 1 of 9,812 at a cosine of .97 and none of 31,667 at .9; 2 lists missed 4 and 122."""


class Seen:
    """Unit vectors that were kept so far.

    Args:
        sample: `float32 (N, D)` of unit length, what the lists are made for; chosen by chance, the same each time.
        rows: how many may be kept in all.
    """

    def __init__(self, sample: F32, rows: int) -> None:
        blob = train(sample, f"IVF{_lists(min(rows, len(sample)))},SQfp16")
        self._index = faiss.deserialize_index(np.frombuffer(blob, np.uint8))
        faiss.extract_index_ivf(self._index).nprobe = PROBES

    def add(self, vectors: F32) -> None:
        """Keeps unit vectors `float32 (N, D)`."""
        use_threads()
        self._index.add(vectors)

    def near(self, vectors: F32, threshold: float) -> npt.NDArray[np.bool_]:
        """bool `(N,)`: whether each has a cosine above `threshold` with one that was found among the kept."""
        use_threads()
        scores, _ = self._index.search(vectors, 1)
        found: npt.NDArray[np.bool_] = scores[:, 0] > threshold
        return found


def sample_size(rows: int) -> int:
    """How many of `rows` vectors are enough to make lists for them."""
    return min(rows, LEAST_POINTS_A_LIST * _lists(rows))


def _lists(rows: int) -> int:
    """Half of what an index has: it is trained for one pass, and that takes most of its time."""
    return max(1, list_count(rows) // 2)
