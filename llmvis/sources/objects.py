"""The files of an object store, as `Files`: any file system of Arrow, asked anew after faults that pass.

Reads many small objects at a time and keeps their order. Knows no store by name; which faults pass
is known to `storage.retrying`.
"""

from __future__ import annotations

import io
import os
import posixpath
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, TypeVar

import pyarrow.fs as pafs

from llmvis.schema import ItemError, Reason
from llmvis.sources.files import (
    BUFFER,
    UNKNOWN,
    WINDOW,
    Entry,
    SourceError,
    Stat,
    check_size,
    check_unchanged,
    in_order,
    outside,
    whole,
)
from llmvis.storage.s3_client import read_part, retrying

OutT = TypeVar("OutT")


class ArrowFiles:
    """A prefix of an object store (any file system of Arrow). It has no links and no permissions of its own.

    Args:
        filesystem: asked anew after faults that pass (`storage.retrying`).
        path: of the prefix in it.
        uri: the address that messages and plans show.
    """

    threads = WINDOW

    def __init__(self, filesystem: pafs.FileSystem, path: str, uri: str | None = None) -> None:
        self.root = (uri or path).rstrip("/")
        self._fs, self._path = filesystem, path.rstrip("/")
        self._prefix = f"{self._path}/" if self._path else ""
        self._all: list[tuple[bytes, int, int]] | None = None

    def walk(self, skip: Callable[[bytes], bool], under: bytes = b"") -> Iterator[Entry]:
        """As `Files.walk`; some 200 bytes a file, since a store's listing comes in an order of its own."""
        listed = self._listed()
        texts = {name: mtime for name, _, mtime in listed if name.endswith(b".txt")}
        passed: bytes | None = None  # the folder that was passed over: `skip` is asked once of each
        for name, size, mtime_ns in listed[bisect_left(listed, (under, -1, -1)) :]:
            if not name.startswith(under):
                return
            if passed is not None and name.startswith(passed):
                continue
            at = len(under)
            while (end := name.find(b"/", at)) >= 0 and not skip(name[at : end + 1]):
                at = end + 1
            if end >= 0:
                passed = name[: end + 1]
            elif not skip(name[at:]):
                text = texts.get(os.path.splitext(name)[0] + b".txt")
                yield Entry(listed=name, name=name, size=size, mtime_ns=mtime_ns, text_mtime_ns=text)

    def _listed(self) -> list[tuple[bytes, int, int]]:
        """(name, size, mtime) of all objects, sorted; the store is asked once."""
        if self._all is None:
            self._all = self._list()
        return self._all

    def _list(self) -> list[tuple[bytes, int, int]]:
        infos = self._ask(lambda: self._fs.get_file_info(pafs.FileSelector(self._path, recursive=True)), b"")
        return sorted(
            (info.path[len(self._prefix) :].encode(), info.size, info.mtime_ns)
            for info in infos
            if info.type == pafs.FileType.File
        )

    def names(self, folder: bytes = b"") -> list[bytes]:
        selector = pafs.FileSelector(self._at(folder.rstrip(b"/")), allow_not_found=True)
        infos = self._ask(lambda: self._fs.get_file_info(selector), folder)
        return sorted(
            info.base_name.encode() + (b"/" if info.type == pafs.FileType.Directory else b"")
            for info in infos
        )

    def exists(self, name: bytes) -> bool:
        listed = self._listed()
        at = bisect_left(listed, (name, -1, -1))
        return at < len(listed) and listed[at][0] == name

    def place(self, name: str, *, follow: bool = True) -> bytes:
        inner = name.removeprefix(f"{self.root}/")
        path = posixpath.normpath(inner)
        if "://" in inner or "\0" in inner or path.startswith(("/", "../")) or path in (".", ".."):
            raise outside(name, self.root)
        return path.encode("utf-8", "surrogatepass")

    def stat(self, name: bytes) -> Stat:
        info = self._ask(lambda: self._fs.get_file_info(self._at(name)), name)
        if info.type != pafs.FileType.File:
            raise ItemError(Reason.MISSING, "there is no such object")
        return info.size, info.mtime_ns

    def open(self, name: bytes, buffer: int = BUFFER) -> BinaryIO:
        native = self._native(name)
        raw = _Raw(native, lambda call: self._ask(call, name))
        return io.BufferedReader(raw, buffer) if buffer else raw  # type: ignore[return-value]

    def _native(self, name: bytes) -> Any:
        return self._ask(lambda: self._fs.open_input_file(self._at(name)), name)

    def read(
        self, name: bytes, then: Stat = UNKNOWN, *, max_bytes: int | None = None, head: int = -1
    ) -> bytes:
        if then != UNKNOWN or max_bytes is not None:
            now = self.stat(name)
            check_unchanged(then, now)
            check_size(now[0], max_bytes)

        def get() -> bytes:
            with self._fs.open_input_file(self._at(name)) as file:
                return read_part(file, 0, file.size() if head < 0 else head)

        return self._ask(get, name)

    def ranges(
        self, name: bytes, then: Stat, places: Sequence[tuple[int, int]]
    ) -> Iterator[bytes | ItemError]:
        try:
            check_unchanged(then, self.stat(name))
            native = self._native(name)
        except ItemError as error:
            yield from (error for _ in places)
            return

        def one(place: tuple[int, int]) -> bytes | ItemError:
            try:
                return whole(self._ask(lambda: read_part(native, *place), name), place[1])
            except ItemError as error:
                return error

        with native:
            yield from in_order(one, places, self.threads)

    def _at(self, name: bytes) -> str:
        text = name.decode("utf-8", "surrogatepass")
        return f"{self._prefix}{text}" if text else self._path

    def _ask(self, call: Callable[[], OutT], name: bytes) -> OutT:
        """What `call` returns, tried again after faults that pass. See this module's head for what is raised."""
        try:
            return retrying(call, where=self.root)
        except FileNotFoundError as error:
            if not name:
                raise SourceError(f"{self.root} does not exist") from error
            raise ItemError(Reason.MISSING, "there is no such object") from error
        except OSError as error:
            where = f"{self.root}/{name.decode('utf-8', 'backslashreplace')}"
            raise SourceError(
                f"{where} cannot be read: {error}. Once the store answers, run the command again"
            ) from error


class _Raw(io.RawIOBase):
    """An Arrow file as Python's, each read of it asked for anew after faults that pass."""

    def __init__(self, native: Any, ask: Callable[[Callable[[], Any]], Any]) -> None:
        self._native, self._ask, self._at, self._size = native, ask, 0, native.size()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), max(0, self._size - self._at))
        data = self._ask(lambda: read_part(self._native, self._at, size)) if size else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._native.close()
        super().close()
