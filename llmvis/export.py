"""Made rows → data sets that others can load: Parquet with pictures, webdataset tars, imagefolders.

Packers take one table of `made.made_schema` and give the bytes of one shard's file, the same
bytes for the same table. It does not know which shards there are (plan, ledger), what was asked
of the rows (gates), or what a data set says of itself (card); no torch, no Ray.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmvis.ledger import Packing
from llmvis.made import features_metadata, image_path
from llmvis.schema import item_id
from llmvis.storage import LocalStore

ROW_GROUP = 100
"""Rows that a reader has to take at a time; few, since each holds a picture."""

FLAT_FOLDER = 10_000
"""Pictures that may lie in one folder; more go into sub-folders by the first two signs of their key."""

_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")


def pack_parquet(table: pa.Table) -> bytes:
    """A Parquet file, zstd, that `datasets` shows with pictures, in row groups of `ROW_GROUP`."""
    sink = pa.BufferOutputStream()
    marked = table.replace_schema_metadata(features_metadata(table.schema))
    # the page index lets a data-set viewer fetch a few rows
    pq.write_table(marked, sink, compression="zstd", row_group_size=ROW_GROUP, write_page_index=True)
    return bytes(sink.getvalue().to_pybytes())


def pack_webdataset(table: pa.Table) -> bytes:
    """A webdataset tar: for each row `<key>.png`, `<key>.txt` (caption), `<key>.json` (all other columns).

    The key is the row's id, or a hash of it where it is not a plain name (see `row_key`); the id
    itself is in the JSON. No times, no owners. Raises `ValueError` where two rows have one id.

    A text that is null is written as "": `datasets` knows a column's type from the first five samples alone, and
    where all of these are null it cannot read a text that comes later.
    """
    texts = [field.name for field in table.schema if pa.types.is_string(field.type)]
    out = io.BytesIO()
    seen: set[str] = set()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row in _rows(table):
            key = row_key(row["id"])
            if key in seen:
                raise ValueError(f"two rows have the id {row['id']!r}")
            seen.add(key)
            row |= {name: row[name] or "" for name in texts}
            data, caption = row.pop("image")["bytes"], row.pop("caption")
            for ending, content in (
                ("png", data),
                ("txt", caption.encode()),
                ("json", _json(_plain(row)).encode()),
            ):
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def unpack_webdataset(data: bytes, schema: pa.Schema) -> pa.Table:
    """The rows that `pack_webdataset` packed, in the columns of `schema`."""
    rows: dict[str, dict[str, Any]] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            key, _, ending = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None, f"{member.name} is no file: not a tar of ours"
            row, content = rows.setdefault(key, {}), file.read()
            if ending == "png":
                row["image"] = {"bytes": content, "path": member.name}
            elif ending == "txt":
                row["caption"] = content.decode()
            else:
                row |= json.loads(content)
    return pa.Table.from_pylist(
        [{name: row.get(name) for name in schema.names} for row in rows.values()], schema
    )


def write_imagefolder(
    tables: Iterable[pa.Table], folder: Path, *, rows: int, lost: Callable[[], int] = lambda: 0
) -> None:
    """A Hugging Face imagefolder: `images/<key>.png` and, last, `metadata.jsonl` with `file_name` and columns.

    A picture whose `path` has another ending than .png keeps that.

    Above `FLAT_FOLDER` rows pictures lie in `images/<first two signs of the key>/`. A killed run
    is run again with the same rows: pictures that are there stay, what it left half-written
    goes, `metadata.jsonl` appears whole. Readers take any other picture in `folder` for a part
    of the data set: put the card and its contact sheet above it.

    `datasets` knows a column's type from the first 10 MB of `metadata.jsonl`. So the rows that first
    have a value somewhere are listed before the others, and names that end in `file_name`, which
    it takes for pictures, are written `filename`.

    Args:
        tables: with `id` and `image` (`made.IMAGE`), in canonical order; one is in memory at a time.
        folder: made where it is not there; for this data set alone.
        rows: how many there are in all tables, and
        lost: how many of them did not come after all, asked at the end.

    Raises:
        ValueError: where the tables have another number of rows, or two have one id; nothing is
            published then.
    """
    store = LocalStore(folder)
    for stale in folder.glob(".aside-*"):
        stale.unlink()
    known: set[tuple[str, ...]] = set()
    keys: set[str] = set()
    first: list[bytes] = []
    with tempfile.TemporaryFile() as rest:
        for table in tables:
            names = _metadata_names(table.column_names)
            for row in _rows(table):
                key = row_key(row["id"])
                if key in keys:
                    raise ValueError(f"two rows have the id {row['id']!r}")
                keys.add(key)
                place = f"images/{key[:2]}" if rows > FLAT_FOLDER else "images"
                image = row.pop("image")
                ending = PurePosixPath(image["path"] or "").suffix
                name = f"{place}/{key}{ending}" if ending else f"{place}/{image_path(key)}"
                _write_picture(store, name, image["bytes"])
                described = _plain({"file_name": name, **{names[column]: row[column] for column in row}})
                line = f"{_json(described)}\n".encode()
                new = set(_values(described)) - known
                known |= new
                if new:
                    first.append(line)
                else:
                    rest.write(line)
        if len(keys) + lost() != rows:
            raise ValueError(f"{len(keys)} rows in the tables, {rows} announced")
        os.sync()  # all pictures at once: a flush for each took thirty times as long
        rest.seek(0)
        with store.create("metadata.jsonl") as file:
            file.writelines(first)
            shutil.copyfileobj(rest, file)


def row_key(row_id: str) -> str:
    """A row's name in tars and folders: its id, or the id's hash where a reader could misread it.

    Webdataset ends a key at its first dot, and a slash would make a folder.
    """
    return row_id if _PLAIN_KEY.fullmatch(row_id) else item_id(row_id.encode())


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Row by row, since all pictures as Python objects are a second copy of the table."""
    for batch in table.to_batches(max_chunksize=ROW_GROUP):
        yield from batch.to_pylist()


def _write_picture(store: LocalStore, name: str, data: bytes) -> None:
    """Not aside and renamed: until `metadata.jsonl` is there nothing counts, and a half is written anew."""
    path = store.path(name)
    if not path.exists() or path.read_bytes() != data:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _metadata_names(columns: list[str]) -> dict[str, str]:
    """Column → its name in `metadata.jsonl`."""
    taken = set(columns)
    names = {}
    for column in columns:
        name = column
        while name.endswith(("file_name", "file_names")) or (name != column and name in taken):
            name = name.replace("file_name", "filename") if "file_name" in name else f"{name}_"
        names[column] = name
        taken.add(name)
    return names


def _values(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all that is not null inside a row, by which a reader finds types."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _values(inner, (*path, key))
    elif isinstance(value, list):
        for inner in value:
            yield from _values(inner, (*path, "[]"))
    elif value is not None:
        yield path


def _json(plain: Any) -> str:
    return json.dumps(plain, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    """The value in JSON's own kinds; what JSON has no number for is null, times and the like are text."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


PICTURES = Packing(ending="parquet", pack=pack_parquet)
"""Parquet as a data set has it: few pictures in a row group."""

PACKINGS = {
    "parquet": PICTURES,
    "webdataset": Packing(ending="tar", pack=pack_webdataset),
    "imagefolder": PICTURES,  # unfolded at the end: write_imagefolder
}
