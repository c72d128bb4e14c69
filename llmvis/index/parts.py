"""What an index is built from: parts, cut into pieces, gathered into shards of vectors and metadata.

A part is a table of rows that can be read anywhere, in this process or in a task on another node: a file
of an encode job, a half-million rows of clip-retrieval's, a shard of an index that is compacted. It does
not know who reads it where, and nothing of lists.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmvis.index.exact import F16
from llmvis.index.manifest import IndexMismatchError
from llmvis.index.shard import open_vectors, read_metadata
from llmvis.storage import NewFile, open_store, sha256_bytes

OFF_UNIT = 0.01
"""A length this far from 1 is made 1 and counted; fp16 rounds by less."""

Each = Callable[..., Iterator[tuple[int, Any]]]
"""`each(function, items, what=…, alone=False)` → (place, `function(item)`) for every item, in any order.

function and items are picklable; `what` says in a word what is done; with `alone` each wants a machine for
itself. `in_turn` is one, Ray tasks are another.
"""


class Part(Protocol):
    """Rows to be indexed. Picklable."""

    @property
    def rows(self) -> int: ...

    @property
    def source(self) -> dict[str, Any]:
        """Opens the pictures of its rows again."""
        ...

    @property
    def key(self) -> str:
        """The same for the same rows, such as a hash; empty where that is not known."""
        ...

    def read(self, start: int, stop: int) -> Iterator[pa.Table]:
        """Rows from `start` to `stop` with `id`, an `embedding` (fixed-size list of floats) and other columns."""
        ...


@dataclass(frozen=True, kw_only=True)
class InMemory:
    """A table that is in memory already."""

    table: pa.Table
    source: dict[str, Any]
    key: str = ""

    @property
    def rows(self) -> int:
        return int(self.table.num_rows)

    def read(self, start: int, stop: int) -> Iterator[pa.Table]:
        yield self.table.slice(start, stop - start)


@dataclass(frozen=True, kw_only=True)
class OldShard:
    """A shard of the index at `uri`, less its dead rows. `dead`: `(rows,)` bits, least first; None: none."""

    uri: str
    shard: dict[str, Any]
    dim: int
    source: dict[str, Any]
    dead: bytes | None

    @property
    def rows(self) -> int:
        return len(self._places())

    def _places(self) -> npt.NDArray[np.int64]:
        """Of the living rows in the shard."""
        if self.dead is None:
            return np.arange(self.shard["rows"])
        bits = np.unpackbits(np.frombuffer(self.dead, np.uint8), count=self.shard["rows"], bitorder="little")
        return np.flatnonzero(bits == 0)

    @property
    def key(self) -> str:
        dead = sha256_bytes(self.dead) if self.dead else ""
        return f"{self.shard['vectors']['sha256']} {self.shard['metadata']['sha256']} {dead}"

    def read(self, start: int, stop: int) -> Iterator[pa.Table]:
        store, places = open_store(self.uri), self._places()[start:stop]
        vectors = open_vectors(store, self.shard, self.dim)[places]
        rows = read_metadata(store, self.shard).take(pa.array(places))
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), self.dim)
        yield rows.append_column("embedding", column)


class Piece(NamedTuple):
    """Some rows of a part."""

    part: Part
    start: int
    stop: int


def pieces(parts: Iterable[Part], rows: int) -> Iterator[list[Piece]]:
    """Parts cut and gathered into groups of `rows` rows of one source, the last of a source shorter; none empty."""
    group: list[Piece] = []
    room = rows
    for part in parts:
        if group and part.source != group[0].part.source:
            yield group
            group, room = [], rows
        at = 0
        while at < part.rows:
            stop = min(part.rows, at + room)
            group.append(Piece(part, at, stop))
            room -= stop - at
            at = stop
            if room == 0:
                yield group
                group, room = [], rows
    if group:
        yield group


class NewShard(NamedTuple):
    """A shard to be written: the name of its files without ending, and what it is made of."""

    uri: str
    name: str
    pieces: list[Piece]
    dim: int
    known: Callable[[pa.Array], npt.NDArray[np.bool_]] | None
    """Which ids stay out, because the index has them; None: all come in. Asked once a shard: it reads all of them."""

    @property
    def key(self) -> str:
        """What its files depend on; empty where that is not known."""
        if not all(piece.part.key for piece in self.pieces):
            return ""
        told = [f"{piece.part.key} {piece.start} {piece.stop}" for piece in self.pieces]
        return sha256_bytes("\n".join([self.name, str(self.dim), repr(self.known), *told]).encode())


def write_shard(new: NewShard) -> dict[str, Any]:
    """Writes a shard's vectors and metadata; what the manifest says of it, with `counts` of what became of its rows.

    Vectors become float16 of unit length. Counts: `indexed`, `not_finite`, `zero` (which are left out, as no
    direction can be told), `known`; and, of the indexed, `made_unit_length`. A shard of no rows has no files.

    Raises `IndexMismatchError` for embeddings of another dimension.
    """
    store = open_store(new.uri)
    counts: Counter[str] = Counter(indexed=0, not_finite=0, zero=0, known=0, made_unit_length=0)
    given = [table for piece in new.pieces for table in piece.part.read(piece.start, piece.stop)]
    if new.known is not None:
        given = _without(given, new.known, counts)
    tables, blocks = list[pa.Table](), list[F16]()
    while given:
        table = given.pop(0)  # one by one, so that a shard is not in memory twice
        vectors, good = _unit(table["embedding"], new.dim, counts)
        blocks.append(vectors)
        tables.append(table.drop_columns(["embedding"]).filter(pa.array(good)))
    rows = counts["indexed"]
    entry: dict[str, Any] = {"rows": rows, "counts": dict(counts)}
    if rows == 0:
        return entry
    with store.create(f"{new.name}.npy") as npy:
        header = {"descr": "<f2", "fortran_order": False, "shape": (rows, new.dim)}
        np.lib.format.write_array_header_1_0(npy, header)
        for block in blocks:
            npy.write(block.tobytes())
    with store.create(f"{new.name}.arrow") as arrow:
        _write_arrow(arrow, pa.concat_tables(tables, promote_options="default").combine_chunks())
    return entry | {
        "vectors": {"name": f"{new.name}.npy", "bytes": npy.bytes, "sha256": npy.sha256},
        "metadata": {"name": f"{new.name}.arrow", "bytes": arrow.bytes, "sha256": arrow.sha256},
    }


def _without(
    tables: list[pa.Table], known: Callable[[pa.Array], npt.NDArray[np.bool_]], counts: Counter[str]
) -> list[pa.Table]:
    """The rows whose id is not known."""
    ids = pa.chunked_array([chunk for table in tables for chunk in table["id"].chunks], pa.string())
    new = ~known(ids.combine_chunks())
    counts["known"] += int(np.count_nonzero(~new))
    firsts = np.cumsum([0, *(table.num_rows for table in tables)])
    return [
        table.filter(pa.array(new[first : first + table.num_rows]))
        for table, first in zip(tables, firsts, strict=False)
    ]


def _write_arrow(file: NewFile, table: pa.Table) -> None:
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=table.num_rows)


def _unit(column: pa.ChunkedArray, dim: int, counts: Counter[str]) -> tuple[F16, npt.NDArray[np.bool_]]:
    """The vectors `float16 (n, D)` that have a direction, of unit length, and which `(N,)` those are."""
    found = column.type.list_size
    if found != dim:
        raise IndexMismatchError(f"embeddings have {found} dimensions, the model has {dim}")
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    given = np.asarray(flat).reshape(-1, dim)
    with np.errstate(over="ignore"):  # becomes infinite, and is counted
        vectors = given.astype(np.float32)
    length = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    finite = np.isfinite(vectors).all(axis=1)
    good = np.asarray(finite & (length > 0))
    off = good & (np.abs(length - 1) > OFF_UNIT)
    counts.update(
        indexed=int(good.sum()), not_finite=int((~finite).sum()), zero=int((finite & ~good).sum()),
        made_unit_length=int(off.sum()),
    )  # fmt: skip
    if given.dtype != np.float16 or off.any():
        vectors /= np.where(good, length, 1)[:, None]
        given = vectors.astype(np.float16)
    kept = given if good.all() else given[good]
    return np.ascontiguousarray(kept, dtype="<f2"), good


def in_turn(
    function: Callable[[Any], Any], items: Sequence[Any], *, what: str, alone: bool = False
) -> Iterator[tuple[int, Any]]:
    """An `Each` in this process, one item after the other."""
    del what, alone
    for place, item in enumerate(items):
        yield place, function(item)
