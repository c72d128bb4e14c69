"""Files on a disk, or on what is mounted like one: written aside, flushed, renamed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import psutil
import pyarrow as pa

from llmvis.storage.base import (
    LOCK,
    LockedError,
    NewFile,
    Owner,
    StorageError,
    Store,
    damaged,
    gone,
    plain,
    sha256_file,
)

_ASIDE = ".aside-"


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
    if scheme == "s3":
        raise StorageError(f"{text}: this must be a local folder; copy it here first")
    raise StorageError(f"{text}: {scheme}:// is not supported; there are local folders and s3://")


class LocalStore(Store):
    """A folder on a disk. `root` and `path` are of this kind of store alone."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = local_path(root)
        self.uri = str(self.root)

    def path(self, name: str) -> Path:
        return self.root / plain(name)

    def below(self, folder: str) -> LocalStore:
        return LocalStore(self.path(folder))

    def exists(self, name: str) -> bool:
        return self.path(name).exists()

    def size(self, name: str) -> int | None:
        try:
            return self.path(name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def read_range(self, name: str, start: int, length: int) -> bytes:
        with self.path(name).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def open(self, name: str) -> AbstractContextManager[pa.NativeFile]:
        file: AbstractContextManager[pa.NativeFile] = pa.OSFile(str(self.path(name)), "rb")
        return file

    def fetch(self, name: str, sha256: str) -> Path:
        path = self.path(name)
        if not path.is_file():
            raise gone(str(path))
        if (found := sha256_file(path)) != sha256:
            raise damaged(str(path), found, sha256)
        return path

    def sizes(self, folder: str) -> dict[str, int]:
        path = self.path(folder)
        if not path.is_dir():
            return {}
        found = sorted(p for p in path.iterdir() if not p.name.startswith(_ASIDE))
        return {f"{folder}/{p.name}": p.stat().st_size for p in found}

    def top(self) -> list[str]:
        if not self.root.is_dir():
            return []
        return sorted(p.name for p in self.root.iterdir() if not p.name.startswith(_ASIDE))

    def folders(self) -> list[str]:
        return [
            name for name in self.top() if (self.root / name).is_dir() and not (self.root / name).is_symlink()
        ]

    def is_there(self) -> bool:
        return self.root.exists()

    def write(self, name: str, data: bytes) -> None:
        with self.create(name) as file:
            file.write(data)

    @contextmanager
    def create(self, name: str) -> Iterator[NewFile]:
        final = self.path(name)
        aside = final.parent / f"{_ASIDE}{uuid.uuid4().hex}"
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("xb") as file:
                yield NewFile(file)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(final)
        except BaseException as error:
            aside.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageError(
                    f"{self.root}: {error.strerror}; make room and run the job again, it goes on"
                ) from error
            raise
        _sync_folder(final.parent)

    def put(self, name: str, path: Path) -> None:
        final = self.path(name)
        with path.open("rb") as file:
            if path.stat().st_dev != self.root.stat().st_dev:
                with self.create(name) as new:
                    shutil.copyfileobj(file, new)
                return
            os.fsync(file.fileno())
        final.parent.mkdir(parents=True, exist_ok=True)
        path.replace(final)
        _sync_folder(final.parent)

    @property
    def scratch(self) -> Path | None:
        self.root.mkdir(parents=True, exist_ok=True)
        return self.root

    def delete(self, name: str) -> None:
        path = self.path(name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def sweep(self, folder: str, keep: set[str]) -> int:
        path = self.path(folder)
        if not path.is_dir():
            return 0
        stale = [p for p in path.iterdir() if f"{folder}/{p.name}" not in keep]
        for item in stale:
            item.unlink(missing_ok=True)
        return len(stale)

    def unfinished(self) -> dict[str, int]:
        found = {}
        for path in sorted([*self.root.glob(f"{_ASIDE}*"), *self.root.glob(f"*/{_ASIDE}*")]):
            files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
            found[path.relative_to(self.root).as_posix()] = sum(p.lstat().st_size for p in files)
        return found

    def clear_unfinished(self) -> None:
        for name in self.unfinished():
            self.delete(name)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """An advisory kernel lock: it goes with its process, however that ends."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            file = (self.root / LOCK).open("a+b", buffering=0)
        except OSError as error:
            raise StorageError(f"cannot write to {self.root}: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = _owner(self.root / LOCK) or "another process"
                raise LockedError(
                    f"{self.root} is in use by {owner}; wait for it, stop it, or choose another --out"
                ) from None
            file.truncate(0)
            with suppress(OSError):  # a full disk: the lock is held, only nobody learns by whom
                me = {"host": os.uname().nodename, "pid": os.getpid(), "since": time.time()}
                file.write(json.dumps(me).encode())
            try:
                yield
            finally:
                file.truncate(0)

    def owner(self) -> Owner | None:
        found = _owner(self.root / LOCK)
        here = found is not None and found.host == os.uname().nodename
        return None if found is None or (here and not psutil.pid_exists(found.pid)) else found


def _owner(lock: Path) -> Owner | None:
    """What a lock's file says, which is empty while nobody holds it."""
    try:
        return Owner(**json.loads(lock.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _sync_folder(path: Path) -> None:
    """Makes a rename durable: the folder's own entry must reach the disk too."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
