"""What every source and reader has in common: the two protocols, options, captions, columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import pyarrow as pa

from llmvis.schema import LISTING, MAX_CAPTION, RESERVED, ItemError
from llmvis.sources.files import SourceError as SourceError
from llmvis.sources.files import Stat

RowT = TypeVar("RowT")

CAPTION_COLUMNS = ("caption", "text", "captions", "title", "description", "alt_text", "name", "label")
"""Where a caption is looked for, in this order, unless a column is named."""

LISTING_CHUNK = 8_192
"""Rows of a listing that are in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How to read a collection; the defaults find the usual names by themselves."""

    image_column: str | None = None
    """Parquet: the column with paths, bytes or image structs."""
    caption_column: str | None = None
    """Parquet, imagefolder and the .json of tars: the column that becomes `caption`."""
    id_column: str | None = None
    """Parquet: a column of unique keys that ids are made from (default: file and row)."""
    image_root: str | None = None
    """Parquet with a path column: the folder that relative paths start from and none may leave."""


class Reader(Protocol):
    """Opens items; small and picklable, so that it can travel to any node."""

    def read(
        self,
        locators: Sequence[bytes],
        stats: Sequence[Stat] | None = None,
        max_bytes: int | None = None,
    ) -> Iterator[bytes | ItemError]:
        """For each locator, none twice, its bytes, or why there are none, in order.

        `stats` are as the plan saw them: a file that differs is an error. A file of more than
        `max_bytes` is not read.
        """
        ...

    def read_captions(self, locators: Sequence[bytes | None]) -> Iterator[str | None]:
        """The beginning of each caption's own file, in order; None where there is none or it cannot be read."""
        ...


class Source(Protocol):
    """A collection as the planner sees it."""

    user_columns: list[pa.Field]

    def describe(self) -> dict[str, Any]:
        """JSON-able: kind, root and settings; part of the fingerprint, and what `open_reader` takes.

        `shown_root` before an item's `path` is where people find it.
        """
        ...

    def notes(self) -> list[str]:
        """What was passed over, in words for the plan (call it after `listing`)."""
        ...

    def listing(self) -> Iterator[pa.Table]:
        """Tables of `schema.LISTING` + `user_columns` in canonical order."""
        ...


def pick_caption(fields: Sequence[pa.Field], asked: str | None, where: str) -> str | None:
    """The caption column among `fields`: the one asked for, or the first usual name that holds text.

    Raises `SourceError` if the asked-for one is not there.
    """
    kinds = {field.name: field.type for field in fields}
    if asked is not None:
        if asked not in kinds:
            raise SourceError(f"{where} has no column {asked!r}; it has: {', '.join(kinds)}")
        return asked
    return next((name for name in CAPTION_COLUMNS if name in kinds and _is_text(kinds[name])), None)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def captions(column: pa.Array | pa.ChunkedArray, where: str) -> list[str | None]:
    """A column as captions: text as it is, the first of a list, anything else plain in words.

    Raises `SourceError` for nested values that are no list.
    """
    found: list[str | None] = []
    for value in column.to_pylist():
        if isinstance(value, list):
            value = value[0] if value else None
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if isinstance(value, dict | list):
            raise SourceError(
                f"{where} holds {column.type}, which is no caption; name another --caption-column"
            )
        found.append(None if value is None else str(value))
    return found


def carried(fields: Sequence[pa.Field], where: str, ours: AbstractSet[str] = RESERVED) -> list[pa.Field]:
    """The fields under which a user's columns are carried along, each name once and none of `ours`.

    Raises `SourceError` where two columns have one name.
    """
    names = [field.name for field in fields]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise SourceError(f"{where} has two columns called {sorted(twice)[0]!r}; rename one")
    taken = ours | set(names)
    found = []
    for field in fields:
        name = field.name
        while name in (ours if name == field.name else taken):
            name = f"source_{name}"
        taken = taken | {name}
        found.append(field.with_name(name).with_nullable(True))
    return found


def can_carry(kind: pa.DataType) -> bool:
    """Whether a user's column goes along into the output: all but raw bytes, alone or inside structs."""
    if pa.types.is_struct(kind):
        return kind.num_fields > 0 and all(can_carry(kind.field(i).type) for i in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return can_carry(kind.value_type)
    return not (
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    )


def listing_table(columns: dict[str, list[Any]], user: pa.Table | None = None) -> pa.Table:
    """A chunk of a listing; columns not given are null, `user` is set beside it."""
    rows = len(columns["id"])
    arrays = [
        pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(rows, f.type) for f in LISTING
    ]
    table = pa.Table.from_arrays(arrays, schema=LISTING)
    if user is not None:
        for field, column in zip(user.schema, user.columns, strict=True):
            table = table.append_column(field, column)
    return table


CAPTION_HEAD = 4 * MAX_CAPTION + 4
"""Bytes of a caption's file that are read: a character has at most four."""


def caption_text(data: bytes) -> str:
    """The first `CAPTION_HEAD` bytes of a caption's file as text; a character that was cut in two is dropped."""
    return data.decode("utf-8-sig", "ignore" if len(data) >= CAPTION_HEAD else "replace").strip()


def shown(name: bytes) -> str:
    """A name of a file as people read it; bytes that are not UTF-8 are escaped."""
    return name.decode("utf-8", "backslashreplace")


def chunks(rows: Iterable[RowT]) -> Iterator[list[RowT]]:
    """The same rows in lists of `LISTING_CHUNK`, the last one shorter; none is empty."""
    held: list[RowT] = []
    for row in rows:
        held.append(row)
        if len(held) == LISTING_CHUNK:
            yield held
            held = []
    if held:
        yield held
