"""What lies in a collection: its items in canonical order, and the bytes behind each.

A `Source` lists (on the driver, streaming); its `Reader` opens items (in tasks on
any node). They meet in `locator`, a short byte string in the listing whose meaning is
the source's own. Nothing here decodes a picture or knows Ray.
"""

from __future__ import annotations

from typing import Any

from llmvis.sources.base import Reader, Source, SourceError, SourceOptions
from llmvis.sources.folder import FolderReader, FolderSource
from llmvis.sources.parquet import ParquetReader, ParquetSource, parquet_files
from llmvis.storage import local_path

EMBEDDED = "emoji"
"""The name under which the packaged collection is asked for."""

__all__ = ["EMBEDDED", "Reader", "Source", "SourceError", "SourceOptions", "open_reader", "open_source"]


def open_source(images: str, options: SourceOptions | None = None) -> Source:
    """The source for `images`: a folder, an imagefolder, Parquet files, or the packaged `emoji`.

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
    if parquet_files(root):
        return ParquetSource(root, options)
    return FolderSource(root, options)


def open_reader(description: dict[str, Any]) -> Reader:
    """The reader for what `Source.describe` once said; raises `SourceError` for an unknown kind."""
    kind = description.get("kind")
    if kind in ("folder", "imagefolder"):
        return FolderReader(str(description["root"]))
    if kind == "parquet":
        return ParquetReader(description)
    raise SourceError(f"this version of llmvis cannot read a collection of kind {kind!r}")
