"""What every place for files has in common: names below a root, whole files, hashes, errors.

Everything a job writes goes through a `Store`. A reader never sees half a file under a
final name. This module knows no disk and no network, and nothing of what the files mean.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

import pyarrow as pa

from llmvis.schema import UserError

T = TypeVar("T")

LOCK = ".lock"
HASH_BYTES = 16 * 2**20


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


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who holds a lock, since when by its own clock (seconds of the epoch)."""

    host: str
    pid: int
    since: float

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class NewFile:
    """A file while it is written: passes bytes on, and knows their number and sha256.

    It has what `pyarrow` and `shutil` ask of a file that is written from its beginning to its end.
    """

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self._file.write(data)
        self._hash.update(data)
        count = memoryview(data).nbytes
        self.bytes += count
        return count

    def writelines(self, lines: Iterable[bytes]) -> None:
        for line in lines:
            self.write(line)

    def tell(self) -> int:
        return self.bytes

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Nothing: who made it closes it."""

    def readable(self) -> bool:
        return False

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()


class Store(ABC):
    """A folder whose files are published whole.

    `name` is always a relative POSIX path below the root, such as `data/000000.parquet`;
    `ValueError` is raised for one that would leave it. `FileNotFoundError` is raised by
    whatever reads a file that is not there. Made by `open_store`.
    """

    uri: str
    """The root, as people write it."""

    def place(self, name: str) -> str:
        """Where `name` lies, for people."""
        return f"{self.uri}/{plain(name)}"

    @abstractmethod
    def below(self, folder: str) -> Store:
        """The store of a folder in this one."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of a published file; None where there is none."""

    def exists(self, name: str) -> bool:
        return self.size(name) is not None

    @abstractmethod
    def read(self, name: str) -> bytes: ...

    @abstractmethod
    def read_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer where the file ends."""

    @abstractmethod
    def open(self, name: str) -> AbstractContextManager[pa.NativeFile]:
        """A seekable file to read from; wrap what is done with it in `attempt`."""

    @abstractmethod
    def fetch(self, name: str, sha256: str) -> Path:
        """A local file with the bytes of `name`, checked against `sha256`; for memory maps.

        Raises `StorageError` where the file is gone or differs.
        """

    def attempt(self, work: Callable[[], T]) -> T:
        """`work()`, again where the storage fails in a way that passes."""
        return work()

    def read_all(self, names: Sequence[str]) -> list[bytes]:
        """The files of these names, in order; a store that is far away fetches several at a time."""
        return [self.read(name) for name in names]

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object. Raises `StorageError` where the file holds anything else."""
        return self.parse_object(name, self.read(name))

    def read_all_json(self, names: Sequence[str]) -> list[dict[str, Any]]:
        return [self.parse_object(*pair) for pair in zip(names, self.read_all(names), strict=True)]

    def parse_object(self, name: str, data: bytes) -> dict[str, Any]:
        """The JSON object that `data` of file `name` is. Raises `StorageError` where it is none."""
        try:
            value = json.loads(data)
        except ValueError as error:
            raise StorageError(
                f"{self.place(name)} is not valid JSON ({error}); it was not written by llmvis"
            ) from error
        if not isinstance(value, dict):
            raise StorageError(f"{self.place(name)} holds no JSON object; it was not written by llmvis")
        return value

    @abstractmethod
    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of each published file directly in `folder`, by name in sorted order; empty where there is none."""

    def names(self, folder: str) -> list[str]:
        """Sorted names of the published files directly in `folder`."""
        return list(self.sizes(folder))

    @abstractmethod
    def top(self) -> list[str]:
        """Sorted names of the files and folders directly below the root, ours aside left out."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Sorted names of the folders directly below the root."""

    @abstractmethod
    def is_there(self) -> bool:
        """Whether the root is there, be it empty."""

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Publishes `data` under `name`, replacing what was there in one step."""

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        self.write(name, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())

    @abstractmethod
    def create(self, name: str) -> AbstractContextManager[NewFile]:
        """A new file for streaming writes; it appears under `name` only when the block ends well."""

    @abstractmethod
    def put(self, name: str, path: Path) -> None:
        """Publishes the local file `path`, which is gone afterwards or about to go."""

    @contextmanager
    def written(self, name: str) -> Iterator[Path]:
        """A local path to write a file at; it is published as `name` when the block ends well."""
        with tempfile.TemporaryDirectory(prefix=".aside-", dir=self.scratch) as folder:
            path = Path(folder) / PurePosixPath(name).name
            yield path
            self.put(name, path)

    @property
    @abstractmethod
    def scratch(self) -> Path | None:
        """A local folder from which `put` need not copy; None: any will do."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Removes a file or a folder; no error where it is gone already."""

    @abstractmethod
    def sweep(self, folder: str, keep: set[str]) -> int:
        """Deletes what a killed writer left in `folder`: all files whose name is not in `keep`.

        Returns the number of files removed. Call it under `lock`, with no writer at work.
        """

    @abstractmethod
    def unfinished(self) -> dict[str, int]:
        """What killed writers began and never published, by name and bytes; also what is being written now."""

    @abstractmethod
    def clear_unfinished(self) -> None:
        """Removes what `unfinished` lists. Under `lock` only."""

    @abstractmethod
    def lock(self) -> AbstractContextManager[None]:
        """Keeps other drivers out of this folder for the length of the block.

        Raises `LockedError` where another one holds it, and `StorageError` where the place cannot be written.
        """

    @abstractmethod
    def owner(self) -> Owner | None:
        """Who holds the lock; None where nobody does, or a process of this machine that is gone. Only looks."""

    def sha256(self, name: str) -> str:
        """Hex sha256 of a file, which is not held whole."""
        found, start = hashlib.sha256(), 0
        while data := self.read_range(name, start, HASH_BYTES):
            found.update(data)
            start += len(data)
        return found.hexdigest()

    def check(self, name: str, sha256: str, data: bytes) -> bytes:
        """`data` of file `name`. Raises `StorageError` unless it has this sha256."""
        if (found := sha256_bytes(data)) != sha256:
            raise damaged(self.place(name), found, sha256)
        return data

    def read_checked(self, name: str, sha256: str) -> bytes:
        """The file's bytes. Raises `StorageError` where it is gone or differs."""
        try:
            return self.check(name, sha256, self.read(name))
        except FileNotFoundError:
            raise gone(self.place(name)) from None


def plain(name: str) -> str:
    """`name`, if it stays below its root. Raises `ValueError` if not."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"{name!r} is not a plain name below its folder")
    return name


def gone(place: str) -> StorageError:
    return StorageError(f"{place} is missing; run the job that made it again, and it is made anew")


def damaged(place: str, found: str, wanted: str) -> StorageError:
    return StorageError(
        f"{place} is damaged: sha256 {found[:12]}… "
        f"where the manifest says {wanted[:12]}…; delete it and run the job that made it again"
    )
