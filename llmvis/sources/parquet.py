"""Pictures in Parquet: as bytes, as Hugging Face image structs, or as paths beside the tables.

Every file's footer is checked before any work, so that a table lacking the column
stops the job at once and not as empty rows in its middle. The listing reads all
columns but the picture bytes, one row group at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmvis.schema import ItemError, Reason, item_id
from llmvis.sources.base import (
    LISTING_CHUNK,
    SourceError,
    SourceOptions,
    Stat,
    can_carry,
    captions,
    carried,
    inside,
    listing_table,
    pick_caption,
    read_file,
)

BYTES_COLUMNS = ("image", "bytes", "image_bytes", "content", "jpg", "png", "img")
PATH_COLUMNS = ("path", "image_path", "file_name", "filename", "file", "filepath", "image", "uri", "url")
READ_ROWS, READ_BUFFER = 64, 1 << 20
"""Pictures and bytes that are asked for at a time, so that a row group is not held whole."""


def parquet_files(root: Path) -> list[Path]:
    """The Parquet files of a Parquet collection at `root`, sorted; empty where it is something else.

    A folder that holds any file of another kind beside its tables is a folder of
    pictures; notes, cards and hidden files don't count.
    """
    files: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if not f.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or path.suffix in (".md", ".json", ".txt", ".yaml", ".crc"):
                continue
            if path.suffix != ".parquet" or name == "metadata.parquet":
                return []
            files.append(path)
    return sorted(files)


class ParquetSource:
    """One Parquet file, or a folder of them with one schema.

    Args:
        files: of a folder only these.
        leave_out: columns that are not carried along.
    """

    def __init__(
        self, root: Path, options: SourceOptions, files: Sequence[Path] | None = None,
        leave_out: frozenset[str] = frozenset(),
    ) -> None:  # fmt: skip
        self.root = root if root.is_dir() else root.parent
        self.files = list(files) if files is not None else parquet_files(root) if root.is_dir() else [root]
        schemas = [_footer(path) for path in self.files]
        first = schemas[0]
        where = str(self.files[0])
        self._id = options.id_column
        if self._id and self._id not in first.names:
            raise SourceError(f"{where} has no column {self._id!r}; it has: {', '.join(first.names)}")
        carried(list(first), where)
        self._image, self.image_kind = _pick_image(first, options.image_column, where)
        others = [field for field in first if field.name != self._image]
        self._caption = pick_caption(others, options.caption_column, where)
        others = [field for field in others if field.name != self._caption]
        others = [field for field in others if field.name not in leave_out]
        self._left_out = [f.name for f in others if not can_carry(f.type)]
        self._fields = [f for f in others if can_carry(f.type)]
        self.user_columns = carried(self._fields, where)
        self.image_root = Path(options.image_root).absolute() if options.image_root else self.root
        self._check_alike(schemas)

    def _check_alike(self, schemas: list[pa.Schema]) -> None:
        """Raises `SourceError` for the first file whose needed columns differ from the first file's."""
        needed = [self._image, *([self._caption] if self._caption else []), *(f.name for f in self._fields)]
        for path, schema in zip(self.files, schemas, strict=True):
            for name in needed:
                want = schemas[0].field(name).type
                if name not in schema.names:
                    raise SourceError(f"{path} has no column {name!r}, which {self.files[0]} has")
                if schema.field(name).type != want:
                    raise SourceError(
                        f"{path}: column {name!r} is {schema.field(name).type}, "
                        f"in {self.files[0]} it is {want}"
                    )

    def describe(self) -> dict[str, Any]:
        stats = [path.stat() for path in self.files]
        return {
            "kind": "parquet",
            "root": str(self.root),
            "shown_root": str(self.image_root if self.image_kind == "path" else self.root),
            "image_root": str(self.image_root),
            "image_column": self._image,
            "image_kind": self.image_kind,
            "caption_column": self._caption,
            "id_column": self._id,
            "files": [
                {"name": str(path.relative_to(self.root)), "size": s.st_size, "mtime_ns": s.st_mtime_ns}
                for path, s in zip(self.files, stats, strict=True)
            ],
        }

    def notes(self) -> list[str]:
        return [f"column {name!r} holds raw bytes and is not carried along" for name in self._left_out]

    def listing(self) -> Iterator[pa.Table]:
        """Rows in the order of files and rows; the locator is `file:row group:row` or the path."""
        columns = [f.name for f in self._fields]
        columns += [name for name in (self._caption, self._id) if name and name not in columns]
        if self.image_kind == "path":
            columns.append(self._image)
        for index, path in enumerate(self.files):
            with pq.ParquetFile(path) as file:
                start = 0
                for group in range(file.num_row_groups):
                    at = 0
                    rows = file.metadata.row_group(group).num_rows
                    for batch in _batches(file, group, columns, LISTING_CHUNK):
                        yield self._chunk(batch, index, group, at, start + at)
                        at += batch.num_rows
                    assert at == rows, (path, group, at, rows)
                    start += rows

    def _chunk(self, batch: pa.RecordBatch, index: int, group: int, at: int, row: int) -> pa.Table:
        file = str(self.files[index].relative_to(self.root))
        places = [f"{file}#{row + i}" for i in range(batch.num_rows)]
        if self.image_kind == "path":
            listed: dict[str, list[Any]] = self._paths(batch[self._image].to_pylist(), places)
        else:
            listed = {
                "path": places,
                "locator": [f"{index}:{group}:{at + i}".encode() for i in range(batch.num_rows)],
            }
        if self._id:
            keys = [
                str(k).encode() if k is not None else p.encode()
                for k, p in zip(batch[self._id].to_pylist(), places, strict=True)
            ]
        else:
            keys = [p.encode() for p in (listed["path"] if self.image_kind == "path" else places)]
        listed["id"] = [item_id(key) for key in keys]
        if self._caption:
            listed["caption"] = captions(batch[self._caption], f"column {self._caption!r}")
        user = pa.table([batch[f.name] for f in self._fields], schema=pa.schema(self.user_columns))
        return listing_table(listed, user)

    def _paths(self, values: list[Any], places: list[str]) -> dict[str, list[Any]]:
        """Listing columns for a column of paths; a null or unsafe one is bad from the start."""
        rows: dict[str, list[Any]] = {
            k: [] for k in ("path", "locator", "size", "mtime_ns", "reason", "detail")
        }
        for value, place in zip(values, places, strict=True):
            shown, locator, size, mtime, reason, detail = place, b"", None, None, None, None
            try:
                if not value:
                    raise ItemError(Reason.EMPTY, "no path in this row")
                shown = str(value)
                path = inside(self.image_root, shown)
                locator = os.fsencode(path.relative_to(self.image_root))
                shown = locator.decode("utf-8", "backslashreplace")
                real = Path(os.path.realpath(path))
                inside(Path(os.path.realpath(self.image_root)), str(real))
                found = path.stat(follow_symlinks=False)
                size, mtime = found.st_size, found.st_mtime_ns
            except ItemError as error:
                reason, detail = str(error.reason), error.detail
            except FileNotFoundError:
                reason, detail = str(Reason.MISSING), "named in the table, but not there"
            except OSError as error:
                reason, detail = str(Reason.UNREADABLE), error.strerror
            for key, item in zip(rows, (shown, locator, size, mtime, reason, detail), strict=True):
                rows[key].append(item)
        return rows


class ParquetReader:
    """Opens pictures by `file:row group:row`, or by path below `image_root`."""

    def __init__(self, description: dict[str, Any]) -> None:
        self.root = Path(description["root"])
        self.image_root = Path(description["image_root"])
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
            for index, locator in enumerate(locators):
                stat_then = stats[index] if stats else (None, None)
                yield self._file(os.fsdecode(locator), stat_then, max_bytes)
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

    def read_caption(self, locator: bytes) -> str | None:
        return None  # captions are a column

    def _file(
        self, name: str, stat_then: Stat = (None, None), max_bytes: int | None = None
    ) -> bytes | ItemError:
        try:
            path = inside(self.image_root, name)
            inside(Path(os.path.realpath(self.image_root)), os.path.realpath(path))
            return read_file(path, stat_then, max_bytes=max_bytes)
        except ItemError as error:
            return error

    def _group(
        self, file: int, group: int, wanted: dict[int, int], check: bool
    ) -> Iterator[tuple[int, bytes | ItemError]]:
        """The wanted rows of one row group: row → index in the request."""
        left = dict(wanted)
        try:
            if check:
                self._check_unchanged(file)
            path = self.root / self.files[file]["name"]
            with pq.ParquetFile(path, pre_buffer=False, buffer_size=READ_BUFFER) as table:
                at = 0
                for batch in _batches(table, group, [self.column], READ_ROWS):
                    for row in [r for r in left if r < at + batch.num_rows]:
                        yield left.pop(row), self._cell(batch.column(0)[row - at])
                    at += batch.num_rows
                    if not left:
                        return
            raise ItemError(Reason.MISSING, "the row group is shorter than its footer says")
        except ItemError as error:
            yield from ((index, error) for index in left.values())
        except FileNotFoundError as error:
            gone = ItemError(Reason.MISSING, f"{error.filename or 'the table'} is gone")
            yield from ((index, gone) for index in left.values())
        except (OSError, pa.ArrowException) as error:
            broken = ItemError(Reason.UNREADABLE, f"row group {group}: {error}")
            yield from ((index, broken) for index in left.values())

    def _check_unchanged(self, file: int) -> None:
        planned = self.files[file]
        now = (self.root / planned["name"]).stat()
        if (now.st_size, now.st_mtime_ns) != (planned["size"], planned["mtime_ns"]):
            raise ItemError(Reason.CHANGED, f"{planned['name']} has changed since the job was planned")

    def _cell(self, cell: pa.Scalar) -> bytes | ItemError:
        value = cell.as_py()
        if isinstance(value, dict):
            if value.get("bytes") is None and value.get("path"):
                return self._file(str(value["path"]))
            value = value.get("bytes")
        return ItemError(Reason.EMPTY, "no picture in this row") if value is None else bytes(value)


def _footer(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise SourceError(f"{path} is not a readable Parquet file: {error}") from error


def _batches(file: pq.ParquetFile, group: int, columns: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    """Batches of one row group; without columns there are none to count rows by, so they are made."""
    if columns:
        yield from file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False)
        return
    total = file.metadata.row_group(group).num_rows
    for at in range(0, total, rows):
        count = min(rows, total - at)
        yield pa.RecordBatch.from_struct_array(pa.array([{}] * count, pa.struct([])))


def _is_bytes(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _kind_of(kind: pa.DataType) -> str | None:
    """How a column of this type holds pictures: `struct`, `bytes`, `path`, or not at all."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if (
        pa.types.is_struct(kind)
        and kind.get_field_index("bytes") >= 0
        and _is_bytes(kind.field("bytes").type)
    ):
        return "struct"
    if _is_bytes(kind):
        return "bytes"
    return "path" if pa.types.is_string(kind) or pa.types.is_large_string(kind) else None


def _pick_image(schema: pa.Schema, asked: str | None, where: str) -> tuple[str, str]:
    """The column that holds the pictures, and how."""
    names = schema.names
    if asked is not None:
        kind = _kind_of(schema.field(asked).type) if asked in names else None
        if kind is None:
            raise SourceError(f"{where} has no picture column {asked!r}; it has: {', '.join(names)}")
        return asked, kind
    kinds = {name: _kind_of(schema.field(name).type) for name in names}
    for name in names:
        if kinds[name] == "struct":
            return name, "struct"
    for name in BYTES_COLUMNS:
        if kinds.get(name) == "bytes":
            return name, "bytes"
    for name in PATH_COLUMNS:
        if kinds.get(name) == "path":
            return name, "path"
    raise SourceError(
        f"{where}: which column holds the pictures? Name it with --image-column: {', '.join(names)}"
    )
