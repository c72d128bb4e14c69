"""A folder under two addresses: as it is, and as an object store's; and stores that fail on purpose."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

from llmvis.schema import ItemError, Reason
from llmvis.sources import SourceOptions, open_reader, open_source
from llmvis.storage import s3_client

BUCKET = "s3://bucket"


def as_bucket(
    folder: Path, monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Any], Any] = lambda fs: fs
) -> str:
    """An address under which `folder` is read through Arrow's file systems, as S3 is."""
    tree = wrap(pafs.SubTreeFileSystem(str(folder), pafs.LocalFileSystem()))

    def filesystem(uri: str) -> tuple[Any, str]:
        assert uri.startswith(BUCKET)
        return tree, uri.removeprefix(BUCKET).strip("/")

    monkeypatch.setattr(s3_client, "filesystem", filesystem)
    return BUCKET


class Faulty:
    """A file system whose first `faults` calls fail as a busy store's do; `calls` lists all of them."""

    def __init__(self, inner: Any, faults: int = 0) -> None:
        self.inner, self.faults, self.calls = inner, faults, list[str]()

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            self.calls.append(name)
            if self.faults > 0:
                self.faults -= 1
                raise OSError("AWS Error SLOW_DOWN during GetObject operation")
            return getattr(self.inner, name)(*args)

        return call


def rows(images: str, **options: Any) -> list[dict[str, Any]]:
    source = open_source(images, SourceOptions(**options))
    return [row for chunk in source.listing() for row in chunk.to_pylist()]


def read(images: str, listed: list[dict[str, Any]], **options: Any) -> list[bytes | Reason]:
    """What a reader that has travelled gives for rows that were listed before, dead letters by their reason."""
    reader = pickle.loads(pickle.dumps(open_reader(open_source(images, SourceOptions(**options)).describe())))
    good = [row for row in listed if row["reason"] is None]
    found = reader.read([r["locator"] for r in good], [(r["size"], r["mtime_ns"]) for r in good])
    return [
        Reason(row["reason"])
        if row["reason"]
        else data.reason
        if isinstance(data := next(found), ItemError)
        else data
        for row in listed
    ]
