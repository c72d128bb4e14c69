"""What lies in a collection: its items in canonical order, and the bytes behind each.

A `Source` lists (on the driver, streaming); its `Reader` opens items (in tasks on
any node). They meet in `locator`, a short byte string in the listing whose meaning is
the source's own. Nothing here decodes a picture or knows Ray.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

from llmvis.schema import MAKERS, ROWS, SCORES, ItemError
from llmvis.sources.base import Reader, Source, SourceError, SourceOptions
from llmvis.sources.files import Files, LocalFiles, open_files
from llmvis.sources.folder import FolderReader, FolderSource
from llmvis.sources.img2dataset import Img2datasetSource, made_by_img2dataset
from llmvis.sources.parquet import ParquetReader, ParquetSource
from llmvis.sources.records import RecordReader
from llmvis.sources.tars import TarReader, TarSource
from llmvis.storage import local_path

EMBEDDED = "emoji"
"""The name under which the packaged collection is asked for."""

PACKED = (b".parquet", b".tar", b".tfrecord")
"""Endings of files that hold many pictures."""
COMPRESSED = (b".tar.gz", b".tgz", b".tar.bz2", b".tar.xz", b".tar.zst")
BESIDE = (b".md", b".json", b".txt", b".yaml", b".crc")
"""Endings of notes and cards, which do not make a folder of tables one of pictures."""

_OF_ANOTHER_PICTURE = frozenset(
    ("id", "width", "height", "negative", "source", "source_id", "model_fingerprint")
)
"""Columns of made pictures that do not go along when something is made of them again."""

__all__ = [
    "EMBEDDED",
    "Reader",
    "Source",
    "SourceError",
    "SourceOptions",
    "check_apart",
    "open_masks",
    "open_reader",
    "open_source",
]


def open_source(images: str, options: SourceOptions | None = None) -> Source:
    """The source for `images`: a folder or an address in an object store, or one file with many pictures.

    In this order: the packaged `emoji`; what a job made; what img2dataset made; Parquet files or webdataset
    tars, where a folder holds nothing else but notes; an imagefolder, where it holds `metadata.jsonl`,
    `.csv` or `.parquet`; a folder of pictures. Raises `SourceError` where there is nothing to read.
    """
    options = options or SourceOptions()
    if images == EMBEDDED and not local_path(images).exists():
        from llmvis.data import emoji_path

        images = str(emoji_path())
    if (one := _one_file(images)) is not None:
        files, name = one
        if name.endswith(COMPRESSED):
            raise _compressed(images)
        return (
            ParquetSource(files, [name], options)
            if name.endswith(b".parquet")
            else TarSource(files, [name], options)
        )
    files = open_files(images)
    if (made := _files_of_a_job(files)) is not None:
        keyed = replace(options, id_column=options.id_column or "id", image_column="image")
        return ParquetSource(files, made, keyed, leave_out=_OF_ANOTHER_PICTURE)
    if made_by_img2dataset(files.names()):
        return Img2datasetSource(files, options)
    packed = _packed_files(files)
    if any(name.endswith(COMPRESSED) for name in packed):
        raise _compressed(f"{files.root}/{os.fsdecode(packed[0])}")
    tars = [name for name in packed if name.endswith(b".tar")]
    if tars:
        return TarSource(files, tars, options)
    if packed and packed[0].endswith(b".tfrecord"):
        raise SourceError(
            f"{files.root} holds TFRecords without the tables and _stats.json files that img2dataset writes beside "
            "them, and only such can be read"
        )
    return ParquetSource(files, packed, options) if packed else FolderSource(files, options)


def _one_file(images: str) -> tuple[Files, bytes] | None:
    """The folder and the name of `images` where it is one file. Raises `SourceError` where it is none that is read."""
    files = open_files(images)
    local = isinstance(files, LocalFiles)
    if local and os.path.isdir(files.root):
        return None
    folder, _, name = files.root.rpartition("/")
    known = name.endswith((".parquet", ".tar")) or os.fsencode(name).endswith(COMPRESSED)
    if local and not os.path.exists(files.root):
        hint = f" (the packaged collection is called {EMBEDDED!r})" if "/" not in images else ""
        raise SourceError(f"{files.root} does not exist{hint}")
    if local and not known:
        raise SourceError(f"{files.root} is a file; --images takes a folder, a .parquet or a .tar file")
    above = open_files(folder or "/")
    try:
        if known:
            above.stat(os.fsencode(name))
            return above, os.fsencode(name)
    except ItemError:
        pass  # a prefix of an object store with such a name
    return None


def _packed_files(files: Files) -> list[bytes]:
    """Sorted names of the files where all of a collection are tables, or all are tars; else none.

    Notes, cards and hidden files don't count, nor tables beside tars.
    """
    found: list[bytes] = []

    def skip(name: bytes) -> bool:
        return name.startswith(b".") or (not name.endswith(b"/") and name.endswith(BESIDE))

    for entry in files.walk(skip):
        name = entry.listed
        if entry.reason and files.names(name):
            continue  # a link to a folder, which is not followed
        if not name.endswith((*PACKED, *COMPRESSED)) or name.rpartition(b"/")[2] == b"metadata.parquet":
            return []
        found.append(name)
    found.sort(key=lambda name: name.split(b"/"))  # folder by folder
    return [name for name in found if not name.endswith(b".parquet")] or found


def _compressed(where: str) -> SourceError:
    return SourceError(
        f"{where} is compressed, so that no picture in it can be reached by itself; unpack it to a plain .tar "
        "(gzip -d, zstd -d, …)"
    )


def check_apart(images: str, out: str) -> None:
    """Raises `SourceError` where pictures written to `out` would be found among `images` by the next run."""
    if "://" in images or "://" in out:
        within = f"{out.rstrip('/')}/".startswith(f"{images.rstrip('/')}/")
    else:
        root, folder = local_path(images).resolve(), local_path(out).resolve()
        within = root.is_dir() and folder.is_relative_to(root)
    if within:
        raise SourceError(
            f"--out {out} lies in --images {images}: what is made would count as input when the job is run again. "
            "Choose a folder outside of it"
        )


def _files_of_a_job(files: Files) -> list[bytes] | None:
    """The files with pictures that the manifest of a finished job names; None if there was none.

    Raises `SourceError` where the job is not finished, wrote no picture, or no Parquet.
    """
    plans = [files.exists(f"{place}plan.json".encode()) for place in ("", f"{ROWS}/", f"{SCORES}/")]
    if not any(plans):
        return None
    root, place = files.root, f"{ROWS}/" if not plans[0] and plans[1] else ""
    if not files.exists(f"{place}manifest.json".encode()):
        raise SourceError(f"{root} holds a job that is not finished: run it again and it goes on")
    try:
        manifest = json.loads(files.read(f"{place}manifest.json".encode()))
    except ValueError as error:
        raise SourceError(f"{root}/{place}manifest.json was not written by llmvis: {error}") from error
    if manifest.get("job") not in MAKERS:
        raise SourceError(f"{root} is the output of {manifest.get('job')!r}, which holds no pictures")
    names = [file["name"] for file in manifest["files"]]
    if not names:
        raise SourceError(f"{root} is finished, and without a single picture")
    if not all(name.endswith(".parquet") for name in names):
        raise SourceError(
            f"{root} holds tars, which are not read again: make the data set with --format parquet"
        )
    return [f"{place}{name}".encode() for name in names]


def open_masks(mask: str, images: str, options: SourceOptions) -> Source:
    """The source of masks for `images`: a folder of pictures of the same names, or a column of its tables."""
    if "://" in mask or local_path(mask).is_dir():
        return open_source(mask)
    if not isinstance(open_source(images, options), ParquetSource):
        raise SourceError(f"--mask {mask}: there is no such folder, and {images} has no columns")
    return open_source(images, SourceOptions(image_column=mask, image_root=options.image_root))


def open_reader(description: dict[str, Any]) -> Reader:
    """The reader for what `Source.describe` once said; raises `SourceError` for an unknown kind."""
    kind = description.get("kind")
    if kind in ("folder", "imagefolder"):
        return FolderReader(str(description["root"]))
    if kind == "parquet":
        return ParquetReader(description)
    if kind == "webdataset":
        return TarReader(str(description["root"]))
    if kind == "tfrecord":
        return RecordReader(str(description["root"]))
    raise SourceError(f"this version of llmvis cannot read a collection of kind {kind!r}")
