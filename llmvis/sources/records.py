"""TFRecord files of `tf.train.Example`, as img2dataset writes them: key, picture, caption. No tensorflow.

A record is its length (8 bytes), a checksum of that, the Example, a checksum of that. A listing
checks lengths and seeks over the pictures; a reader checks the whole record before it uses it.
Knows the wire format of protocol buffers as far as an Example's byte strings need it.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO

import google_crc32c

from llmvis.schema import ItemError, Reason
from llmvis.sources.base import CAPTION_HEAD, caption_text
from llmvis.sources.files import Files
from llmvis.sources.tars import PICTURES, Archive, Sample, TarReader

HEAD, FOOT = 12, 4
Span = tuple[int, int]
"""Offset and size in a file."""


def scan_records(files: Files, name: bytes) -> Archive:
    """The samples of the TFRecord file `name`, in its order.

    What is wrong with it becomes samples with a reason. Raises `SourceError` where the store fails.
    """
    archive = Archive(name=name, size=0, mtime_ns=None)
    try:
        size, archive.mtime_ns = files.stat(name)
        archive.size = size or 0
        with files.open(name) as file:
            archive.samples = list(_records(file, archive.size))
    except ItemError as error:
        archive.samples.append(Sample(key="", reason=error.reason, detail=error.detail))
    except OSError as error:
        archive.samples.append(Sample(key="", reason=Reason.UNREADABLE, detail=str(error)))
    return archive


def _records(file: BinaryIO, size: int) -> Iterator[Sample]:
    seen: dict[str, int] = {}
    at = 0
    while at < size:
        file.seek(at)
        head = file.read(HEAD)
        try:
            length = _length(head)
        except ItemError as error:
            yield Sample(
                key="", reason=error.reason, detail=f"byte {at:,}: {error.detail}; the rest is not read"
            )
            return
        if at + HEAD + length + FOOT > size:
            detail = f"the file ends within the record at byte {at:,}"
            yield Sample(key="", reason=Reason.TRUNCATED, detail=detail)
            return
        sample = _sample(file, at + HEAD, length)
        nth = seen[sample.key] = seen.get(sample.key, -1) + 1
        if nth:
            sample.nth = nth
            sample.refuse(Reason.DUPLICATE_KEY, "the file has this key before; the first one is read")
        yield sample
        at += HEAD + length + FOOT


def _length(head: bytes) -> int:
    if len(head) < HEAD:
        raise ItemError(Reason.TRUNCATED, "the file ends within the head of a record")
    length, checksum = struct.unpack("<QI", head)
    if _masked(head[:8]) != checksum:
        raise ItemError(Reason.CORRUPT, "no TFRecord, or a damaged length")
    return int(length)


def _sample(file: BinaryIO, start: int, length: int) -> Sample:
    sample = Sample(key=f"byte {start}", offset=start, size=length + FOOT)
    try:
        spans = _strings(file, start, length)
        sample.key = _read(file, spans["key"]).decode()
        sample.member = next(f"{sample.key}.{name}" for name in spans if name in PICTURES)
        if "txt" in spans:
            offset, size = spans["txt"]
            sample.caption = caption_text(_read(file, (offset, min(size, CAPTION_HEAD))))
    except (KeyError, StopIteration):
        sample.refuse(Reason.MISSING, "the record has no key, or no picture")
    except ValueError as error:
        sample.refuse(Reason.CORRUPT, f"the record is no tf.train.Example: {error}")
    return sample


class RecordReader(TarReader):
    """Opens pictures in TFRecord files below `root`; a locator is as `TarReader`'s, of a record and its checksum."""

    def _picture(self, data: bytes) -> bytes | ItemError:
        record, checksum = data[:-FOOT], data[-FOOT:]
        if struct.pack("<I", _masked(record)) != checksum:
            return ItemError(Reason.CORRUPT, "the record's checksum is wrong")
        file = io.BytesIO(record)
        try:
            spans = _strings(file, 0, len(record))
        except ValueError as error:
            return ItemError(Reason.CORRUPT, f"the record is no tf.train.Example: {error}")
        return next(
            (_read(file, span) for name, span in spans.items() if name in PICTURES),
            ItemError(Reason.EMPTY, "no picture in this record"),
        )


def _masked(data: bytes) -> int:
    crc = int(google_crc32c.value(data))
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _strings(file: BinaryIO, start: int, length: int) -> dict[str, Span]:
    """Where the first byte string of each feature lies. Raises `ValueError` where it is no Example.

    Example { features = 1 { feature = 1 { key = 1, value = 2 { bytes_list = 1 { value = 1 } } } } }
    """
    found: dict[str, Span] = {}
    for features in _spans(file, (start, length), 1):
        for entry in _spans(file, features, 1):
            key = next((_read(file, span).decode() for span in _spans(file, entry, 1)), "")
            for feature in _spans(file, entry, 2):
                for strings in _spans(file, feature, 1):
                    for span in _spans(file, strings, 1):
                        found.setdefault(key, span)
    return found


def _spans(file: BinaryIO, within: Span, wanted: int) -> Iterator[Span]:
    """Where the fields of number `wanted` lie that have a length, in the message at `within`."""
    at, end = within[0], sum(within)
    while at < end:
        file.seek(at)
        tag = _varint(file)
        number, kind = tag >> 3, tag & 7
        if kind == 2:
            size = _varint(file)
            at = file.tell() + size
            if number == wanted and at <= end:
                yield file.tell(), size
        elif kind == 0:
            _varint(file)
            at = file.tell()
        elif kind in (1, 5):
            at = file.tell() + (8 if kind == 1 else 4)
        else:
            raise ValueError(f"a field of kind {kind}")
        if at > end:
            raise ValueError("a field is longer than what it is in")


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise ValueError("it ends within a number")
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    raise ValueError("a number of more than ten bytes")


def _read(file: BinaryIO, span: Span) -> bytes:
    file.seek(span[0])
    return file.read(span[1])
