"""A folder of pictures, with captions in `.txt` files or in an imagefolder's metadata table.

Names are bytes until they are shown: newlines and bytes that are not UTF-8 are names
like any other. Links are never followed out of the collection. Does not look into
files; what is no picture is found out when it is decoded.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from llmvis.schema import ItemError, Reason, item_id
from llmvis.sources.base import (
    LISTING_CHUNK,
    SourceError,
    SourceOptions,
    can_carry,
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
        self._metadata_file = next((root / name for name in METADATA if (root / name).is_file()), None)
        self._metadata: pa.Table | None = None
        self._caption: str | None = None
        self.user_columns: list[pa.Field] = []
        self._ignored: Counter[str] = Counter()
        if self._metadata_file:
            self._open_metadata(self._metadata_file, options)
        elif options.caption_column:
            raise SourceError(f"{root} has no metadata.jsonl or metadata.csv to take --caption-column from")

    def describe(self) -> dict[str, Any]:
        kind = "imagefolder" if self._metadata_file else "folder"
        return {"kind": kind, "root": str(self.root), "caption_column": self._caption}

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
            missing = _bad(name, Reason.MISSING, f"named in {self._metadata_file}, but not there")
            yield from self._with_metadata(iter([missing]), {name: rows})
        for row, error in unsafe:
            name = str(self._metadata["file_name"][row].as_py()).encode()
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
                    yield _bad(name or b".", Reason.UNREADABLE, f"folder: {error.strerror}")
                    continue
                for child in sorted(found, reverse=True):
                    if self._is_item(child, at_root=not name):
                        pending.append(name + child)
                continue
            yield _file(path, name, real_root)

    def _is_item(self, child: bytes, at_root: bool) -> bool:
        if child.startswith(b"."):
            self._ignored["hidden"] += 1
            return False
        ending = os.path.splitext(child)[1].lower()
        if ending in SIDECARS:
            if ending != b".txt" and not (at_root and os.fsdecode(child) in METADATA):
                self._ignored[ending.decode()] += 1
            return False
        return child not in (b"Thumbs.db", b"desktop.ini")

    def _open_metadata(self, path: Path, options: SourceOptions) -> None:
        try:
            if path.suffix == ".jsonl":
                table = pyarrow.json.read_json(path)
            elif path.suffix == ".csv":
                table = pyarrow.csv.read_csv(path)
            else:
                table = pq.read_table(path)
        except pa.ArrowInvalid as error:
            raise SourceError(f"{path} cannot be read: {error}") from error
        if "file_name" not in table.column_names:
            raise SourceError(f"{path} has no column 'file_name'; it has: {', '.join(table.column_names)}")
        others = [name for name in table.column_names if name != "file_name"]
        self._caption = pick_caption(others, options.caption_column, str(path))
        self._metadata = table
        fields = [table.schema.field(n) for n in others if n != self._caption]
        self.user_columns = [carried(f) for f in fields if can_carry(f.type)]
        self._user_names = [f.name for f in fields if can_carry(f.type)]

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
                for row in rows_of.pop(item["name"], [None]):
                    yield {**item, "row": row}

        for chunk in _chunks(paired()):
            picked = self._metadata.take(pa.array([item["row"] for item in chunk], pa.int64()))
            columns = _columns(chunk)
            if self._caption:
                columns["caption"] = picked[self._caption].cast(pa.string()).to_pylist()
            user = picked.select(self._user_names).rename_columns([f.name for f in self.user_columns])
            yield listing_table(columns, user)


class FolderReader:
    """Opens files below `root`; a locator is the file's name relative to it, as bytes."""

    def __init__(self, root: str) -> None:
        self.root = root

    def read(
        self, locators: Sequence[bytes], stats: Sequence[tuple[int | None, int | None]] | None = None
    ) -> Iterator[bytes | ItemError]:
        root = os.fsencode(self.root)
        for index, locator in enumerate(locators):
            size, mtime_ns = stats[index] if stats else (None, None)
            try:
                yield read_file(os.path.join(root, locator), size, mtime_ns)
            except ItemError as error:
                yield error


def _file(path: bytes, name: bytes, real_root: bytes) -> dict[str, Any]:
    """What the listing says of one directory entry that is no directory."""
    try:
        if os.path.islink(path):
            target = os.path.realpath(path, strict=True)
            if not target.startswith(os.path.join(real_root, b"")):
                return _bad(name, Reason.LINK, "points out of the collection; copy the file in")
            if os.path.isdir(target):
                return _bad(name, Reason.LINK, "points to a folder; links to folders are not followed")
            name = os.path.relpath(target, real_root)
            path = target
        found = os.stat(path, follow_symlinks=False)
    except OSError as error:
        return _bad(name, Reason.LINK if os.path.islink(path) else Reason.UNREADABLE, error.strerror or "")
    caption = os.path.splitext(path)[0] + b".txt"
    item = {"name": name, "size": found.st_size, "mtime_ns": found.st_mtime_ns}
    if os.path.isfile(caption):
        item["caption_locator"] = os.path.splitext(name)[0] + b".txt"
    return item


def _bad(name: bytes, reason: Reason, detail: str) -> dict[str, Any]:
    return {"name": name, "reason": str(reason), "detail": detail}


def _columns(items: list[dict[str, Any]]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {
        "id": [item_id(item["name"]) for item in items],
        "path": [item["name"].decode("utf-8", "backslashreplace") for item in items],
        "locator": [item["name"] for item in items],
    }
    for key in ("size", "mtime_ns", "caption_locator", "reason", "detail"):
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
