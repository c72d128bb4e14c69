"""Files in S3 or what speaks like it. Reads go through `pyarrow.fs`; what that cannot say goes through boto3.

An object is visible when its upload is complete and not before, so publishing needs no
rename. `pyarrow.fs` has no conditional write (the lock), publishes what was written when a
writer fails in the middle, and sees no unfinished uploads; for these, and so for all writes, there
is boto3. A name is `s3://bucket/prefix`, and never holds a secret: plans and logs show it.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import botocore.exceptions as boto_errors
import pyarrow as pa
from pyarrow import fs

from llmvis.storage.base import LOCK, LockedError, NewFile, Owner, Store, damaged, gone, plain, sha256_file
from llmvis.storage.s3_client import (
    THREADS,
    CutShortError,
    arrow_filesystem,
    boto_client,
    place,
    read_part,
    retrying,
    service,
)
from llmvis.storage.s3_lock import Lease

T = TypeVar("T")

PART_BYTES = 16 * 2**20
"""Of a multipart upload, and the least for which there is one. S3 allows 10,000 parts: 160 GB a file."""


class S3Store(Store):
    """A prefix in a bucket."""

    scratch = None

    def __init__(self, uri: str, *, patience_s: float | None = None) -> None:
        self.bucket, self._prefix = place(uri)
        self.uri = uri.rstrip("/")
        self._fs, self._s3 = arrow_filesystem(*service()), boto_client(*service())
        self._patience_s = patience_s
        self._lease: Lease | None = None

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{plain(name)}".lstrip("/")

    def _path(self, name: str) -> str:
        return f"{self.bucket}/{self._key(name)}"

    def below(self, folder: str) -> S3Store:
        return S3Store(self.place(folder), patience_s=self._patience_s)

    def attempt(self, work: Callable[[], T]) -> T:
        return retrying(work, patience_s=self._patience_s, where=self.uri)

    def size(self, name: str) -> int | None:
        info = self.attempt(lambda: self._fs.get_file_info(self._path(name)))
        return info.size if info.type == fs.FileType.File else None

    def read(self, name: str) -> bytes:
        return self.attempt(lambda: self._read(name, 0, None))

    def read_range(self, name: str, start: int, length: int) -> bytes:
        return self.attempt(lambda: self._read(name, start, length))

    def _read(self, name: str, start: int, length: int | None) -> bytes:
        with self._fs.open_input_file(self._path(name)) as file:
            return read_part(file, start, file.size() if length is None else length)

    def open(self, name: str) -> AbstractContextManager[pa.NativeFile]:
        file: AbstractContextManager[pa.NativeFile] = self._fs.open_input_file(self._path(name))
        return file

    def read_all(self, names: Sequence[str]) -> list[bytes]:
        if len(names) < 2:
            return super().read_all(names)
        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(self.read, names))

    def fetch(self, name: str, sha256: str) -> Path:
        folder = Path(os.environ.get("LLMVIS_CACHE") or Path.home() / ".cache" / "llmvis")
        path = folder / f"{sha256}{Path(name).suffix}"
        if path.is_file() and sha256_file(path) == sha256:
            return path
        folder.mkdir(parents=True, exist_ok=True)
        size = self.size(name)
        if size is None:
            raise gone(self.place(name))
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".aside-") as aside:
            for start in range(0, size, PART_BYTES):
                aside.write(self.read_range(name, start, PART_BYTES))
            aside.flush()
            if (found := sha256_file(aside.name)) != sha256:
                raise damaged(self.place(name), found, sha256)
            os.link(aside.name, link := folder / f".aside-{uuid.uuid4().hex}")
            link.replace(path)
        return path

    def sizes(self, folder: str) -> dict[str, int]:
        wanted = fs.FileSelector(self._path(folder), allow_not_found=True)
        found = self.attempt(lambda: self._fs.get_file_info(wanted))
        files = {f"{folder}/{info.base_name}": info.size for info in found if info.type == fs.FileType.File}
        return dict(sorted(files.items()))

    def top(self) -> list[str]:
        return sorted(info.base_name for info in self._top())

    def folders(self) -> list[str]:
        return sorted(info.base_name for info in self._top() if info.type == fs.FileType.Directory)

    def is_there(self) -> bool:
        return bool(self._top())

    def _top(self) -> list[fs.FileInfo]:
        wanted = fs.FileSelector(f"{self.bucket}/{self._prefix}".rstrip("/"), allow_not_found=True)
        found: list[fs.FileInfo] = self.attempt(lambda: self._fs.get_file_info(wanted))
        return found

    def write(self, name: str, data: bytes) -> None:
        self._check_lease()
        if len(data) > PART_BYTES:
            with self.create(name) as file:
                file.write(data)
            return
        self.attempt(lambda: self._s3.put_object(Bucket=self.bucket, Key=self._key(name), Body=data))

    @contextmanager
    def create(self, name: str) -> Iterator[NewFile]:
        """Gathered in a local temporary file, so that a part can be sent again."""
        with tempfile.NamedTemporaryFile(prefix="llmvis-") as file:
            yield NewFile(file)
            file.flush()
            self.put(name, Path(file.name))

    def put(self, name: str, path: Path) -> None:
        size = path.stat().st_size
        if size <= PART_BYTES:
            return self.write(name, path.read_bytes())
        self._check_lease()
        key = {"Bucket": self.bucket, "Key": self._key(name)}
        upload = {
            **key,
            "UploadId": self.attempt(lambda: self._s3.create_multipart_upload(**key))["UploadId"],
        }

        def send(number: int) -> dict[str, Any]:
            with path.open("rb") as file:
                file.seek((number - 1) * PART_BYTES)
                data = file.read(PART_BYTES)
            answer = self.attempt(lambda: self._s3.upload_part(**upload, PartNumber=number, Body=data))
            return {"ETag": answer["ETag"], "PartNumber": number}

        try:
            with ThreadPoolExecutor(4) as pool:
                parts = list(pool.map(send, range(1, -(-size // PART_BYTES) + 1)))
            self._complete(name, size, upload, parts)
        except BaseException:
            with suppress(Exception):  # what is left goes with the next `clear_unfinished`
                self._s3.abort_multipart_upload(**upload)
            raise

    def _complete(self, name: str, size: int, upload: dict[str, str], parts: list[dict[str, Any]]) -> None:
        def complete() -> None:
            try:
                self._s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
            except boto_errors.ClientError as error:
                # done before, and only its answer was lost
                if error.response["Error"]["Code"] != "NoSuchUpload" or self.size(name) != size:
                    raise

        self.attempt(complete)

    def delete(self, name: str) -> None:
        self._check_lease()
        prefix = self._key(name)
        keys = [prefix] if self.exists(name) else []
        self._remove(keys + self._keys(f"{prefix}/"))

    def sweep(self, folder: str, keep: set[str]) -> int:
        self._check_lease()
        stale = [name for name in self.sizes(folder) if name not in keep]
        self._remove([self._key(name) for name in stale])
        return len(stale)

    def _keys(self, prefix: str) -> list[str]:
        """All keys below `prefix`."""

        def listed() -> list[str]:
            pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
            return [found["Key"] for page in pages for found in page.get("Contents", [])]

        return self.attempt(listed)

    def _remove(self, keys: Sequence[str]) -> None:
        def remove(some: Sequence[str]) -> None:
            wanted = {"Objects": [{"Key": key} for key in some], "Quiet": True}
            answer = self._s3.delete_objects(Bucket=self.bucket, Delete=wanted)
            if failed := answer.get("Errors"):
                raise CutShortError(f"{len(failed)} of {len(some)} objects were not deleted: {failed[0]}")

        for at in range(0, len(keys), 1000):
            self.attempt(lambda some=keys[at : at + 1000]: remove(some))  # type: ignore[misc]

    def unfinished(self) -> dict[str, int]:
        """Multipart uploads below the prefix: a killed writer's parts are stored, and paid for, until aborted."""

        def held(upload: dict[str, str]) -> int:
            parts = self._s3.list_parts(**upload)
            return sum(part["Size"] for part in parts.get("Parts", []))

        at = len(f"{self._prefix}/".lstrip("/"))
        return {
            upload["Key"][at:]: self.attempt(lambda upload=upload: held(upload))  # type: ignore[misc]
            for upload in self._uploads()
        }

    def _uploads(self) -> list[dict[str, str]]:
        prefix = f"{self._prefix}/".lstrip("/")

        def listed() -> list[dict[str, str]]:
            pages = self._s3.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=prefix
            )
            return [
                {"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                for page in pages
                for upload in page.get("Uploads", [])
            ]

        return self.attempt(listed)

    def clear_unfinished(self) -> None:
        def abort(upload: dict[str, str]) -> None:
            with suppress(FileNotFoundError, self._s3.exceptions.NoSuchUpload):
                self._s3.abort_multipart_upload(**upload)

        for upload in self._uploads():
            self.attempt(lambda upload=upload: abort(upload))  # type: ignore[misc]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """A lock object, made by a conditional write and renewed every `BEAT_S`; it says who holds it.

        After a holder that was killed, another one waits `SILENCE_S` before it takes over; not at all
        where the dead one ran on the same machine. A holder that finds its lock taken (it was cut off
        for longer than that) publishes nothing more.
        """
        lease = self._new_lease()
        lease.acquire()
        self._lease = lease
        try:
            yield
        finally:
            self._lease = None
            lease.release()

    def _new_lease(self) -> Lease:
        return Lease(self._s3, self.bucket, self._key(LOCK), self.uri, self.attempt)

    def owner(self) -> Owner | None:
        return self._new_lease().owner()

    def _check_lease(self) -> None:
        if self._lease is not None and not self._lease.holds():
            raise LockedError(
                f"{self.uri} was taken over by another process while this one was cut off; stopped"
            )
