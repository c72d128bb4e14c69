"""Webdataset tars, read in place: members with one key are one sample. Nothing is ever extracted.

A listing reads headers, captions and `.json`s and seeks over the pictures; a locator is
`tar:offset:size:size of the tar`, so reading a picture is reading a range. The key of a member is its
name up to the first dot of the last part. A name is never used as a path: one that would lead
somewhere, a link, a device is a dead letter. Knows nothing of what made the tars.
"""

from __future__ import annotations

import json
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any, BinaryIO

import pyarrow as pa

from llmvis.schema import ItemError, Reason, item_id, printable
from llmvis.sources.base import (
    CAPTION_HEAD,
    SourceError,
    SourceOptions,
    caption_text,
    carried,
    chunks,
    listing_table,
    pick_caption,
    shown,
)
from llmvis.sources.files import Files, Stat, in_order, open_files

PICTURES = frozenset(["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm"])
CAPTIONS = ("txt", "caption")
MAX_JSON = 1 << 20
"""Bytes of a `.json` that are read; a longer one counts as not valid."""


@dataclass(kw_only=True)
class Sample:
    """One key of one archive: where its picture lies and what is said of it.

    `reason`: there is no picture to read, as `detail` says.
    """

    key: str
    nth: int = 0  # how often the archive had the key before
    member: str = ""  # the picture's name in the archive
    offset: int = 0
    size: int = 0
    caption: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    endings: set[str] = field(default_factory=set)
    reason: Reason | None = None
    detail: str = ""

    def refuse(self, reason: Reason, detail: str) -> None:
        """The first reason counts."""
        if self.reason is None:
            self.reason, self.detail = reason, detail


@dataclass(kw_only=True)
class Archive:
    """What one archive holds. `notes` counts what was passed over, in words."""

    name: bytes
    size: int
    mtime_ns: int | None
    samples: list[Sample] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def locator(self, sample: Sample) -> bytes:
        return self.name + b":%d:%d:%d" % (sample.offset, sample.size, self.size)


def scan(files: Files, name: bytes, *, columns: bool = True) -> Archive:
    """The samples of the tar `name`, in the order of their first member; with `columns`, also their `.json`s.

    What is wrong with the tar becomes samples with a reason. Raises `SourceError` where the store fails.
    """
    archive = Archive(name=name, size=0, mtime_ns=None)
    try:
        size, archive.mtime_ns = files.stat(name)
        archive.size = size or 0
        with files.open(name) as file:
            _scan(archive, file, columns)
    except ItemError as error:
        archive.samples.append(Sample(key="", reason=error.reason, detail=error.detail))
    except OSError as error:
        archive.samples.append(Sample(key="", reason=Reason.UNREADABLE, detail=str(error)))
    return archive


def _scan(archive: Archive, file: BinaryIO, columns: bool) -> None:
    samples: dict[str, Sample] = {}
    again: dict[str, Sample] = {}  # the open repetition of a key that occurs more than once
    if archive.size == 0:
        raise ItemError(Reason.EMPTY, "a tar of no bytes")
    end, at = None, -1
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if tar.offset <= at or member.size < 0:
                    raise tarfile.ReadError("a header points backwards")
                end, at = member, tar.offset
                _take(archive, samples, again, file, member, columns)
    except (SourceError, ItemError):
        raise
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        whole = end is None
        detail = f"no tar: {error}" if whole else f"the tar is cut off or damaged after {_show(end)}: {error}"
        broken = Sample(key="", reason=Reason.CORRUPT if whole else Reason.TRUNCATED, detail=detail)
        archive.samples = [*samples.values(), broken]
    else:
        archive.samples = list(samples.values())
        _check_end(archive, file, max(at, 0))
    for sample in archive.samples:
        if sample.reason is None and not sample.member:
            has = ", ".join(sorted(sample.endings))
            sample.refuse(Reason.MISSING, f"the sample has no picture; it has: {has}")


def _take(
    archive: Archive, samples: dict[str, Sample], again: dict[str, Sample], file: BinaryIO,
    member: tarfile.TarInfo, columns: bool,
) -> None:  # fmt: skip
    """Adds one member to the sample that it belongs to."""
    folder, last = posixpath.split(member.name)
    stem, dot, ending = last.partition(".")
    if member.isdir():
        return
    if not stem or not dot:
        archive.notes["members without a key and an ending passed over"] += 1
        return
    key = posixpath.join(folder, stem)
    sample = again.get(key) or samples.setdefault(key, Sample(key=key))
    ending = ending.lower()
    if ending in sample.endings:
        sample = again[key] = Sample(key=key, nth=sample.nth + 1)
        samples[f"{key}\0{sample.nth}"] = sample
        sample.refuse(Reason.DUPLICATE_KEY, f"the tar has {_show(member)} before; the first one is read")
    sample.endings.add(ending)
    parts = member.name.split("/")
    if ".." in parts or member.name.startswith("/") or "\0" in member.name:
        sample.refuse(Reason.UNSAFE_PATH, f"a name that leads out of the tar: {_show(member)}")
    elif not member.isreg() or member.issparse():
        kind = "sparse" if member.issparse() else f"a link to {printable(member.linkname)}"
        kind = kind if member.issparse() or member.islnk() or member.issym() else "no regular file"
        sample.refuse(Reason.UNSAFE_PATH, f"{_show(member)} is {kind}")
    elif member.offset_data + member.size > archive.size:
        sample.refuse(Reason.TRUNCATED, f"the tar ends within {_show(member)}")
    elif sample.reason is None:
        _use(archive, sample, file, member, ending, columns)


def _use(
    archive: Archive, sample: Sample, file: BinaryIO, member: tarfile.TarInfo, ending: str, columns: bool
) -> None:
    """Takes in a sound member: the picture's place, the caption, or columns."""
    if ending.rpartition(".")[2] in PICTURES:
        plain = "." not in ending
        if sample.member and not (plain and "." in _ending(sample.member)):
            archive.notes["further pictures of a sample passed over"] += 1
            return
        sample.member, sample.offset, sample.size = member.name, member.offset_data, member.size
    elif ending in CAPTIONS:
        if sample.caption is None or ending == CAPTIONS[0]:
            sample.caption = caption_text(_body(file, member, CAPTION_HEAD))
    elif ending == "json" and columns:
        data = _body(file, member, MAX_JSON)
        try:
            value = json.loads(data if member.size <= MAX_JSON else b"")
            named = value if isinstance(value, dict) else {"json": value}
            sample.columns = {_text(name) or "json": each for name, each in named.items()}
        except (ValueError, RecursionError):
            archive.notes["samples whose .json is not valid have no columns"] += 1


def _body(file: BinaryIO, member: tarfile.TarInfo, most: int) -> bytes:
    file.seek(member.offset_data)
    return file.read(min(member.size, most))


def _check_end(archive: Archive, file: BinaryIO, at: int) -> None:
    """Whether a tar ends as tars do: `tarfile` takes anything that is no header for its end."""
    file.seek(at)
    block = file.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        detail = f"what follows byte {at:,} is no tar, and is not read"
        archive.samples.append(Sample(key="", reason=Reason.CORRUPT, detail=detail))
    elif not block:
        archive.notes["tars without an end mark, so perhaps cut off between two samples"] += 1


def _ending(name: str) -> str:
    return posixpath.basename(name).partition(".")[2]


def _show(member: tarfile.TarInfo | None) -> str:
    return printable(member.name if member else "")[:200]


class TarSource:
    """Tars in a folder, or one of them, each key a row; ids are of the tar's name and the key.

    Columns come from the samples' `.json`s: which there are and of which type is learned from the first
    tar. Lists and objects, and what is of several types there, go along as JSON text. A later value
    that does not fit its column is null, and counted in a note.
    """

    def __init__(self, files: Files, names: Sequence[bytes], options: SourceOptions) -> None:
        if options.image_column or options.id_column or options.image_root:
            raise SourceError("--image-column, --id-column and --image-root are for Parquet, not for tars")
        self._files, self._names = files, list(names)
        self._notes: Counter[str] = Counter()
        where = f"{files.root}/{shown(self._names[0])}"
        self._first = scan(files, self._names[0])
        fields = _inferred(self._first.samples)
        self._asked = options.caption_column is not None
        self._caption = pick_caption(fields, options.caption_column, where)
        self._fields = [f for f in fields if f.name != self._caption]
        self.user_columns = carried(self._fields, where)

    def describe(self) -> dict[str, Any]:
        root = self._files.root
        return {"kind": "webdataset", "root": root, "shown_root": root, "caption_column": self._caption}

    def notes(self) -> list[str]:
        return [f"{count} {what}" for what, count in sorted(self._notes.items())]

    def listing(self) -> Iterator[pa.Table]:
        """Samples in the order of tars and members; an object store is asked for several tars at a time."""
        self._notes.clear()
        rest = in_order(lambda n: scan(self._files, n), self._names[1:], self._files.threads, window=4)
        for archive in chain([self._first], rest):
            self._notes += archive.notes
            for samples in chunks(archive.samples):
                columns = sample_columns(archive, samples)
                if self._caption:
                    told = [s.columns.get(self._caption) for s in samples]
                    pairs = [columns["caption"], list(map(_text, told))]
                    first, second = reversed(pairs) if self._asked else pairs
                    columns["caption"] = [b if a is None else a for a, b in zip(first, second, strict=True)]
                user = [self._column(f, samples) for f in self._fields]
                yield listing_table(columns, pa.Table.from_arrays(user, schema=pa.schema(self.user_columns)))

    def _column(self, column: pa.Field, samples: list[Sample]) -> pa.Array:
        values = [_fitting(s.columns.get(column.name), column.type) for s in samples]
        for sample, value in zip(samples, values, strict=True):
            if value is None and sample.columns.get(column.name) is not None:
                self._notes[f"values of {column.name!r} that are no {column.type}: null there"] += 1
        return pa.array(values, column.type)


class TarReader:
    """Opens ranges of archives below `root`; a locator is `archive:offset:size:size of the archive`."""

    def __init__(self, root: str) -> None:
        self.root = root

    def read(
        self,
        locators: Sequence[bytes],
        stats: Sequence[Stat] | None = None,
        max_bytes: int | None = None,
    ) -> Iterator[bytes | ItemError]:
        files = open_files(self.root)
        places = [_place(locator) for locator in locators]
        mtimes = [mtime for _, mtime in stats] if stats else [None] * len(places)
        together = zip(places, mtimes, strict=True)
        for (name, whole, mtime), group in groupby(together, lambda p: (p[0][0], p[0][3], p[1])):
            wanted = [(offset, size) for (_, offset, size, _), _ in group]
            fit = [max_bytes is None or size <= max_bytes for _, size in wanted]
            found = files.ranges(name, (whole, mtime), [w for w, f in zip(wanted, fit, strict=True) if f])
            for (_, size), fits in zip(wanted, fit, strict=True):
                data = (
                    next(found)
                    if fits
                    else ItemError(Reason.TOO_LARGE, f"{size} bytes, the cap is {max_bytes}")
                )
                yield data if isinstance(data, ItemError) else self._picture(data)

    def read_captions(self, locators: Sequence[bytes | None]) -> Iterator[str | None]:
        return (None for _ in locators)  # captions are in the listing

    def _picture(self, data: bytes) -> bytes | ItemError:
        return data


def sample_columns(archive: Archive, samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Columns of a listing for samples of one archive. Sizes are pictures', times the archive's."""
    tar = shown(archive.name)
    return {
        "id": [item_id(archive.name + b"#" + _id_key(s)) for s in samples],
        "path": [f"{tar}#{_readable(s)}" if s.key else tar for s in samples],
        "locator": [archive.locator(s) for s in samples],
        "size": [None if s.reason else s.size for s in samples],
        "mtime_ns": [None if s.reason else archive.mtime_ns for s in samples],
        "caption": [s.caption for s in samples],
        "reason": [s.reason and str(s.reason) for s in samples],
        "detail": [s.detail if s.reason else None for s in samples],
    }


def _id_key(sample: Sample) -> bytes:
    again = f"\0{sample.nth}" if sample.nth else ""
    return f"{sample.key}{again}".encode("utf-8", "surrogateescape")


def _readable(sample: Sample) -> str:
    name = (
        (sample.member or sample.key).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    )
    return printable(name) if sample.reason else name


def _place(locator: bytes) -> tuple[bytes, int, int, int]:
    name, offset, size, whole = locator.rsplit(b":", 3)
    return name, int(offset), int(size), int(whole)


def _inferred(samples: Sequence[Sample]) -> list[pa.Field]:
    """The columns of the samples' `.json`s: one type each, or text where that is not so."""
    kinds: dict[str, set[pa.DataType]] = {}
    for sample in samples:
        for name, value in sample.columns.items():
            kinds.setdefault(name, set()).update([] if value is None else [_kind(value)])
    numbers = {pa.int64(), pa.float64()}
    return [
        pa.field(
            name, next(iter(found)) if len(found) == 1 else pa.float64() if found == numbers else pa.string()
        )
        for name, found in kinds.items()
    ]


def _kind(value: Any) -> pa.DataType:
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return pa.int64()
    return pa.float64() if isinstance(value, float) else pa.string()


def _fitting(value: Any, kind: pa.DataType) -> Any:
    """`value` as a column of `kind` takes it; None where it cannot."""
    if value is None or kind == pa.string():
        return _text(value)
    if kind == pa.float64() and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) <= 2**53 else None
    return value if _kind(value) == kind else None


def _text(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()
