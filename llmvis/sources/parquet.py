"""Pictures in Parquet: as bytes, as Hugging Face image structs, or as paths beside the tables.

Every file's footer is checked before any work, so that a table lacking the column
stops the job at once and not as empty rows in its middle. The listing reads all
columns but the picture bytes, one row group at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmvis.schema import ItemError, Reason, item_id
from llmvis.sources.base import (
    LISTING_CHUNK,
    SourceOptions,
    captions,
    listing_table,
    shown,
)
from llmvis.sources.files import (
    UNKNOWN,
    Files,
    Stat,
    check_unchanged,
    in_order,
    open_files,
    read_each,
)
from llmvis.sources.tables import Tables, group_batches

READ_ROWS, READ_BUFFER = 64, 1 << 20
"""Pictures and bytes that are asked for at a time, so that a row group is not held whole."""


class ParquetSource:
    """One Parquet file, or a folder of them.

    Args:
        names: of the tables in `files`, in order.
        leave_out: columns that are not carried along.
        pictures: false where they lie elsewhere, and another source says where.
    """

    def __init__(
        self, files: Files, names: Sequence[bytes], options: SourceOptions,
        leave_out: frozenset[str] = frozenset(), *, pictures: bool = True,
    ) -> None:  # fmt: skip
        self._files = files
        self.tables = Tables(files, names, options, leave_out, pictures=pictures)
        self.user_columns = self.tables.user_columns
        self.image_root = open_files(options.image_root) if options.image_root else files

    def describe(self) -> dict[str, Any]:
        tables, path = self.tables, self.tables.image_kind == "path"
        return {
            "kind": "parquet",
            "root": self._files.root,
            "shown_root": self.image_root.root if path else self._files.root,
            "image_root": self.image_root.root,
            "image_column": tables.image,
            "image_kind": tables.image_kind,
            "caption_column": tables.caption,
            "id_column": tables.id,
            "files": [
                {"name": shown(name), "size": size, "mtime_ns": mtime_ns}
                for name, (size, mtime_ns) in zip(tables.names, tables.stats, strict=True)
            ],
        }

    def notes(self) -> list[str]:
        return self.tables.notes

    def listing(self) -> Iterator[pa.Table]:
        """Rows in the order of files and rows; the locator is `file:row group:row` or the path."""
        for index in range(len(self.tables.names)):
            yield from self.listing_of(index)

    def listing_of(self, index: int) -> Iterator[pa.Table]:
        """The listing of one file. Raises `SourceError` where it changes while it is read."""
        row = 0
        for group, at, batch in self.tables.batches(index, LISTING_CHUNK):
            yield self._chunk(batch, index, group, at, row)
            row += batch.num_rows

    def _chunk(self, batch: pa.RecordBatch, index: int, group: int, at: int, row: int) -> pa.Table:
        tables = self.tables
        file = shown(tables.names[index])
        places = [f"{file}#{row + i}" for i in range(batch.num_rows)]
        if tables.image_kind == "path":
            listed: dict[str, list[Any]] = self._paths(batch[tables.image].to_pylist(), places)
        else:
            listed = {
                "path": places,
                "locator": [f"{index}:{group}:{at + i}".encode() for i in range(batch.num_rows)],
            }
        if tables.id:
            keys = [
                str(k).encode() if k is not None else p.encode()
                for k, p in zip(batch[tables.id].to_pylist(), places, strict=True)
            ]
        else:
            keys = [p.encode() for p in (listed["path"] if tables.image_kind == "path" else places)]
        listed["id"] = [item_id(key) for key in keys]
        if tables.caption:
            listed["caption"] = captions(batch[tables.caption], f"column {tables.caption!r}")
        return listing_table(listed, tables.carried(batch, index))

    def _paths(self, values: list[Any], places: list[str]) -> dict[str, list[Any]]:
        """Listing columns for a column of paths; a null or unsafe one is bad from the start."""
        found = list(in_order(self._path, values, self.image_root.threads))
        reasons = [error and str(error.reason) for _, _, error in found]
        details = [error and error.detail for _, _, error in found]
        return {
            "path": [
                shown(name) if name else str(value) if value else place
                for (name, _, _), value, place in zip(found, values, places, strict=True)
            ],
            "locator": [name for name, _, _ in found],
            "size": [size for _, (size, _), _ in found],
            "mtime_ns": [mtime_ns for _, (_, mtime_ns), _ in found],
            "reason": reasons,
            "detail": details,
        }

    def _path(self, value: Any) -> tuple[bytes, Stat, ItemError | None]:
        """A cell's name, its stat, and what is wrong with it."""
        name = b""
        try:
            if not value:
                raise ItemError(Reason.EMPTY, "no path in this row")
            name = self.image_root.place(str(value), follow=False)
            self.image_root.place(str(value))
            return name, self.image_root.stat(name), None
        except ItemError as error:
            if error.reason == Reason.MISSING:
                error = ItemError(error.reason, "named in the table, but not there")
            return name, UNKNOWN, error


class ParquetReader:
    """Opens pictures by `file:row group:row`, or by path below `image_root`."""

    def __init__(self, description: dict[str, Any]) -> None:
        self.root = str(description["root"])
        self.image_root = str(description["image_root"])
        self.column: str = description["image_column"]
        self.kind: str = description["image_kind"]
        self.files: list[dict[str, Any]] = description["files"]

    def read(
        self,
        locators: Sequence[bytes],
        stats: Sequence[Stat] | None = None,
        max_bytes: int | None = None,
    ) -> Iterator[bytes | ItemError]:
        if self.kind == "path":
            yield from self._by_path(locators, stats, max_bytes)
            return
        groups: dict[tuple[int, int], dict[int, int]] = {}
        for index, locator in enumerate(locators):
            file, group, row = map(int, locator.split(b":"))
            groups.setdefault((file, group), {})[row] = index
        found: dict[int, bytes | ItemError] = {}
        at = 0
        for (file, group), wanted in groups.items():
            for index, value in self._group(file, group, wanted, stats is not None):
                found[index] = value
                while at in found:  # in the order asked for, holding no more than needed
                    yield found.pop(at)
                    at += 1
        assert not found, "a locator was asked for twice"

    def read_captions(self, locators: Sequence[bytes | None]) -> Iterator[str | None]:
        return (None for _ in locators)  # captions are a column

    def _by_path(
        self, locators: Sequence[bytes], stats: Sequence[Stat] | None, max_bytes: int | None
    ) -> Iterator[bytes | ItemError]:
        files = open_files(self.image_root)
        placed = [_placed(files, locator.decode("utf-8", "surrogateescape")) for locator in locators]
        good = [i for i, name in enumerate(placed) if isinstance(name, bytes)]
        names = [name for name in placed if isinstance(name, bytes)]
        found = read_each(files, names, [stats[i] for i in good] if stats else None, max_bytes)
        for name in placed:
            yield next(found) if isinstance(name, bytes) else name

    def _group(
        self, file: int, group: int, wanted: dict[int, int], check: bool
    ) -> Iterator[tuple[int, bytes | ItemError]]:
        """The wanted rows of one row group: row → index in the request."""
        left = dict(wanted)
        name = self.files[file]["name"].encode()
        files = open_files(self.root)
        try:
            if check:
                check_unchanged((self.files[file]["size"], self.files[file]["mtime_ns"]), files.stat(name))
            with (
                files.open(name, 0) as source,
                pq.ParquetFile(source, pre_buffer=False, buffer_size=READ_BUFFER) as table,
            ):
                at = 0
                for batch in group_batches(table, group, [self.column], READ_ROWS):
                    for row in [r for r in left if r < at + batch.num_rows]:
                        yield left.pop(row), self._cell(batch.column(0)[row - at])
                    at += batch.num_rows
                    if not left:
                        return
            raise ItemError(Reason.MISSING, "the row group is shorter than its footer says")
        except ItemError as error:
            yield from ((index, error) for index in left.values())
        except (OSError, pa.ArrowException) as error:
            broken = ItemError(Reason.UNREADABLE, f"row group {group}: {error}")
            yield from ((index, broken) for index in left.values())

    def _cell(self, cell: pa.Scalar) -> bytes | ItemError:
        value = cell.as_py()
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                return self._file(str(value["path"]))
            value = value.get("bytes")
        return ItemError(Reason.EMPTY, "no picture in this row") if value is None else bytes(value)

    def _file(self, path: str) -> bytes | ItemError:
        """The picture at a path that stands in a cell without bytes."""
        files = open_files(self.image_root)
        name = _placed(files, path)
        return next(read_each(files, [name], None, None)) if isinstance(name, bytes) else name


def _placed(files: Files, path: str) -> bytes | ItemError:
    """`path` relative to the root, unless it leads out of it, by itself or by a link."""
    try:
        return files.place(path)
    except ItemError as error:
        return error
