"""Files of a collection, on this machine's disks or in an object store, through one door.

A `Files` walks what lies below its root in canonical order and gives bytes by name. Names are
bytes relative to the root, so that a newline or a byte that is not UTF-8 is a name like any
other. Knows nothing of pictures, tables or tars.

What is wrong with one file is an `ItemError`, for a dead letter. A store that does not answer,
or denies access, is a `SourceError` that ends the job: no picture is to blame.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from llmvis.schema import ItemError, Reason, UserError
from llmvis.storage import local_path

Stat = tuple[int | None, int | None]
"""Size in bytes and mtime in nanoseconds; None where it is not known."""
UNKNOWN: Stat = (None, None)

WINDOW = 16
"""Objects that are asked for at a time: their answers take long to begin, and all lie in memory."""
BUFFER = 4 << 20
"""Bytes that a file of an object store is read ahead by."""

InT = TypeVar("InT")
OutT = TypeVar("OutT")


class SourceError(UserError):
    """A collection that cannot be read as a whole; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file that a walk found. `reason`: it cannot be an item, as `detail` says."""

    listed: bytes  # where it was found
    name: bytes  # where its bytes lie: for a link inside the collection, what it points to
    size: int | None = None
    mtime_ns: int | None = None
    text_mtime_ns: int | None = None  # of the file beside it with the ending .txt, where there is one
    reason: Reason | None = None
    detail: str = ""


class Files(Protocol):
    """A tree of files that is only read."""

    root: str
    """Its address, as `open_files` takes it."""
    threads: int
    """How many of its files are worth asking for at a time."""

    def walk(self, skip: Callable[[bytes], bool], under: bytes = b"") -> Iterator[Entry]:
        """All files, depth first in byte order; none whose last name, or that of a folder (with a `/` at its
        end), `skip` is true for. `under` is empty or a folder with a `/` at its end."""
        ...

    def names(self, folder: bytes = b"") -> list[bytes]:
        """Sorted names directly in `folder`, those of folders with a `/` at their end; none where it is no folder."""
        ...

    def exists(self, name: bytes) -> bool:
        """Whether there is such a file; an object store is not asked again once it was walked."""
        ...

    def place(self, name: str, *, follow: bool = True) -> bytes:
        """`name`, as a table has it, relative to the root. Raises `ItemError` if it lies outside, with
        `follow` also if a link leads there."""
        ...

    def stat(self, name: bytes) -> Stat:
        """Raises `ItemError` where there is no such file."""
        ...

    def open(self, name: bytes, buffer: int = BUFFER) -> BinaryIO:
        """A table or an archive, to seek in. Raises `ItemError` where there is none.

        Links are followed: whoever laid a table there chose it. For pictures there is `read`.
        """
        ...

    def read(
        self, name: bytes, then: Stat = UNKNOWN, *, max_bytes: int | None = None, head: int = -1
    ) -> bytes:
        """The bytes of a file (the first `head` of them), or an `ItemError` that says why not.

        Never follows a link, never blocks on a pipe, never reads a file of more than `max_bytes`.
        """
        ...

    def ranges(
        self, name: bytes, then: Stat, places: Sequence[tuple[int, int]]
    ) -> Iterator[bytes | ItemError]:
        """Bytes of an archive at each (offset, size), in order."""
        ...


def open_files(uri: str) -> Files:
    """The files below `uri`: a local folder, or `s3://bucket/prefix`. Asks for nothing yet."""
    if uri.startswith("s3://"):
        from llmvis.sources.objects import ArrowFiles
        from llmvis.storage.s3_client import filesystem

        arrow, path = filesystem(uri)
        return ArrowFiles(arrow, path, uri)
    return LocalFiles(str(local_path(uri)))


def in_order(
    call: Callable[[InT], OutT], items: Iterable[InT], threads: int, window: int = WINDOW
) -> Iterator[OutT]:
    """`call` of each item, in order, by `threads` at a time; at most `window` results wait to be taken."""
    if threads == 1:
        yield from map(call, items)
        return
    pool, pending = ThreadPoolExecutor(threads), deque[Future[OutT]]()
    try:
        for item in items:
            pending.append(pool.submit(call, item))
            if len(pending) >= window:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def read_each(
    files: Files, names: Sequence[bytes], stats: Sequence[Stat] | None, max_bytes: int | None
) -> Iterator[bytes | ItemError]:
    """The bytes behind each name, or why there are none, in order."""

    def one(index: int) -> bytes | ItemError:
        try:
            return files.read(names[index], stats[index] if stats else UNKNOWN, max_bytes=max_bytes)
        except ItemError as error:
            return error

    return in_order(one, range(len(names)), files.threads)


def check_unchanged(then: Stat, now: Stat) -> None:
    """Raises `ItemError` where a file differs from what the plan saw."""
    if any(a is not None and a != b for a, b in zip(then, now, strict=True)):
        raise ItemError(Reason.CHANGED, f"was {then[0]} bytes when the job was planned, is {now[0]}")


def check_size(size: int | None, max_bytes: int | None) -> None:
    if max_bytes is not None and size is not None and size > max_bytes:
        raise ItemError(Reason.TOO_LARGE, f"{size} bytes, the cap is {max_bytes}")


class LocalFiles:
    """A folder of this machine, or one that is mounted."""

    threads = 1

    def __init__(self, root: str) -> None:
        self.root = root
        self._root = os.fsencode(root)

    def walk(self, skip: Callable[[bytes], bool], under: bytes = b"") -> Iterator[Entry]:
        real_root = os.path.realpath(self._root)
        pending = [under]
        while pending:
            name = pending.pop()
            path = os.path.join(self._root, name) if name else self._root
            if name and not name.endswith(b"/"):
                yield _local_entry(path, name, real_root)
                continue
            try:
                with os.scandir(path) as entries:
                    found = [e.name + (b"/" if e.is_dir(follow_symlinks=False) else b"") for e in entries]
            except OSError as error:
                if not name:
                    raise SourceError(f"{os.fsdecode(path)} cannot be read: {error.strerror}") from error
                yield _bad(name, Reason.UNREADABLE, f"folder: {error.strerror}")
                continue
            pending += [name + child for child in sorted(found, reverse=True) if not skip(child)]

    def names(self, folder: bytes = b"") -> list[bytes]:
        try:
            with os.scandir(os.path.join(self._root, folder)) as entries:
                return sorted(e.name + (b"/" if os.path.isdir(e.path) else b"") for e in entries)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise SourceError(f"{self.root} cannot be read: {error.strerror}") from error

    def exists(self, name: bytes) -> bool:
        return os.path.isfile(os.path.join(self._root, name))

    def place(self, name: str, *, follow: bool = True) -> bytes:
        if "\0" in name:
            raise ItemError(Reason.UNSAFE_PATH, "a name with a NUL")
        root = os.path.normpath(self.root)
        path = os.path.normpath(os.path.join(root, name))
        ends = [(root, path)] + ([(os.path.realpath(root), os.path.realpath(path))] if follow else [])
        for above, at in ends:
            if at != above and not at.startswith(os.path.join(above, "")):
                raise outside(name, self.root)
        return os.fsencode(os.path.relpath(path, root))

    def stat(self, name: bytes) -> Stat:
        try:
            found = os.stat(os.path.join(self._root, name))
        except OSError as error:
            raise _item_error(error) from error
        return found.st_size, found.st_mtime_ns

    def open(self, name: bytes, buffer: int = BUFFER) -> BinaryIO:
        return _open(os.path.join(self._root, name), 0)

    def read(
        self, name: bytes, then: Stat = UNKNOWN, *, max_bytes: int | None = None, head: int = -1
    ) -> bytes:
        return read_file(os.path.join(self._root, name), then, max_bytes=max_bytes, head=head)

    def ranges(
        self, name: bytes, then: Stat, places: Sequence[tuple[int, int]]
    ) -> Iterator[bytes | ItemError]:
        try:
            with self.open(name) as file:
                found = os.fstat(file.fileno())
                check_unchanged(then, (found.st_size, found.st_mtime_ns))
                for offset, size in places:
                    yield self._range(file, offset, size)
        except ItemError as error:  # of the archive as a whole, before the first range
            yield from (error for _ in places)

    @staticmethod
    def _range(file: BinaryIO, offset: int, size: int) -> bytes | ItemError:
        try:
            return whole(os.pread(file.fileno(), size, offset), size)
        except OSError as error:
            return ItemError(Reason.UNREADABLE, error.strerror or str(error))
        except ItemError as error:
            return error


def read_file(
    path: bytes | Path, then: Stat = UNKNOWN, *, max_bytes: int | None = None, head: int = -1
) -> bytes:
    """The bytes of a regular file of this machine, as `Files.read`."""
    with _open(path, os.O_NOFOLLOW) as file:
        found = os.fstat(file.fileno())
        check_unchanged(then, (found.st_size, found.st_mtime_ns))
        check_size(found.st_size, max_bytes)
        try:
            return file.read(head)
        except OSError as error:
            raise ItemError(Reason.UNREADABLE, error.strerror or str(error)) from error


def _open(path: bytes | Path, flags: int) -> BinaryIO:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    except OSError as error:
        raise _item_error(error) from error
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise ItemError(Reason.UNREADABLE, "not a regular file")


def whole(data: bytes, size: int) -> bytes:
    if len(data) < size:
        raise ItemError(
            Reason.TRUNCATED, f"the archive ends {size - len(data)} bytes before the picture does"
        )
    return data


def outside(name: str, root: str) -> ItemError:
    return ItemError(Reason.UNSAFE_PATH, f"{name!r} lies outside {root}; name its folder with --image-root")


def _item_error(error: OSError) -> ItemError:
    known = {errno.ENOENT: Reason.MISSING, errno.ENOTDIR: Reason.MISSING, errno.ELOOP: Reason.LINK}
    return ItemError(known.get(error.errno or 0, Reason.UNREADABLE), error.strerror or str(error))


def _bad(name: bytes, reason: Reason, detail: str) -> Entry:
    return Entry(listed=name, name=name, reason=reason, detail=detail)


def _local_entry(path: bytes, listed: bytes, real_root: bytes) -> Entry:
    """What there is to say of one directory entry that is no directory.

    A link inside the collection is the item that it points to, with its own caption.
    """
    name, target = listed, path
    try:
        if os.path.islink(path):
            target = os.path.realpath(path, strict=True)
            if not target.startswith(os.path.join(real_root, b"")):
                return _bad(name, Reason.LINK, "points out of the collection; copy the file in")
            if os.path.isdir(target):
                return _bad(name, Reason.LINK, "points to a folder; links to folders are not followed")
            name = os.path.relpath(target, real_root)
        found = os.stat(target, follow_symlinks=False)
    except OSError as error:
        return _bad(name, Reason.LINK if os.path.islink(path) else Reason.UNREADABLE, error.strerror or "")
    try:
        text = os.stat(os.path.splitext(path)[0] + b".txt", follow_symlinks=False).st_mtime_ns
    except OSError:
        text = None
    return Entry(listed=listed, name=name, size=found.st_size, mtime_ns=found.st_mtime_ns, text_mtime_ns=text)
