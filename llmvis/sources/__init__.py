"""What lies in a collection: its items in canonical order, and the bytes behind each.

A `Source` lists (on the driver, streaming); its `Reader` opens items (in tasks on
any node). They meet in `locator`, a short byte string in the listing whose meaning is
the source's own. Nothing here decodes a picture or knows Ray.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llmvis.schema import MAKERS, SCORES
from llmvis.sources.base import Reader, Source, SourceError, SourceOptions
from llmvis.sources.folder import FolderReader, FolderSource
from llmvis.sources.parquet import ParquetReader, ParquetSource, parquet_files
from llmvis.storage import local_path, rows_of_job

EMBEDDED = "emoji"
"""The name under which the packaged collection is asked for."""

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
    """The source for `images`: a folder, an imagefolder, Parquet files, what a job made, or the packaged `emoji`.

    A folder is an imagefolder where it holds `metadata.jsonl`, `.csv` or `.parquet`; a
    Parquet collection where its tables are Parquet files and it holds no pictures.
    Raises `SourceError` where there is nothing to read.
    """
    options = options or SourceOptions()
    root = local_path(images)
    if images == EMBEDDED and not root.exists():
        from llmvis.data import emoji_path

        return ParquetSource(emoji_path(), options)
    if root.is_file() and root.suffix == ".parquet":
        return ParquetSource(root, options)
    if root.is_file():
        raise SourceError(f"{root} is a file; --images takes a folder or a .parquet file")
    if not root.is_dir():
        hint = f" (the packaged collection is called {EMBEDDED!r})" if "/" not in images else ""
        raise SourceError(f"{root} does not exist{hint}")
    if (made := _files_of_a_job(root)) is not None:
        keyed = replace(options, id_column=options.id_column or "id", image_column="image")
        return ParquetSource(root, keyed, made, leave_out=_OF_ANOTHER_PICTURE)
    if parquet_files(root):
        return ParquetSource(root, options)
    return FolderSource(root, options)


def check_apart(images: str, out: str) -> None:
    """Raises `SourceError` where pictures written to `out` would be found among `images` by the next run."""
    root, folder = local_path(images).resolve(), local_path(out).resolve()
    if root.is_dir() and folder.is_relative_to(root):
        raise SourceError(
            f"--out {out} lies in --images {images}: what is made would count as input when the job is run again. "
            "Choose a folder outside of it"
        )


def _files_of_a_job(root: Path) -> list[Path] | None:
    """The files with pictures that the manifest of a finished job at `root` names; None if it is none.

    Raises `SourceError` where the job is not finished, wrote no picture, or no Parquet.
    """
    store = rows_of_job(root)
    begun = store.exists("plan.json") or store.exists(f"{SCORES}/plan.json")
    if not begun:
        return None
    if not store.exists("manifest.json"):
        raise SourceError(f"{root} holds a job that is not finished: run it again and it goes on")
    manifest = store.read_json("manifest.json")
    if manifest.get("job") not in MAKERS:
        raise SourceError(f"{root} is the output of {manifest.get('job')!r}, which holds no pictures")
    names = [file["name"] for file in manifest["files"]]
    if not names:
        raise SourceError(f"{root} is finished, and without a single picture")
    if not all(name.endswith(".parquet") for name in names):
        raise SourceError(
            f"{root} holds tars, which are not read again: make the data set with --format parquet"
        )
    return [store.path(name) for name in names]


def open_masks(mask: str, images: str, options: SourceOptions) -> Source:
    """The source of masks for `images`: a folder of pictures of the same names, or a column of its tables."""
    if local_path(mask).is_dir():
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
    raise SourceError(f"this version of llmvis cannot read a collection of kind {kind!r}")
