"""Rows of made pictures: the columns that bulk synthesis writes, and pictures as PNG bytes.

A table of these columns is a data set that `datasets.load_dataset("parquet", …)` shows with
pictures. This module does not know how pictures are made (models) nor how rows become files
(ledger, export); no torch, no Ray.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from llmvis.schema import LISTING, UserError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""A picture in a table: encoded bytes, and the name of a file for them."""

MADE = pa.schema(
    [
        ("id", pa.string()),
        ("image", IMAGE),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption", pa.string()),  # describes the picture: what training on it needs
        ("prompt", pa.string()),  # what was asked: the prompt, or the instruction
        ("negative", pa.string()),  # what was to be avoided, if anything
        ("seed", pa.int64()),  # null where no chance was involved
        ("source", pa.string()),  # path of the picture that it was made from, if any
        ("source_id", pa.string()),
        ("model", pa.string()),
        ("model_fingerprint", pa.string()),
    ]
)
"""One row per made picture; the user's own columns follow. All fields can be null in Arrow's
eyes, since `datasets` takes a picture that cannot be for a plain struct."""

_DTYPES = {
    pa.bool_(): "bool",
    pa.int8(): "int8",
    pa.int16(): "int16",
    pa.int32(): "int32",
    pa.int64(): "int64",
    pa.uint8(): "uint8",
    pa.uint16(): "uint16",
    pa.uint32(): "uint32",
    pa.uint64(): "uint64",
    pa.float16(): "float16",
    pa.float32(): "float32",
    pa.float64(): "float64",
    pa.string(): "string",
    pa.large_string(): "large_string",
}  # Arrow type → the name that `datasets` has for it; it finds out about all others by itself


def made_schema(user_columns: Sequence[pa.Field]) -> pa.Schema:
    """`MADE`, the user's columns, and the metadata by which `datasets` knows the picture.

    Raises `UserError` where a user's column has a name of ours (see `user_fields`) or of another.
    """
    names = [*MADE.names, *(field.name for field in user_columns)]
    for field in user_columns:
        if names.count(field.name) > 1:
            raise UserError(f"{field.name!r} cannot be a column's name here, it is taken; rename that column")
    schema = pa.schema([*MADE, *(field.with_nullable(True) for field in user_columns)])
    return schema.with_metadata(features_metadata(schema))


def user_fields(fields: Sequence[pa.Field]) -> list[pa.Field]:
    """The fields under which a collection's columns go into `made_schema`, in the same order.

    A name that `MADE` has becomes `source_<name>`, as often as it takes to be a new one.
    """
    taken = {*MADE.names, *(field.name for field in fields)}
    found = []
    for field in fields:
        name = field.name
        while name in (MADE.names if name == field.name else taken):
            name = f"source_{name}"
        taken.add(name)
        found.append(field.with_name(name).with_nullable(True))
    return found


def features_metadata(schema: pa.Schema) -> dict[str, str]:
    """Schema metadata in which Hugging Face `datasets` looks for the kinds of columns."""
    features: dict[str, dict[str, str]] = {}
    for field in schema:
        if field.name == "image" and field.type == IMAGE:
            features[field.name] = {"_type": "Image"}
        elif field.type in _DTYPES:
            features[field.name] = {"dtype": _DTYPES[field.type], "_type": "Value"}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def png_bytes(picture: np.ndarray) -> bytes:
    """Pixels `uint8 (H, W, 3 | 4)`, RGB or RGBA → PNG without metadata.

    The same pixels give the same bytes wherever the same Pillow runs. Raises `ValueError` for
    other shapes or types.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] not in (3, 4) or not picture.size:
        raise ValueError(f"expected uint8 (H, W, 3 or 4), got {picture.dtype} {picture.shape}")
    out = BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(out, "PNG")
    return out.getvalue()


def image_path(row_id: str) -> str:
    """The file name that goes with a picture's bytes."""
    return f"{row_id}.png"


def picture_columns(row_id: str, data: bytes) -> dict[str, Any]:
    """The columns that a PNG fills: image, width, height."""
    with Image.open(BytesIO(data)) as image:
        width, height = image.size
    return {"image": {"bytes": data, "path": image_path(row_id)}, "width": width, "height": height}


def users_columns(fields: Iterable[pa.Field], added: Sequence[pa.Field]) -> list[pa.Field]:
    """The user's own among a table's fields: neither of the listing nor `added` by a job."""
    known = {*LISTING.names, *(field.name for field in added)}
    return [field for field in fields if field.name not in known]


def on_the_way(rows: Sequence[dict[str, Any]], listing: pa.Schema, more: Sequence[pa.Field]) -> pa.Table:
    """Rows of a listing with what a job found out, as a table."""
    return pa.Table.from_pylist(list(rows), pa.schema([*listing, *more]))


def made_table(made: Sequence[dict[str, Any]], table: pa.Table, added: Sequence[pa.Field]) -> pa.Table:
    """Rows of `MADE`'s columns, and beside them the user's columns of the `table` they were made from."""
    users = users_columns(table.schema, added)
    arrays = [pa.array([row.get(field.name) for row in made], field.type) for field in MADE]
    arrays += [table[field.name] for field in users]
    return pa.Table.from_arrays(arrays, schema=made_schema(user_fields(users)))
