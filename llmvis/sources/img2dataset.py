"""What img2dataset leaves behind: a table and `_stats.json` a shard, and pictures in one of four formats.

The table says which rows were downloaded, with the user's columns; the pictures are in the same
table, in a tar, in a TFRecord file or in a folder beside it, found by `key`. Ids are of the keys, so they
are the same in all formats. A row without a picture is a dead letter with img2dataset's reason.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa

from llmvis.schema import Reason, item_id
from llmvis.sources.base import SourceError, SourceOptions, chunks, listing_table
from llmvis.sources.files import Files
from llmvis.sources.folder import entry_columns
from llmvis.sources.parquet import ParquetSource
from llmvis.sources.records import scan_records
from llmvis.sources.tars import PICTURES, sample_columns, scan

_STATS = re.compile(rb"(\d+)_stats\.json")
KINDS = {b".tar": "webdataset", b".tfrecord": "tfrecord", b"/": "folder"}
"""What lies beside a shard's table, and the kind of reader that opens it."""
FOUND = ("path", "locator", "size", "mtime_ns", "reason", "detail")

Row = dict[str, Any]


def made_by_img2dataset(names: list[bytes]) -> bool:
    """Whether a folder with these names is img2dataset's."""
    return any(_STATS.fullmatch(name) for name in names)


class Img2datasetSource:
    """The rows of all shards that img2dataset finished, in the order of shards and rows.

    Raises:
        SourceError: there is no picture (output format `dummy`), or a finished shard has no table.
    """

    def __init__(self, files: Files, options: SourceOptions) -> None:
        self._files = files
        top = set(files.names())
        self._shards = sorted(found[1] for name in top if (found := _STATS.fullmatch(name)))
        tables = [shard + b".parquet" for shard in self._shards]
        lacking = [name for name in tables if name not in top]
        if len(lacking) == len(tables):
            raise SourceError(
                f"{files.root} holds no pictures: img2dataset ran with the output format `dummy`. Run it again "
                "with --output_format files, webdataset, parquet or tfrecord"
            )
        if lacking:
            raise SourceError(f"{files.root}/{os.fsdecode(lacking[0])} is not there: run img2dataset again")
        every = {found[1] for name in top if (found := re.fullmatch(rb"(\d+)(?:\.\w+|/)", name))}
        self._unfinished = len(every - set(self._shards))
        self._beside = next((end for end in KINDS if any(shard + end in top for shard in self._shards)), None)
        if options.image_column or options.image_root:
            raise SourceError("--image-column and --image-root do not go with what img2dataset made")
        keyed = replace(options, id_column=options.id_column or "key")
        self._table = ParquetSource(files, tables, keyed, pictures=self._beside is None)
        self.user_columns = self._table.user_columns

    def describe(self) -> dict[str, Any]:
        told = {**self._table.describe(), "layout": "img2dataset"}
        return told if self._beside is None else {**told, "kind": KINDS[self._beside]}

    def notes(self) -> list[str]:
        left = f"{self._unfinished} shards that img2dataset did not finish are passed over: run it again"
        return [*self._table.notes(), *([left] if self._unfinished else [])]

    def listing(self) -> Iterator[pa.Table]:
        """Rows of the tables; then, of each shard, pictures that its table does not have."""
        for index, shard in enumerate(self._shards):
            pictures = None if self._beside is None else self._pictures(shard)
            for chunk in self._table.listing_of(index):
                yield self._with_pictures(chunk, pictures, shard)
            for rows in chunks((pictures or {}).values()):
                columns = {name: [row.get(name) for row in rows] for name in rows[0]}
                nulls = [pa.nulls(len(rows), field.type) for field in self.user_columns]
                yield listing_table(columns, pa.Table.from_arrays(nulls, schema=pa.schema(self.user_columns)))

    def _pictures(self, shard: bytes) -> dict[str, Row]:
        """What a listing says of each picture of a shard, by key."""
        if self._beside == b"/":
            walk = self._files.walk(_no_picture, shard + b"/")
            entries = [e for e in walk if not e.listed.endswith(b"/")]  # a folder that is gone
            keys = [os.path.splitext(os.path.basename(os.fsdecode(e.listed)))[0] for e in entries]
            columns = entry_columns(entries)
        else:
            assert self._beside is not None
            name = shard + self._beside
            archive = (
                scan(self._files, name, columns=False)
                if self._beside == b".tar"
                else scan_records(self._files, name)
            )
            keys = [f"{s.key}\0{s.nth}" if s.nth or not s.key else s.key for s in archive.samples]
            columns = sample_columns(archive, archive.samples)
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        for key, row in zip(keys, rows, strict=True):
            if "\0" not in key:
                row["id"] = item_id(key.encode("utf-8", "surrogateescape"))
        return dict(zip(keys, rows, strict=True))

    def _with_pictures(self, chunk: pa.Table, pictures: dict[str, Row] | None, shard: bytes) -> pa.Table:
        """The rows with the places of their pictures, which are taken out of `pictures`."""
        status, message = (self._column(chunk, name) for name in ("status", "error_message"))
        rows = [dict(row) for row in chunk.select(FOUND).to_pylist()]
        for row, key, state, words in zip(rows, self._column(chunk, "key"), status, message, strict=True):
            if state not in (None, "success"):
                row |= _no(f"img2dataset: {state}: {words}")
            elif pictures is not None:
                where = f"{os.fsdecode(shard)}{os.fsdecode(self._beside or b'')}"
                row |= _known(pictures.pop(key, None)) or _no(f"in the table, but not in {where}")
        for name in FOUND:
            at = chunk.schema.get_field_index(name)
            column = pa.array([row[name] for row in rows], chunk.schema.field(name).type)
            chunk = chunk.set_column(at, chunk.schema.field(name), column)
        return chunk

    @staticmethod
    def _column(chunk: pa.Table, name: str) -> list[Any]:
        there = name in chunk.schema.names
        return chunk[name].to_pylist() if there else [None] * chunk.num_rows


def _known(row: Mapping[str, Any] | None) -> Row:
    return {} if row is None else {name: row[name] for name in FOUND}


def _no(detail: str) -> Row:
    return {"reason": str(Reason.MISSING), "detail": detail, "locator": b""}


def _no_picture(child: bytes) -> bool:
    ending = os.path.splitext(child)[1][1:].lower().decode("latin-1")
    return not child.endswith(b"/") and ending not in PICTURES
