"""Queries of a bulk search: texts of a file, or vectors in Parquet; one listing row is one query.

A query's id is made from its file's name and its row, since the same text may be asked for by two rows with
different columns beside it; that of a picture which an encode job wrote is the picture's own. Vectors are
read where the search runs, by a locator: the listing does not open them. Knows no index and no models.

Shape legend: N queries, D dimensions.
"""

from __future__ import annotations

import posixpath
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmvis.ledger import dead_row, read_manifest
from llmvis.schema import LISTING, ItemError, Reason, item_id
from llmvis.sources.base import LISTING_CHUNK, Source, SourceError, can_carry, carried, listing_table, shown
from llmvis.sources.files import Files, Stat, check_unchanged, in_order, open_files
from llmvis.sources.prompts import MOST_CHARACTERS, PROMPT_COLUMNS, read_texts
from llmvis.sources.tables import group_batches
from llmvis.storage import open_store

F32 = npt.NDArray[np.float32]
Read = tuple[pa.Table, npt.NDArray[Any], list[dict[str, Any]], dict[str, float]]

OURS = frozenset(LISTING.names) | {"text", "hits"}
"""Names of an output's own columns; a user's column of such a name is carried as `source_<name>`."""
EMBEDDING = "embedding"
READ_ROWS = 4_096
_OF_ENCODE = ("id", "path", "caption", "locator", "caption_truncated", EMBEDDING)
"""Columns of an encode job that become the listing's own, or mean nothing beside the picture."""


class Queries(Source, Protocol):
    """A source of queries."""

    pictures: bool
    """Whether a query is a picture, with a path and perhaps a caption."""
    texts: bool
    """Whether queries are texts; else they are vectors."""


def open_queries(queries: str, text_column: str | None, vector_column: str | None) -> Queries:
    """Texts, or vectors: of a finished encode job, of a folder of Parquet files, or of one such file.

    A single Parquet file without a named column is one of texts where it has a column of a usual name for them.
    Raises `SourceError` where there is nothing to read, with what to do.
    """
    if text_column and vector_column:
        raise SourceError("give --text-column or --vector-column, not both")
    files = open_files(queries)
    inside = files.names()  # none of a file, or of a text
    if b"plan.json" in inside or b"manifest.json" in inside:
        return _of_encode(queries, files)
    tables = [name for name in inside if name.endswith(b".parquet")]
    if tables:
        return VectorQueries(files, tables, vector_column or EMBEDDING)
    if inside:
        raise SourceError(f"{queries} holds no .parquet file; for pictures as queries encode them first")
    if queries.endswith(".parquet") and not text_column:
        folder, _, name = files.root.rpartition("/")
        above = open_files(folder or "/")
        if vector_column or not set(_names(above, name.encode())) & set(PROMPT_COLUMNS):
            return VectorQueries(above, [name.encode()], vector_column or EMBEDDING)
    elif vector_column:
        raise SourceError(f"{queries}: --vector-column is for Parquet files")
    return TextQueries(queries, text_column)


def _of_encode(queries: str, files: Files) -> VectorQueries:
    manifest = read_manifest(open_store(queries), "encode")
    if not manifest["files"]:
        raise SourceError(f"{queries} holds no vectors: every picture is a dead letter")
    names = [file["name"].encode() for file in manifest["files"]]
    found = VectorQueries(files, names, EMBEDDING, encoded=manifest["source"]["shown_root"])
    found.model = manifest["model"]
    return found


class TextQueries:
    """Texts of a .txt, .csv, .jsonl or .parquet file, or one text itself; the file's other columns come along."""

    pictures, texts = False, True

    def __init__(self, queries: str, column: str | None = None) -> None:
        self._read = read_texts(queries, column, "--text-column")
        others = [f for f in self._read.table.schema if f.name != self._read.column and can_carry(f.type)]
        self._others = [field.name for field in others]
        self.user_columns = carried(others, self._read.file or "the text", OURS)

    def describe(self) -> dict[str, Any]:
        """Without the file's hash: what the listing says of each text is enough, and a mended one can be retried."""
        return {
            "kind": "text queries",
            "root": self._read.file or "the text",
            "shown_root": "",
            "column": self._read.column,
        }

    def notes(self) -> list[str]:
        return []

    def listing(self) -> Iterator[pa.Table]:
        """`caption` holds the text; `path` says where it stands."""
        where = self._read.file.rpartition("/")[2] if self._read.file else "text"
        table = self._read.table
        for at in range(0, table.num_rows, LISTING_CHUNK):
            chunk = table.slice(at, LISTING_CHUNK)
            texts = ["" if text is None else str(text) for text in chunk[self._read.column].to_pylist()]
            places = [f"{where}#{at + i}" for i in range(len(texts))]
            wrong = [_wrong(text) for text in texts]
            listed: dict[str, list[Any]] = {
                "id": [item_id(place.encode()) for place in places],
                "path": places,
                "locator": [b""] * len(texts),
                "caption": texts,
                "reason": [error and str(error.reason) for error in wrong],
                "detail": [error and error.detail for error in wrong],
            }
            own = [chunk[name].combine_chunks() for name in self._others]
            yield listing_table(listed, pa.table(own, schema=pa.schema(self.user_columns)))


def _wrong(text: str) -> ItemError | None:
    if not text.strip() or "\0" in text:
        return ItemError(Reason.EMPTY, "no text in this row")
    if len(text) > MOST_CHARACTERS:
        return ItemError(
            Reason.TOO_LARGE, f"a text of {len(text):,} characters; the cap is {MOST_CHARACTERS:,}"
        )
    return None


class VectorQueries:
    """A column of vectors in Parquet files of one schema.

    Args:
        encoded: the files are an encode job's, whose pictures lie below this; ids and paths are then theirs.

    Raises:
        SourceError: a file cannot be read, lacks the column, or has other columns than the first.
    """

    texts = False

    def __init__(
        self, files: Files, names: Sequence[bytes], column: str, *, encoded: str | None = None
    ) -> None:
        self._files, self._names, self._column, self._encoded = files, list(names), column, encoded
        self.model: dict[str, Any] | None = None
        """Of an encode job: what made the vectors."""
        self.pictures = encoded is not None
        opened = list(in_order(self._open, self._names, files.threads))
        self._stats: list[Stat] = [stat for stat, _ in opened]
        schema = opened[0][1]
        for name, (_, other) in zip(self._names, opened, strict=True):
            if other.names != schema.names or other.types != schema.types:
                raise SourceError(f"{self._where(name)} has other columns than {self._where(self._names[0])}")
        self.dim = _list_size(schema, column, self._where(self._names[0]))
        left_out = {column, *(_OF_ENCODE if self.pictures else ())}
        others = [field for field in schema if field.name not in left_out]
        self._others = [field.name for field in others if can_carry(field.type)]
        self._notes = [
            f"column {field.name!r} holds raw bytes and is not carried along"
            for field in others
            if not can_carry(field.type)
        ]
        self.user_columns = carried(
            [field for field in others if can_carry(field.type)], self._where(self._names[0]), OURS
        )

    def _where(self, name: bytes) -> str:
        return f"{self._files.root}/{shown(name)}"

    def _open(self, name: bytes) -> tuple[Stat, pa.Schema]:
        try:
            with self._files.open(name, 0) as file:
                return self._files.stat(name), pq.read_schema(file)
        except ItemError as error:
            raise SourceError(f"{self._where(name)} cannot be read: {error.detail}") from error
        except (OSError, pa.ArrowException) as error:
            raise SourceError(f"{self._where(name)} is not a readable Parquet file: {error}") from error

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "vector queries",
            "root": self._files.root,
            "shown_root": "",
            "column": self._column,
            "files": [
                {"name": shown(name), "size": size, "mtime_ns": mtime_ns}
                for name, (size, mtime_ns) in zip(self._names, self._stats, strict=True)
            ],
        }

    def notes(self) -> list[str]:
        return self._notes

    def listing(self) -> Iterator[pa.Table]:
        """The locator is `file:row group:row`; no vector is read."""
        own = [*self._others, *(("id", "path", "caption") if self.pictures else ())]
        for number, name in enumerate(self._names):
            try:
                with self._files.open(name, 0) as source, pq.ParquetFile(source) as file:
                    row = 0
                    for group in range(file.num_row_groups):
                        at = 0
                        for batch in group_batches(file, group, own, LISTING_CHUNK):
                            yield self._chunk(batch, number, group, at, row)
                            at, row = at + batch.num_rows, row + batch.num_rows
            except ItemError as error:
                raise SourceError(f"{self._where(name)} cannot be read: {error.detail}") from error
            except (OSError, pa.ArrowException) as error:
                raise SourceError(f"{self._where(name)} cannot be read: {error}") from error

    def _chunk(self, batch: pa.RecordBatch, number: int, group: int, at: int, row: int) -> pa.Table:
        count = batch.num_rows
        listed: dict[str, list[Any]] = {
            "locator": [f"{number}:{group}:{at + i}".encode() for i in range(count)]
        }
        if self._encoded is not None:
            listed |= {"id": batch["id"].to_pylist(), "caption": batch["caption"].to_pylist()}
            listed["path"] = [posixpath.join(self._encoded, path) for path in batch["path"].to_pylist()]
        else:
            listed["path"] = [f"{shown(self._names[number])}#{row + i}" for i in range(count)]
            listed["id"] = [item_id(place.encode()) for place in listed["path"]]
        own = [batch[name] for name in self._others]
        return listing_table(listed, pa.table(own, schema=pa.schema(self.user_columns)))


def _names(files: Files, name: bytes) -> list[str]:
    """Columns of a table; none where it cannot be read, which opening it will say."""
    try:
        with files.open(name, 0) as file:
            return list(pq.read_schema(file).names)
    except (ItemError, OSError, pa.ArrowException):
        return []


def _list_size(schema: pa.Schema, column: str, where: str) -> int | None:
    """D of a column of vectors; None where each row has a length of its own. Raises `SourceError` for another kind."""
    kind = schema.field(column).type if column in schema.names else None
    fixed = kind is not None and pa.types.is_fixed_size_list(kind)
    if kind is None or not (fixed or pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        raise SourceError(
            f"{where} has no column of vectors {column!r}; it has {', '.join(schema.names)}: name it with "
            "--vector-column, or a column of texts with --text-column"
        )
    if not pa.types.is_floating(kind.value_type):
        raise SourceError(f"{where}: column {column!r} is {kind}; vectors are lists of floats")
    return int(kind.list_size) if fixed else None


@dataclass(frozen=True, kw_only=True)
class ReadTexts:
    """Listing rows of texts as they are: there is nothing to be read."""

    def __call__(self, rows: pa.Table) -> Read:
        return asked(rows, texts=True), np.zeros((rows.num_rows, 0), np.float32), [], {"read": 0.0}


@dataclass(frozen=True, kw_only=True)
class ReadVectors:
    """Listing rows of vectors → rows, and their vectors `float32 (N, D)` of unit length.

    One of another D, with a value that is not finite, or of no length is a dead letter.
    """

    source: dict[str, Any]  # what `VectorQueries.describe` said
    dim: int

    def __call__(self, rows: pa.Table) -> Read:
        begun = time.perf_counter()
        groups: dict[tuple[int, int], dict[int, int]] = {}
        for place, locator in enumerate(rows["locator"].to_pylist()):
            file, group, row = map(int, locator.split(b":"))
            groups.setdefault((file, group), {})[row] = place
        vectors = np.zeros((rows.num_rows, self.dim), np.float32)
        wrong: list[ItemError | None] = [None] * rows.num_rows
        for (file, group), wanted in groups.items():
            self._group(file, group, wanted, vectors, wrong)
        listed = rows.select(["id", "path"]).to_pylist()
        dead = [
            dead_row(row["id"], row["path"], "read", error)
            for row, error in zip(listed, wrong, strict=True)
            if error is not None
        ]
        good = np.array([error is None for error in wrong], bool)
        seconds = {"read": time.perf_counter() - begun}
        return asked(rows.filter(pa.array(good)), texts=False), vectors[good], dead, seconds

    def _group(
        self, file: int, group: int, wanted: dict[int, int], vectors: F32, wrong: list[ItemError | None]
    ) -> None:
        """Reads the rows `wanted` of one row group into their places of `vectors`, or says in `wrong` why not."""
        files, left = open_files(self.source["root"]), dict(wanted)
        known = self.source["files"][file]
        name = known["name"].encode()
        try:
            check_unchanged((known["size"], known["mtime_ns"]), files.stat(name))
            with files.open(name, 0) as source, pq.ParquetFile(source, pre_buffer=False) as table:
                at = 0
                for batch in group_batches(table, group, [self.source["column"]], READ_ROWS):
                    here = [row for row in left if row < at + batch.num_rows]
                    places = [left.pop(row) for row in here]
                    cells = batch.column(0).take(pa.array([row - at for row in here], pa.int64()))
                    vectors[places], errors = unit_vectors(cells, self.dim)
                    for place, error in zip(places, errors, strict=True):
                        wrong[place] = error
                    at += batch.num_rows
                    if not left:
                        return
            raise ItemError(Reason.MISSING, "the row group is shorter than its footer says")
        except ItemError as error:
            for place in left.values():
                wrong[place] = error
        except (OSError, pa.ArrowException) as error:
            for place in left.values():
                wrong[place] = ItemError(Reason.UNREADABLE, f"row group {group}: {error}")


def unit_vectors(cells: pa.Array, dim: int) -> tuple[F32, list[ItemError | None]]:
    """Lists of floats → `float32 (N, D)` of unit length, and what is wrong with each; wrong ones are zeros."""
    lengths = pc.list_value_length(cells).fill_null(-1).to_numpy(zero_copy_only=False)
    whole = lengths == dim
    found = np.zeros((len(cells), dim), np.float32)
    values = cells.filter(pa.array(whole)).flatten().to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore", invalid="ignore"):  # too large for float32 is not finite either
        found[whole] = values.reshape(-1, dim).astype(np.float32)
        sizes = np.linalg.norm(found.astype(np.float64), axis=1)
    errors: list[ItemError | None] = []
    for length, size in zip(lengths, sizes, strict=True):
        if length < 0:
            errors.append(ItemError(Reason.EMPTY, "no vector in this row"))
        elif length != dim:
            errors.append(ItemError(Reason.BAD_VECTOR, f"it has {length} dimensions, the index has {dim}"))
        elif not np.isfinite(size):
            errors.append(ItemError(Reason.BAD_VECTOR, "it is not finite"))
        else:
            errors.append(None if size > 0 else ItemError(Reason.BAD_VECTOR, "it is all zeros"))
    good = np.array([error is None for error in errors], bool)
    found[~good] = 0
    found[good] /= sizes[good, None]
    return found, errors


def asked(rows: pa.Table, *, texts: bool) -> pa.Table:
    """Listing rows as the queries of a search: `id, path, text, caption` and the user's columns."""
    own = [name for name in rows.column_names if name not in LISTING.names]
    none = pa.nulls(rows.num_rows, pa.string())
    text, caption = (rows["caption"], none) if texts else (none, rows["caption"])
    found = rows.select(["id", "path"]).append_column("text", text).append_column("caption", caption)
    for name in own:
        found = found.append_column(name, rows[name])
    return found
