"""A folder of pictures, with captions in `.txt` files or in an imagefolder's metadata table.

Names are bytes until they are shown: newlines and bytes that are not UTF-8 are names
like any other. Links are never followed out of the collection. Does not look into
files; what is no picture is found out when it is decoded.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from llmvis.schema import MAX_CAPTION, ItemError, Reason, item_id
from llmvis.sources.base import (
    CAPTION_COLUMNS,
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

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SIDECARS = frozenset(
    b".txt .json .jsonl .csv .tsv .md .yaml .yml .parquet .arrow .npy .safetensors .db .ini .log".split()
)
"""Endings of files that belong to collections but are no pictures; they are counted, not listed."""


class FolderSource:
    """All files below `root`; a metadata table in `root` makes it an imagefolder."""

    def __init__(self, root: Path, options: SourceOptions) -> None:
        self.root = root
        self._metadata_files = _metadata_files(root)
        self._metadata: pa.Table | None = None
        self._caption: str | None = None
        self.user_columns: list[pa.Field] = []
        self._ignored: Counter[str] = Counter()
        if options.image_column or options.id_column or options.image_root:
            raise SourceError(
                f"{root} is a folder of pictures; --image-column, --id-column and --image-root are for Parquet: "
                "give the .parquet file itself"
            )
        if self._metadata_files:
            self._open_metadata(options)
        elif options.caption_column:
            raise SourceError(f"{root} has no metadata.jsonl or metadata.csv to take --caption-column from")

    def describe(self) -> dict[str, Any]:
        kind = "imagefolder" if self._metadata_files else "folder"
        root = str(self.root)
        return {"kind": kind, "root": root, "shown_root": root, "caption_column": self._caption}

    def notes(self) -> list[str]:
        """Files that are not items, by ending."""
        return [f"{count} {ending} files passed over" for ending, count in sorted(self._ignored.items())]

    def listing(self) -> Iterator[pa.Table]:
        """The files in the order of their names; then metadata rows whose file is not there."""
        self._ignored.clear()
        if self._metadata is None:
            for chunk in _chunks(self._walk()):
                yield listing_table(_columns(chunk))
            return
        rows_of, unsafe = self._metadata_rows()
        yield from self._with_metadata(self._walk(), rows_of)
        for name, rows in sorted(rows_of.items()):
            missing = _bad(name, Reason.MISSING, "named in the metadata, but not there (or hidden)")
            yield from self._with_metadata(iter([missing]), {name: rows})
        for row, error in unsafe:
            value = self._metadata["file_name"][row].as_py()
            name = str(value).encode() if value else b"\0row %d" % row  # no file can have that name
            item = _bad(name, error.reason, error.detail)
            yield from self._with_metadata(iter([item]), {name: [row]})

    def _walk(self) -> Iterator[dict[str, Any]]:
        """Every file below the root, depth first in byte order, with what the listing says of it."""
        root = os.fsencode(self.root)
        real_root = os.path.realpath(root)
        pending = [b""]
        while pending:
            name = pending.pop()
            path = os.path.join(root, name) if name else root
            if not name or name.endswith(b"/"):
                try:
                    with os.scandir(path) as entries:
                        found = [e.name + (b"/" if e.is_dir(follow_symlinks=False) else b"") for e in entries]
                except OSError as error:
                    if not name:
                        raise SourceError(f"{self.root} cannot be read: {error.strerror}") from error
                    yield _bad(name, Reason.UNREADABLE, f"folder: {error.strerror}")
                    continue
                for child in sorted(found, reverse=True):
                    if self._is_item(child):
                        pending.append(name + child)
                continue
            yield _file(path, name, real_root)

    def _is_item(self, child: bytes) -> bool:
        if child.startswith(b"."):
            self._ignored["hidden"] += 1
            return False
        ending = os.path.splitext(child)[1].lower()
        if ending in SIDECARS:
            if ending != b".txt" and os.fsdecode(child) not in METADATA:
                self._ignored[ending.decode()] += 1
            return False
        return child not in (b"Thumbs.db", b"desktop.ini")

    def _open_metadata(self, options: SourceOptions) -> None:
        tables = []
        for path in self._metadata_files:
            table = _read_metadata(path)
            folder = path.parent.relative_to(self.root).as_posix()
            if folder != ".":  # names are relative to their table; here, to the root
                at = table.schema.get_field_index("file_name")
                names = [None if n is None else f"{folder}/{n}" for n in table["file_name"].to_pylist()]
                table = table.set_column(at, "file_name", pa.array(names, pa.string()))
            tables.append(table)
        where = str(self._metadata_files[0])
        try:
            self._metadata = pa.concat_tables(tables, promote_options="default")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise SourceError(f"{where} and its like have columns that differ: {error}") from error
        fields = [field for field in self._metadata.schema if field.name != "file_name"]
        carried(fields, where)
        self._caption = pick_caption(fields, options.caption_column, where)
        fields = [f for f in fields if f.name != self._caption and can_carry(f.type)]
        self.user_columns = carried(fields, where)
        self._user_names = [f.name for f in fields]

    def _metadata_rows(self) -> tuple[dict[bytes, list[int]], list[tuple[int, ItemError]]]:
        """Rows of the metadata table by the name of their file; and the rows whose name is unsafe."""
        assert self._metadata is not None
        rows_of: dict[bytes, list[int]] = defaultdict(list)
        unsafe: list[tuple[int, ItemError]] = []
        for row, name in enumerate(self._metadata["file_name"].to_pylist()):
            try:
                if not name:
                    raise ItemError(Reason.EMPTY, "no file name")
                path = inside(self.root, str(name))
                rows_of[os.fsencode(path.relative_to(self.root))].append(row)
            except ItemError as error:
                unsafe.append((row, error))
        return rows_of, unsafe

    def _with_metadata(
        self, items: Iterator[dict[str, Any]], rows_of: dict[bytes, list[int]]
    ) -> Iterator[pa.Table]:
        """Items with caption and user columns of their metadata rows, which are taken out of `rows_of`."""
        assert self._metadata is not None

        def paired() -> Iterator[dict[str, Any]]:
            for item in items:
                for row in rows_of.pop(item.get("listed", item["name"]), [None]):
                    yield {**item, "row": row}

        for chunk in _chunks(paired()):
            picked = self._metadata.take(pa.array([item["row"] for item in chunk], pa.int64()))
            columns = _columns(chunk)
            if self._caption:
                columns["caption"] = captions(picked[self._caption], f"column {self._caption!r}")
            user = picked.select(self._user_names).rename_columns([f.name for f in self.user_columns])
            yield listing_table(columns, user)


class FolderReader:
    """Opens files below `root`; a locator is the file's name relative to it, as bytes."""

    def __init__(self, root: str) -> None:
        self.root = root

    def read(
        self,
        locators: Sequence[bytes],
        stats: Sequence[Stat] | None = None,
        max_bytes: int | None = None,
    ) -> Iterator[bytes | ItemError]:
        root = os.fsencode(self.root)
        for index, locator in enumerate(locators):
            try:
                stat_then = stats[index] if stats else (None, None)
                yield read_file(os.path.join(root, locator), stat_then, max_bytes=max_bytes)
            except ItemError as error:
                yield error

    def read_caption(self, locator: bytes) -> str | None:
        path = os.path.join(os.fsencode(self.root), locator)
        try:  # a character has at most four bytes; what is cut off in its middle is dropped
            data = read_file(path, head=4 * MAX_CAPTION + 4)
        except ItemError:
            return None
        return data.decode("utf-8-sig", "ignore" if len(data) > 4 * MAX_CAPTION else "replace").strip()


def _metadata_files(root: Path) -> list[Path]:
    """The metadata table in `root`, else those of the folders in it (`train/metadata.csv`, …)."""
    here = [root / name for name in METADATA if (root / name).is_file()]
    if here:
        return here[:1]
    try:
        folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise SourceError(f"{root} cannot be read: {error.strerror}") from error
    return [path for folder in folders for name in METADATA if (path := folder / name).is_file()]


def _read_metadata(path: Path) -> pa.Table:
    """A metadata table; file names and captions stay the text that they are."""
    try:
        if path.suffix == ".jsonl":
            with path.open("rb") as file:
                first = json.loads(file.readline() or b"{}")
            text = [n for n in CAPTION_COLUMNS if isinstance(first.get(n), str)]
            schema = pa.schema([(name, pa.string()) for name in ("file_name", *text)])
            table = pyarrow.json.read_json(
                path, parse_options=pyarrow.json.ParseOptions(explicit_schema=schema)
            )
        elif path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8-sig") as lines:
                header = next(csv.reader(lines), [])
            text = [name for name in ("file_name", *CAPTION_COLUMNS) if name in header]
            options = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(text, pa.string()))
            parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
            table = pyarrow.csv.read_csv(path, convert_options=options, parse_options=parse)
        else:
            table = pq.read_table(path)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise SourceError(f"{path} cannot be read: {error}") from error
    if table.column_names.count("file_name") != 1:
        raise SourceError(f"{path} has no column 'file_name'; it has: {', '.join(table.column_names)}")
    return table


def _file(path: bytes, listed: bytes, real_root: bytes) -> dict[str, Any]:
    """What the listing says of one directory entry that is no directory.

    A link inside the collection is the item that it points to, with its own caption.
    """
    name, target = listed, path
    try:
        if os.path.islink(path):
            target = os.path.realpath(path, strict=True)
            if not target.startswith(os.path.join(real_root, b"")):
                return _bad(name, Reason.LINK, "points out of the collection; copy the file in")
            if os.path.isdir(target):
                return _bad(name, Reason.LINK, "points to a folder; links to folders are not followed")
            name = os.path.relpath(target, real_root)
        found = os.stat(target, follow_symlinks=False)
    except OSError as error:
        return _bad(name, Reason.LINK if os.path.islink(path) else Reason.UNREADABLE, error.strerror or "")
    item = {"name": name, "listed": listed, "size": found.st_size, "mtime_ns": found.st_mtime_ns}
    try:
        caption = os.stat(os.path.splitext(path)[0] + b".txt", follow_symlinks=False)
    except OSError:
        return item
    return item | {
        "caption_locator": os.path.splitext(listed)[0] + b".txt",
        "caption_mtime_ns": caption.st_mtime_ns,
    }


def _bad(name: bytes, reason: Reason, detail: str) -> dict[str, Any]:
    return {"name": name, "reason": str(reason), "detail": detail}


def _columns(items: list[dict[str, Any]]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {
        "id": [item_id(item["name"]) for item in items],
        "path": [item["name"].decode("utf-8", "backslashreplace") for item in items],
        "locator": [item["name"] for item in items],
    }
    for key in ("size", "mtime_ns", "caption_locator", "caption_mtime_ns", "reason", "detail"):
        columns[key] = [item.get(key) for item in items]
    return columns


def _chunks(items: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == LISTING_CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
