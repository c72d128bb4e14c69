"""An imagefolder's metadata: tables whose `file_name` gives pictures captions and columns.

Knows no pictures; which files are there is `folder`'s to find out.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections import defaultdict
from typing import BinaryIO

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from llmvis.schema import ItemError, Reason
from llmvis.sources.base import (
    CAPTION_COLUMNS,
    SourceError,
    SourceOptions,
    can_carry,
    carried,
    pick_caption,
)
from llmvis.sources.files import Files

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class Metadata:
    """The rows of all metadata tables of a folder.

    `table` holds them, with `file_name` relative to the root; `user_names` are the columns of it that
    go along, under the names and types of `user_columns`.
    """

    def __init__(self, files: Files, names: list[bytes], options: SourceOptions) -> None:
        self._files = files
        tables = []
        for name in names:
            table = _read(files, name)
            folder = os.fsdecode(os.path.dirname(name))
            if folder:  # names are relative to their table; here, to the root
                at = table.schema.get_field_index("file_name")
                given = [None if n is None else f"{folder}/{n}" for n in table["file_name"].to_pylist()]
                table = table.set_column(at, "file_name", pa.array(given, pa.string()))
            tables.append(table)
        where = f"{files.root}/{os.fsdecode(names[0])}"
        try:
            self.table = pa.concat_tables(tables, promote_options="default")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise SourceError(f"{where} and its like have columns that differ: {error}") from error
        fields = [field for field in self.table.schema if field.name != "file_name"]
        carried(fields, where)
        self.caption = pick_caption(fields, options.caption_column, where)
        fields = [f for f in fields if f.name != self.caption and can_carry(f.type)]
        self.user_columns = carried(fields, where)
        self.user_names = [f.name for f in fields]

    @classmethod
    def of(cls, files: Files, options: SourceOptions) -> Metadata | None:
        """The tables in the root, else those of the folders in it (`train/metadata.csv`, …); None without any."""
        here = [name.encode() for name in METADATA]
        top = files.names()
        found = [name for name in here if name in top][:1]
        if not found:
            folders = [name for name in top if name.endswith(b"/") and not name.startswith(b".")]
            found = [folder + name for folder in folders for name in here if files.exists(folder + name)]
        return cls(files, found, options) if found else None

    def rows(self) -> tuple[dict[bytes, list[int]], list[tuple[int, bytes, ItemError]]]:
        """Row numbers by the name of their file; and (row, name, error) of those whose name is unsafe."""
        rows_of: dict[bytes, list[int]] = defaultdict(list)
        unsafe: list[tuple[int, bytes, ItemError]] = []
        for row, name in enumerate(self.table["file_name"].to_pylist()):
            try:
                if not name:
                    raise ItemError(Reason.EMPTY, "no file name")
                rows_of[self._files.place(str(name), follow=False)].append(row)
            except ItemError as error:
                key = str(name).encode() if name else b"\0row %d" % row  # no file can have that name
                unsafe.append((row, key, error))
        return rows_of, unsafe


def _read(files: Files, name: bytes) -> pa.Table:
    """A metadata table; file names and captions stay the text that they are."""
    where = f"{files.root}/{os.fsdecode(name)}"
    try:
        with files.open(name) as file:
            if name.endswith(b".jsonl"):
                table = _read_lines(file)
            elif name.endswith(b".csv"):
                table = _read_csv(file)
            else:
                table = pq.read_table(file)
    except ItemError as error:
        raise SourceError(f"{where} cannot be read: {error.detail}") from error
    except (pa.ArrowException, ValueError, OSError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{where} cannot be read: {error}") from error
    if table.column_names.count("file_name") != 1:
        raise SourceError(f"{where} has no column 'file_name'; it has: {', '.join(table.column_names)}")
    return table


def _read_lines(file: BinaryIO) -> pa.Table:
    first = json.loads(file.readline() or b"{}")
    file.seek(0)
    text = [n for n in CAPTION_COLUMNS if isinstance(first.get(n), str)]
    schema = pa.schema([(name, pa.string()) for name in ("file_name", *text)])
    return pyarrow.json.read_json(file, parse_options=pyarrow.json.ParseOptions(explicit_schema=schema))


def _read_csv(file: BinaryIO) -> pa.Table:
    data = file.read()
    header = next(csv.reader(io.StringIO(data.decode("utf-8-sig"), newline="")), [])
    text = [name for name in ("file_name", *CAPTION_COLUMNS) if name in header]
    options = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(text, pa.string()))
    parse = pyarrow.csv.ParseOptions(newlines_in_values=True)
    return pyarrow.csv.read_csv(io.BytesIO(data), convert_options=options, parse_options=parse)
