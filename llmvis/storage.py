"""Files that are either whole or not there: atomic publish, hashes, a lock, bytes from a name.

Everything a job writes goes through `Store`. A reader never sees half a file under
a final name: data is written aside, flushed to the disk, then renamed. This module
knows local disks only (object stores come with `s3://`, see the README's status
table) and nothing of what the files mean.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from llmvis.schema import ROWS, UserError

_ASIDE = ".aside-"


class StorageError(UserError):
    """A place that cannot be used as asked; the message says what to do."""


class LockedError(StorageError):
    """Another process works on the same output."""


def sha256_bytes(data: bytes) -> str:
    """Hex sha256 of `data`."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path | str) -> str:
    """Hex sha256 of a file, read once in chunks."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def local_path(uri: str | os.PathLike[str]) -> Path:
    """Absolute local path of `uri`; a `file://` prefix is taken off.

    Raises `StorageError` for any other scheme.
    """
    text = os.fspath(uri)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise StorageError(
            f"{text!r} is not UTF-8; name the folder through a link with a plain name"
        ) from None
    scheme, mark, rest = text.partition("://")
    if not mark:
        return Path(text).expanduser().absolute()
    if scheme == "file":
        return Path(rest).absolute()
    raise StorageError(f"{text}: {scheme}:// is not supported yet; mount it or copy it to a local folder")


class Store:
    """A folder whose files are published whole.

    `name` is always a relative POSIX path below `root`, such as `data/000000.parquet`.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = local_path(root)

    def path(self, name: str) -> Path:
        """Where `name` lies. Raises `ValueError` for a name that would leave the folder."""
        path = Path(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise ValueError(f"{name!r} is not a plain name below {self.root}")
        return self.root / path

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    def read(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object. Raises `StorageError` where the file holds anything else."""
        try:
            value = json.loads(self.read(name))
        except ValueError as error:
            raise StorageError(
                f"{self.path(name)} is not valid JSON ({error}); it was not written by llmvis"
            ) from error
        if not isinstance(value, dict):
            raise StorageError(f"{self.path(name)} holds no JSON object; it was not written by llmvis")
        return value

    def names(self, folder: str) -> list[str]:
        """Sorted names of the published files directly in `folder`; empty where there is no such folder."""
        path = self.path(folder)
        if not path.is_dir():
            return []
        return sorted(f"{folder}/{p.name}" for p in path.iterdir() if not p.name.startswith(_ASIDE))

    def write(self, name: str, data: bytes) -> None:
        """Publishes `data` under `name`, replacing what was there in one step."""
        with self.create(name) as file:
            file.write(data)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        self.write(name, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """A new file for streaming writes; it appears under `name` only when the block ends well."""
        final = self.path(name)
        final.parent.mkdir(parents=True, exist_ok=True)
        aside = final.parent / f"{_ASIDE}{uuid.uuid4().hex}"
        try:
            with aside.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            aside.replace(final)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        _sync_folder(final.parent)

    def delete(self, name: str) -> None:
        """Removes a file or a folder; no error where it is gone already."""
        path = self.path(name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def sweep(self, folder: str, keep: set[str]) -> int:
        """Deletes what a killed writer left in `folder`: all files whose name is not in `keep`.

        Returns the number of files removed. Call it under `lock`, with no writer at work.
        """
        path = self.path(folder)
        if not path.is_dir():
            return 0
        stale = [p for p in path.iterdir() if f"{folder}/{p.name}" not in keep]
        for item in stale:
            item.unlink(missing_ok=True)
        return len(stale)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other drivers out of this folder for the length of the block.

        An advisory kernel lock: it goes with its process, however that ends, so
        nothing has to be cleaned up by hand. Raises `LockedError` at once if taken.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            file = (self.root / ".lock").open("a+")
        except OSError as error:
            raise StorageError(f"cannot write to {self.root}: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise LockedError(
                    f"{self.root} is in use by {owner}; wait for it, stop it, or choose another --out"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}")
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)


def _sync_folder(path: Path) -> None:
    """Makes a rename durable: the folder's own entry must reach the disk too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def verify(path: Path, sha256: str) -> None:
    """Raises `StorageError` unless the file at `path` has this sha256."""
    if not path.is_file():
        raise StorageError(f"{path} is missing; run the job that made it again, and it is made anew")
    found = sha256_file(path)
    if found != sha256:
        raise StorageError(
            f"{path} is damaged: sha256 {found[:12]}… "
            f"where the manifest says {sha256[:12]}…; delete it and run the job that made it again"
        )


def rows_of_job(folder: Path | str) -> Store:
    """Where a job's `--out` has its rows and their manifest: there, or below it for a data set as an imagefolder."""
    store = Store(folder)
    below = not store.exists("plan.json") and store.exists(f"{ROWS}/plan.json")
    return Store(store.path(ROWS)) if below else store
