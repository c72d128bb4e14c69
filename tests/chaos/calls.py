"""The Nth call to the file system fails, for every N: SQLite's way, in one process and without Ray.

Counted are calls on paths below one folder: what Python tells its audit hooks (open, rename, remove, mkdir,
listing, locks), `stat`, `fsync`, writes to `LocalStore.create`, and the files that Arrow opens and writes by
itself. It knows nothing of jobs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq

from llmvis.storage import LocalStore

AUDITED = {
    "open",
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.listdir",
    "os.scandir",
    "fcntl.flock",
}


@dataclass
class Calls:
    """Calls below `root` so far; the `at`-th of them fails, and with `for_ever` all after it."""

    root: Path
    at: int
    number: int = errno.EIO
    for_ever: bool = False
    seen: list[str] = field(default_factory=list)
    fired: int = 0

    def count(self, kind: str, place: Any) -> None:
        with contextlib.suppress(OSError):
            place = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else place
        if not str(place).startswith(str(self.root)):
            return
        self.seen.append(f"{kind} {os.path.relpath(place, self.root)}")
        if len(self.seen) == self.at or (self.for_ever and len(self.seen) > self.at):
            self.fired += 1
            raise OSError(self.number, os.strerror(self.number), str(place))


_active: Calls | None = None


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _active is not None and event in AUDITED:
        _active.count(event, args[0].fileno() if hasattr(args[0], "fileno") else args[0])


sys.addaudithook(_audit)  # Python has no way to take it off again


class _Counted:
    """A file whose writes count."""

    def __init__(self, file: Any, calls: Calls, path: Path) -> None:
        self._file, self._calls, self._path = file, calls, path

    def write(self, data: Any) -> Any:
        self._calls.count("write", self._path)
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def failing(root: Path, at: int, *, for_ever: bool) -> Iterator[Calls]:
    """Inside, the `at`-th call below `root` fails: once with EIO, or from then on with ENOSPC."""
    global _active
    number = errno.ENOSPC if for_ever else errno.EIO
    calls = Calls(root=root, at=at, number=number, for_ever=for_ever)

    def counted(kind: str, function: Callable[..., Any], place: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls.count(kind, place(*args))
            return function(*args, **kwargs)

        return wrapped

    def creating(create: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def wrapped(self: Any, name: str) -> Iterator[Any]:
            with create(self, name) as file:
                yield _Counted(file, calls, self.path(name))

        return wrapped

    with ExitStack() as stack:
        for owner, name, place in (
            (LocalStore, "open", lambda self, name: self.path(name)),
            (os, "stat", lambda path, *more: path),
            (os, "fsync", lambda descriptor: descriptor),
            (pq.ParquetFile, "__init__", lambda self, path, *more: path),
            (pq.ParquetWriter, "__init__", lambda self, path, *more: path),
            (pq.ParquetWriter, "write_table", lambda self, *more: self.where),
            (pa, "memory_map", lambda path, *more: path),
        ):
            patched = counted(name, getattr(owner, name), place)
            stack.enter_context(mock.patch.object(owner, name, patched))
        stack.enter_context(mock.patch.object(LocalStore, "create", creating(LocalStore.create)))
        _active = calls
        try:
            yield calls
        finally:
            _active = None
