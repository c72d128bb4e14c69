"""A folder of pictures, with captions in `.txt` files or in an imagefolder's metadata table.

Names are bytes until they are shown: newlines and bytes that are not UTF-8 are names
like any other. Links are never followed out of the collection. Does not look into
files; what is no picture is found out when it is decoded.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from llmvis.schema import ItemError, Reason, item_id
from llmvis.sources.base import (
    CAPTION_HEAD,
    SourceError,
    SourceOptions,
    caption_text,
    captions,
    chunks,
    listing_table,
    shown,
)
from llmvis.sources.files import Entry, Files, Stat, in_order, open_files, read_each
from llmvis.sources.imagefolder import METADATA, Metadata

SIDECARS = frozenset(
    b".txt .json .jsonl .csv .tsv .md .yaml .yml .parquet .arrow .npy .safetensors .db .ini .log".split()
)
"""Endings of files that belong to collections but are no pictures; they are counted, not listed."""


class FolderSource:
    """All files below the root of `files`; a metadata table in the root makes it an imagefolder."""

    def __init__(self, files: Files, options: SourceOptions) -> None:
        self._files = files
        self._ignored: Counter[str] = Counter()
        if options.image_column or options.id_column or options.image_root:
            raise SourceError(
                f"{files.root} is a folder of pictures; --image-column, --id-column and --image-root are for "
                "Parquet: give the .parquet file itself"
            )
        self._metadata = Metadata.of(files, options)
        if self._metadata is None and options.caption_column:
            raise SourceError(
                f"{files.root} has no metadata.jsonl or metadata.csv to take --caption-column from"
            )
        self.user_columns: list[pa.Field] = self._metadata.user_columns if self._metadata else []

    def describe(self) -> dict[str, Any]:
        kind = "imagefolder" if self._metadata else "folder"
        root = self._files.root
        caption = self._metadata.caption if self._metadata else None
        return {"kind": kind, "root": root, "shown_root": root, "caption_column": caption}

    def notes(self) -> list[str]:
        """Files that are not items, by ending."""
        return [f"{count} {ending} files passed over" for ending, count in sorted(self._ignored.items())]

    def listing(self) -> Iterator[pa.Table]:
        """The files in the order of their names; then metadata rows whose file is not there."""
        self._ignored.clear()
        entries = self._files.walk(self._skip)
        if self._metadata is None:
            for chunk in chunks(entries):
                yield listing_table(entry_columns(chunk))
            return
        rows_of, unsafe = self._metadata.rows()
        yield from self._with_metadata(entries, rows_of)
        for name, rows in sorted(rows_of.items()):
            missing = _bad(name, Reason.MISSING, "named in the metadata, but not there (or hidden)")
            yield from self._with_metadata(iter([missing]), {name: rows})
        for row, name, error in unsafe:
            item = _bad(name, error.reason, error.detail)
            yield from self._with_metadata(iter([item]), {name: [row]})

    def _skip(self, child: bytes) -> bool:
        if child.startswith(b"."):
            self._ignored["hidden"] += 1
            return True
        ending = os.path.splitext(child)[1].lower()
        if ending in SIDECARS:
            if ending != b".txt" and os.fsdecode(child) not in METADATA:
                self._ignored[ending.decode()] += 1
            return True
        return child in (b"Thumbs.db", b"desktop.ini")

    def _with_metadata(self, entries: Iterator[Entry], rows_of: dict[bytes, list[int]]) -> Iterator[pa.Table]:
        """Entries with caption and user columns of their metadata rows, which are taken out of `rows_of`."""
        metadata = self._metadata
        assert metadata is not None

        def paired() -> Iterator[tuple[Entry, int | None]]:
            for entry in entries:
                for row in rows_of.pop(entry.listed, [None]):
                    yield entry, row

        for chunk in chunks(paired()):
            picked = metadata.table.take(pa.array([row for _, row in chunk], pa.int64()))
            columns = entry_columns([entry for entry, _ in chunk])
            if metadata.caption:
                columns["caption"] = captions(picked[metadata.caption], f"column {metadata.caption!r}")
            user = picked.select(metadata.user_names).rename_columns([f.name for f in self.user_columns])
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
        return read_each(open_files(self.root), locators, stats, max_bytes)

    def read_captions(self, locators: Sequence[bytes | None]) -> Iterator[str | None]:
        files = open_files(self.root)

        def one(locator: bytes | None) -> str | None:
            try:
                return None if locator is None else caption_text(files.read(locator, head=CAPTION_HEAD))
            except ItemError:
                return None

        return in_order(one, locators, files.threads)


def entry_columns(entries: Sequence[Entry]) -> dict[str, list[Any]]:
    """Columns of a listing for files; the id is of the name, the locator is the name."""
    texts = [e.text_mtime_ns for e in entries]
    stems = [os.path.splitext(e.listed)[0] + b".txt" for e in entries]
    return {
        "id": [item_id(e.name) for e in entries],
        "path": [shown(e.name) for e in entries],
        "locator": [e.name for e in entries],
        "size": [e.size for e in entries],
        "mtime_ns": [e.mtime_ns for e in entries],
        "caption_locator": [stem if t is not None else None for stem, t in zip(stems, texts, strict=True)],
        "caption_mtime_ns": texts,
        "reason": [e.reason and str(e.reason) for e in entries],
        "detail": [e.detail if e.reason else None for e in entries],
    }


def _bad(name: bytes, reason: Reason, detail: str) -> Entry:
    return Entry(listed=name, name=name, reason=reason, detail=detail)
