"""Embeddings in clip-retrieval's layout, out and in.

    img_emb/img_emb_00.npy          (N, D), float16, unit length
    metadata/metadata_00.parquet    row i says what row i of the vectors is of: image_path, caption, …

Out of it, clip-retrieval's back end, autofaiss and embedding-reader take their vectors. Knows the files,
no model and no index.
"""

from __future__ import annotations

import io
import posixpath
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from llmvis.encode import clip
from llmvis.ledger import read_data, read_manifest
from llmvis.schema import ItemError, UserError, item_id
from llmvis.sources.base import SourceError, SourceOptions, captions, shown
from llmvis.sources.files import open_files
from llmvis.sources.tables import Tables
from llmvis.storage import LocalStore, StorageError, Store, local_path, open_store

PART_ROWS = 100_000
"""Vectors in a file: more than a shard of an encode job has, so that there are few files."""
BLOCK_ROWS = 8_192

_VECTORS = re.compile(rb"img_emb_(\d+)\.npy")
_LEFT_OUT = ("locator", "embedding", "caption_truncated", "path")


def export(embeddings: str, out: str) -> dict[str, Any]:
    """Writes the vectors of a finished `jobs.encode` in clip-retrieval's layout; returns `{rows, parts, dim}`.

    `out` appears whole, by one rename, or not at all. One part's metadata is in memory at a time.

    Raises:
        StorageError: `embeddings` is no finished encode job, a file of it is damaged, or `out` is there already.
    """
    encoded, folder = open_store(embeddings), local_path(out)
    manifest = read_manifest(encoded, "encode")
    if not manifest["rows"]:
        raise StorageError(f"{embeddings} holds no vectors: every picture is a dead letter")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StorageError(f"{out} is there already; choose a new folder for --out")
    folder.parent.mkdir(parents=True, exist_ok=True)
    parts = list(_parts(manifest["files"]))
    with tempfile.TemporaryDirectory(
        prefix=".aside-", dir=folder.parent, ignore_cleanup_errors=True
    ) as aside:
        whole = LocalStore(Path(aside) / "whole")
        for number, files in enumerate(parts):
            _write_part(encoded, manifest, whole, f"{number:0{len(str(len(parts) - 1))}}", files)
        whole.root.replace(folder)
    return {"rows": manifest["rows"], "parts": len(parts), "dim": manifest["model"]["dim"]}


def _parts(files: Sequence[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Files in groups of at most `PART_ROWS` rows, or of one file; none is empty."""
    part: list[dict[str, Any]] = []
    for file in files:
        if part and sum(f["rows"] for f in part) + file["rows"] > PART_ROWS:
            yield part
            part = []
        part.append(file)
    yield part


def _write_part(
    encoded: Store, manifest: dict[str, Any], out: Store, number: str, files: Sequence[dict[str, Any]]
) -> None:
    rows, dim = sum(file["rows"] for file in files), int(manifest["model"]["dim"])
    metadata = []
    with out.create(f"img_emb/img_emb_{number}.npy") as vectors:
        header = {"descr": "<f2", "fortran_order": False, "shape": (rows, dim)}
        np.lib.format.write_array_header_1_0(vectors, header)
        for file in files:
            table = read_data(encoded, file)
            flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            vectors.write(np.ascontiguousarray(flat, "<f2").tobytes())
            metadata.append(_metadata(table, str(manifest["source"]["shown_root"])))
    with out.create(f"metadata/metadata_{number}.parquet") as place:
        pq.write_table(pa.concat_tables(metadata), place, compression="zstd")


def _metadata(table: pa.Table, root: str) -> pa.Table:
    """`image_path`, `caption`, and all that an encode job knows of a row; its own names give way to theirs."""
    paths = [posixpath.join(root, path) for path in table["path"].to_pylist()]
    rest = table.drop_columns([*_LEFT_OUT, "caption"])
    taken = {"image_path", "caption"}
    rest = rest.rename_columns([f"source_{name}" if name in taken else name for name in rest.column_names])
    rest = rest.add_column(0, "caption", table["caption"])
    return rest.add_column(0, "image_path", pa.array(paths, pa.string()))


def is_clip_folder(folder: str) -> bool:
    """Whether `folder` has vectors in clip-retrieval's layout."""
    return any(_VECTORS.fullmatch(name) for name in open_files(folder).names(b"img_emb"))


class ClipFolder:
    """Vectors and metadata of clip-retrieval's layout, as `index.build` takes them. Picklable.

    Args:
        image_root: what relative paths of pictures start from, and none may leave.
        dim: of the model whose vectors they are said to be.

    Raises:
        SourceError: a part lacks its other half, has another number of rows, or other dimensions.
    """

    def __init__(self, folder: str, *, dim: int, image_root: str | None = None) -> None:
        self._files, self._dim = open_files(folder), dim
        found = {m[1]: m[0] for n in self._files.names(b"img_emb") if (m := _VECTORS.fullmatch(n))}
        numbers = sorted(found, key=lambda number: (int(number), number))
        self._vectors = [b"img_emb/" + found[number] for number in numbers]
        metadata = [b"metadata/metadata_%s.parquet" % number for number in numbers]
        for name in metadata:
            if not self._files.exists(name):
                raise SourceError(f"{self._files.root}/{shown(name)} is not there, and its vectors are")
        self._tables = Tables(self._files, metadata, SourceOptions(image_column="image_path"))
        self._counts = [self._count(index) for index in range(len(numbers))]
        root = open_files(image_root).root if image_root else self._files.root
        self.source = {
            "kind": "parquet", "root": self._files.root, "image_root": root, "shown_root": "",
            "image_column": "image_path", "image_kind": "path", "files": [],
        }  # fmt: skip

    def _count(self, index: int) -> int:
        """Rows of a part, after its two halves are compared."""
        where = f"{self._files.root}/{shown(self._vectors[index])}"
        with self._open(index) as file:
            rows, _ = _header(file, where, self._dim)
        with self._files.open(self._tables.names[index], 0) as file:
            described = pq.read_metadata(file).num_rows
        if described != rows:
            raise SourceError(
                f"{where} has {rows:,} rows and {self._tables.where(index)} {described:,}: they are not of one run"
            )
        return rows

    def _open(self, index: int) -> BinaryIO:
        try:
            return self._files.open(self._vectors[index])
        except ItemError as error:
            where = f"{self._files.root}/{shown(self._vectors[index])}"
            raise SourceError(f"{where} cannot be read: {error.detail}") from error

    def parts(self) -> list[ClipPart]:
        """What there is to index."""
        return [ClipPart(folder=self, index=index) for index in range(len(self._vectors))]

    def read(self, index: int, start: int, stop: int) -> Iterator[pa.Table]:
        """Rows of a part with `embedding`, as the file has it, and what a search shows of a hit."""
        where = f"{self._files.root}/{shown(self._vectors[index])}"
        with self._open(index) as file:
            _, kind = _header(file, where, self._dim)
            width = self._dim * kind.itemsize
            file.seek(start * width, io.SEEK_CUR)
            row = 0
            for _, _, batch in self._tables.batches(index, BLOCK_ROWS):
                first, row = row, row + batch.num_rows
                some = batch.slice(max(0, start - first), max(0, min(row, stop) - max(first, start)))
                if some.num_rows == 0:
                    continue
                data = file.read(some.num_rows * width)
                if len(data) < some.num_rows * width:
                    raise SourceError(f"{where} is cut off; copy it again")
                flat = pa.array(np.frombuffer(data, kind.newbyteorder("=")))
                column = pa.FixedSizeListArray.from_arrays(flat, self._dim)
                yield self._rows(some, index, max(first, start)).append_column("embedding", column)

    def count(self, index: int) -> int:
        """Rows of a part."""
        return self._counts[index]

    def _rows(self, batch: pa.RecordBatch, index: int, row: int) -> pa.Table:
        paths = [path or "" for path in batch["image_path"].to_pylist()]
        name = shown(self._tables.names[index])
        told = (
            captions(batch[self._tables.caption], "caption") if self._tables.caption else [None] * len(paths)
        )
        clipped = [clip(text) for text in told]
        user = self._tables.carried(batch, index)
        sizes = {}
        for side in ("width", "height"):
            carried = f"source_{side}"
            known = carried in user.column_names and pa.types.is_integer(user.schema.field(carried).type)
            sizes[side] = user[carried].to_pylist() if known else [0] * len(paths)
        columns = {
            "id": pa.array([item_id(f"{name}#{row + i} {path}".encode()) for i, path in enumerate(paths)]),
            "path": pa.array(paths, pa.string()),
            "locator": pa.array([path.encode() for path in paths], pa.binary()),
            "caption": pa.array([c["caption"] for c in clipped], pa.string()),
            "caption_truncated": pa.array([c["caption_truncated"] for c in clipped], pa.bool_()),
            **{side: pa.array([size or 0 for size in sizes[side]], pa.int32()) for side in sizes},
        }
        return pa.table({**columns, **dict(zip(user.column_names, user.columns, strict=True))})


@dataclass(frozen=True, kw_only=True)
class ClipPart:
    """One pair of files."""

    folder: ClipFolder
    index: int
    key: str = ""  # their hashes are nobody's, so what was made of them before is made again

    @property
    def rows(self) -> int:
        return self.folder.count(self.index)

    @property
    def source(self) -> dict[str, Any]:
        return self.folder.source

    def read(self, start: int, stop: int) -> Iterator[pa.Table]:
        """As `ClipFolder.read`."""
        return self.folder.read(self.index, start, stop)


def _header(file: BinaryIO, where: str, dim: int) -> tuple[int, np.dtype[Any]]:
    """Rows and kind of an `.npy`, read up to its first vector. Raises `SourceError` unless it is `(N, dim)`."""
    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran, kind = read(file)
    except UserError:
        raise
    except ValueError as error:
        raise SourceError(f"{where} is no .npy file: {error}") from error
    if len(shape) != 2 or fortran or kind.kind != "f":
        raise SourceError(f"{where} holds {kind} of shape {shape}; needed are rows of float16 or float32")
    if shape[1] != dim:
        raise SourceError(f"{where} has {shape[1]} dimensions, the model has {dim}; name another --model")
    return int(shape[0]), kind
