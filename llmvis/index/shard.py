"""One shard of an index, opened: its vectors and metadata, memory-mapped, when their hashes are right.

Flipped bits would load without an error and answer wrong, so no file is used before its hash is right;
and since whoever can write an index can write right hashes, no file is trusted for its hash alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmvis.index.exact import F16
from llmvis.index.manifest import IndexMismatchError
from llmvis.storage import StorageError, Store

FETCHES = 8
"""Files at a time."""

T = TypeVar("T")


def several(function: Callable[[dict[str, Any]], T], shards: Sequence[dict[str, Any]]) -> list[T]:
    """`function` of each shard, several at a time: hashes are computed, and far files come, beside each other."""
    with ThreadPoolExecutor(FETCHES) as pool:
        return list(pool.map(function, shards))


def open_vectors(store: Store, shard: dict[str, Any], dim: int) -> F16:
    """The shard's vectors `float16 (rows, dim)`. Raises `StorageError` where its file is not what the manifest says."""
    name = shard["vectors"]["name"]
    path = store.fetch(name, shard["vectors"]["sha256"])
    try:
        vectors = read_vectors(path)
    except (ValueError, OSError) as error:
        raise _unreadable(store, name, error) from error
    if vectors.dtype != np.dtype("<f2") or vectors.shape != (shard["rows"], dim):
        raise IndexMismatchError(
            f"shard {name} is {vectors.dtype} {vectors.shape}, not float16 {(shard['rows'], dim)}; "
            "build the index anew"
        )
    if not vectors.flags.c_contiguous:
        raise IndexMismatchError(f"shard {name} is not in C order; build the index anew")
    return vectors


def read_metadata(store: Store, shard: dict[str, Any]) -> pa.Table:
    """What the shard knows of its rows, an `id` each. Raises `StorageError` as `open_vectors` does."""
    name = shard["metadata"]["name"]
    path = store.fetch(name, shard["metadata"]["sha256"])
    try:
        metadata = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        metadata.validate()
    except (ValueError, OSError) as error:
        raise _unreadable(store, name, error) from error
    place = metadata.schema.get_field_index("id")
    if metadata.num_rows != shard["rows"] or place < 0 or metadata.schema.field(place).type != pa.string():
        raise IndexMismatchError(
            f"{name} has not {shard['rows']} rows with an id that is a text; build the index anew"
        )
    return metadata


def _unreadable(store: Store, name: str, error: Exception) -> StorageError:
    return StorageError(
        f"shard {name} of {store.uri} cannot be read ({' '.join(str(error).split())[:200]}); build the index anew"
    )


def read_vectors(path: Path) -> F16:
    """A .npy file's array, memory-mapped. Raises `ValueError` or `OSError` where it is none."""
    mapped: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped.view(np.ndarray)  # numpy's own class for maps makes each slice slow
