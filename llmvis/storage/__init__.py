"""Places for files, on a disk or in S3: `open_store` gives the one that a name asks for."""

from __future__ import annotations

import os

from llmvis.schema import ROWS
from llmvis.storage.base import LockedError, NewFile, Owner, StorageError, Store, sha256_bytes, sha256_file
from llmvis.storage.local import LocalStore, local_path

__all__ = [
    "LocalStore",
    "LockedError",
    "NewFile",
    "Owner",
    "StorageError",
    "Store",
    "is_remote",
    "local_path",
    "open_store",
    "rows_of_job",
    "sha256_bytes",
    "sha256_file",
]


def is_remote(uri: str | os.PathLike[str]) -> bool:
    """Whether `uri` is of an object store."""
    return os.fspath(uri).startswith("s3://")


def open_store(uri: str | os.PathLike[str]) -> Store:
    """The store at a local path, `file://…` or `s3://bucket/prefix`; it need not be there yet.

    Raises `StorageError` for any other scheme.
    """
    if is_remote(uri):
        from llmvis.storage.s3 import S3Store  # brings the AWS libraries, which a local job does without

        return S3Store(os.fspath(uri))
    return LocalStore(uri)


def rows_of_job(folder: str | os.PathLike[str]) -> Store:
    """Where a job's `--out` has its rows and their manifest: there, or below it for a data set as an imagefolder."""
    store = open_store(folder)
    below = not store.exists("plan.json") and store.exists(f"{ROWS}/plan.json")
    return store.below(ROWS) if below else store
