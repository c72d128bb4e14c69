"""The Parquet files of a collection as one table: columns chosen, schemas made one, rows in batches.

Every footer is read before any work, so that a table that does not fit stops the job at once and
not as empty rows in its middle. Knows no pictures, only the column that holds them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from llmvis.schema import ItemError
from llmvis.sources.base import SourceError, SourceOptions, can_carry, carried, pick_caption, shown
from llmvis.sources.files import Files, Stat, in_order

BYTES_COLUMNS = ("image", "bytes", "image_bytes", "content", "jpg", "png", "webp", "img")
PATH_COLUMNS = ("path", "image_path", "file_name", "filename", "file", "filepath", "image", "uri", "url")


class Tables:
    """What the files have in common: a column of pictures, a caption, keys, and the user's columns.

    A column that only some files have is null in the others, and a note says so; whole numbers of
    two widths become the wider one. The columns of pictures, captions and keys must be in every file.

    Args:
        names: of the tables in `files`; UTF-8.
        pictures: whether there is a column of pictures at all.

    Raises:
        SourceError: a footer cannot be read, a column is missing or of another kind; it names both.
    """

    def __init__(
        self, files: Files, names: Sequence[bytes], options: SourceOptions,
        leave_out: frozenset[str] = frozenset(), *, pictures: bool = True,
    ) -> None:  # fmt: skip
        self.files, self.names = files, list(names)
        opened = list(in_order(self._open, self.names, files.threads))
        self.stats: list[Stat] = [stat for stat, _ in opened]
        schemas = [schema for _, schema in opened]
        first, where = schemas[0], self.where(0)
        self.id = options.id_column
        if self.id and self.id not in first.names:
            raise SourceError(f"{where} has no column {self.id!r}; it has: {', '.join(first.names)}")
        self.image, self.image_kind = "", "none"
        if pictures:
            self.image, self.image_kind = _pick_image(first, options.image_column, where)
        self.caption = pick_caption(
            [field for field in first if field.name != self.image], options.caption_column, where
        )
        merged = self._merged(schemas)
        others = [f for f in merged if f.name not in (self.image, self.caption) and f.name not in leave_out]
        self._fields = [f for f in others if can_carry(f.type)]
        self.user_columns = carried(self._fields, where)
        self.notes = [
            f"column {f.name!r} holds raw bytes and is not carried along"
            for f in others
            if not can_carry(f.type)
        ]
        in_files = Counter(name for schema in schemas for name in schema.names)
        self.notes += [
            f"column {f.name!r} is not in {len(schemas) - in_files[f.name]} of {len(schemas)} tables: null there"
            for f in self._fields
            if in_files[f.name] < len(schemas)
        ]

    def where(self, index: int) -> str:
        """A table's address, for messages."""
        return f"{self.files.root}/{shown(self.names[index])}"

    def _open(self, name: bytes) -> tuple[Stat, pa.Schema]:
        where = f"{self.files.root}/{shown(name)}"
        try:
            name.decode()
            stat = self.files.stat(name)
            with self.files.open(name, 0) as file:
                schema = pq.read_schema(file)
        except UnicodeDecodeError:
            raise SourceError(f"{where}: the name is not UTF-8; rename the table") from None
        except ItemError as error:
            raise SourceError(f"{where} cannot be read: {error.detail}") from error
        except (OSError, pa.ArrowException) as error:
            raise SourceError(f"{where} is not a readable Parquet file: {error}") from error
        carried(list(schema), where)
        return stat, schema

    def _merged(self, schemas: list[pa.Schema]) -> list[pa.Field]:
        """One field for each column of any file, in order of appearance."""
        found: dict[str, pa.Field] = {}
        first: dict[str, int] = {}
        needed = [name for name in (self.image, self.caption, self.id) if name]
        for index, schema in enumerate(schemas):
            for name in needed:
                if name not in schema.names:
                    raise SourceError(
                        f"{self.where(index)} has no column {name!r}, which {self.where(0)} has"
                    )
            for field in schema:
                had = found.setdefault(field.name, field)
                since = first.setdefault(field.name, index)
                kind = self._promoted(had, field)
                if kind is None:
                    raise SourceError(
                        f"{self.where(index)}: column {field.name!r} is {field.type}, "
                        f"in {self.where(since)} it is {had.type}; write the tables anew with one type"
                    )
                found[field.name] = pa.field(field.name, kind)
        return list(found.values())

    def _promoted(self, had: pa.Field, now: pa.Field) -> pa.DataType | None:
        """The type that holds both columns' values exactly, or None."""
        if had.type == now.type:
            return had.type
        if now.name == self.image:  # read file by file, so only the kind counts
            return had.type if kind_of(had.type) == kind_of(now.type) else None
        try:
            unnamed = [pa.schema([("x", field.type)]) for field in (had, now)]
            kind = pa.unify_schemas(unnamed, promote_options="permissive").field("x").type
        except (pa.ArrowTypeError, pa.ArrowInvalid):
            return None
        numbers = [pa.types.is_integer(field.type) for field in (had, now)]
        return None if pa.types.is_floating(kind) and any(numbers) else kind

    def batches(self, index: int, rows: int) -> Iterator[tuple[int, int, pa.RecordBatch]]:
        """(row group, row in it, batch) of one file: all columns that a listing needs.

        Raises `SourceError` where the file cannot be read any more.
        """
        wanted = {f.name for f in self._fields} | {self.caption, self.id}
        wanted |= {self.image} if self.image_kind == "path" else set()
        try:
            with self.files.open(self.names[index], 0) as source, pq.ParquetFile(source) as file:
                columns = [name for name in file.schema_arrow.names if name in wanted]
                for group in range(file.num_row_groups):
                    at = 0
                    for batch in group_batches(file, group, columns, rows):
                        yield group, at, batch
                        at += batch.num_rows
                    assert at == file.metadata.row_group(group).num_rows, (self.where(index), group, at)
        except ItemError as error:
            raise SourceError(f"{self.where(index)} cannot be read: {error.detail}") from error
        except (OSError, pa.ArrowException) as error:
            raise SourceError(f"{self.where(index)} cannot be read: {error}") from error

    def carried(self, batch: pa.RecordBatch, index: int) -> pa.Table:
        """The user's columns of a batch, under `user_columns`; null where the file has none."""
        arrays = []
        for field in self._fields:
            if field.name not in batch.schema.names:
                arrays.append(pa.nulls(batch.num_rows, field.type))
                continue
            try:
                arrays.append(batch[field.name].cast(field.type))
            except pa.ArrowException as error:
                raise SourceError(f"{self.where(index)}: column {field.name!r}: {error}") from error
        return pa.Table.from_arrays(arrays, schema=pa.schema(self.user_columns))


def group_batches(
    file: pq.ParquetFile, group: int, columns: list[str], rows: int
) -> Iterator[pa.RecordBatch]:
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


def kind_of(kind: pa.DataType) -> str | None:
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
        kind = kind_of(schema.field(asked).type) if asked in names else None
        if kind is None:
            raise SourceError(f"{where} has no picture column {asked!r}; it has: {', '.join(names)}")
        return asked, kind
    kinds = {name: kind_of(schema.field(name).type) for name in names}
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
