"""Small pictures for training a synthesis model, in memory: from a recipe's names to RGBA arrays.

A picture is fitted whole into a square, the rest transparent; alpha stays, so that training
can change the ground. Rows carry words, leak group and split. Bad pictures are counted by
reason and left out. Encoded pictures are read as they are needed and never held all at once.
Knows no models, no Ray.

Shape legend: N pictures, S side in pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from llmvis.data import emoji_path, load_emoji
from llmvis.data.openclipart import find_openclipart, load_openclipart
from llmvis.data.styles import STYLES, load_style, styles_path
from llmvis.images import ImageError, decode
from llmvis.recipe import Collection, Pairs
from llmvis.schema import ItemError, UserError
from llmvis.sources import open_reader, open_source

VALIDATION_SHARE, TEST_SHARE = 0.05, 0.05  # of a user's own collection
MARGIN = 0.04  # of the side, around what is drawn, where a picture is cut to its box
READ = 1024  # pictures that a reader is asked for at a time
WORDS = ["id", "caption", "keywords", "group", "split"]  # columns of a packaged set


@dataclass(frozen=True)
class Row:
    """What is known of one picture. `split` is train, validation, test or unused."""

    id: str
    caption: str
    keywords: tuple[str, ...]
    group: str
    split: str


@dataclass
class Pictures:
    """Pictures of one collection, or one side of pairs."""

    pixels: np.ndarray  # uint8 (N, S, S, 4)
    rows: list[Row]
    left_out: dict[str, int] = field(default_factory=dict)  # `schema.Reason` → count

    def where(self, split: str) -> np.ndarray:
        """Indices of a split: int64 (n,)."""
        return np.array([i for i, row in enumerate(self.rows) if row.split == split], np.int64)

    def judged(self, most: int) -> np.ndarray:
        """Up to `most` validation rows, spread over all; training rows where there are none."""
        rows = self.where("validation")
        rows = rows if len(rows) else self.where("train")
        chosen: np.ndarray = rows[np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int))]
        return chosen

    def save(self, folder: Path) -> None:
        """`pixels.npy`, and `rows.json` when all is there."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "pixels.npy", self.pixels)
        told = {"rows": [asdict(row) for row in self.rows], "left_out": self.left_out}
        partial = folder / ".rows.json"
        partial.write_text(json.dumps(told))
        partial.replace(folder / "rows.json")

    @staticmethod
    def load(folder: Path) -> Pictures:
        """What `save` wrote, pixels mapped from the file."""
        told = json.loads((folder / "rows.json").read_text())
        rows = [Row(**row | {"keywords": tuple(row["keywords"])}) for row in told["rows"]]
        return Pictures(np.load(folder / "pixels.npy", mmap_mode="r"), rows, told["left_out"])


Fitted = np.ndarray | str
"""`uint8 (S, S, 4)`, or the `Reason` why there is none."""
MapRows = Callable[[Callable[[bytes], Fitted], Iterable[bytes]], Iterator[Fitted]]
"""Applies a function to each of many encoded pictures, in order: `map`, or a cluster's."""


def fit(data: bytes, side: int, box: bool = False) -> Fitted:
    """Encoded picture → `uint8 (side, side, 4)`, upright, whole and centred on transparent ground.

    box: cut away what is transparent or white all around first.
    """
    try:
        image = decode(data, background=None).image
    except ImageError as error:
        return str(error.reason)
    if box:
        image = _cut(image)
    inner = round(side * (1 - 2 * MARGIN)) if box else side
    scale = inner / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    # premultiplied, so that the colour of what is transparent does not bleed into the edges
    small = image.convert("RGBa").resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0).convert("RGBA")
    out = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    out.paste(small, ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.asarray(out)


def _cut(image: Image.Image) -> Image.Image:
    """The part that is neither transparent nor white; all of it where that is nothing."""
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    drawn = np.asarray(Image.alpha_composite(white, image).convert("RGB")).min(2) < 245
    if not drawn.any():
        return image
    ys, xs = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
    return image.crop((int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1))


def on_white(pixels: np.ndarray) -> np.ndarray:
    """`uint8 (…, 4)` → composited on white, `uint8 (…, 3)`."""
    alpha = pixels[..., 3:].astype(np.uint16)
    mixed = pixels[..., :3] * alpha + 255 * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class Listed:
    """What lies in a set of pictures, before any is read.

    read: encoded pictures of some rows, in order, or why one can't be had.
    left_out: what the listing itself found bad.
    digest: of everything that the listing knows: names, sizes, times, captions.
    """

    images: str
    rows: list[Row]
    read: Callable[[Sequence[int]], Iterator[bytes | ItemError]]
    left_out: dict[str, int] = field(default_factory=dict)
    digest: str


def list_pictures(images: str) -> Listed:
    """Rows of a packaged set, or of a user's collection; raises `UserError` where it is not at hand."""
    if images == "emoji":
        return _packaged(images, lambda columns: load_emoji(columns=columns), emoji_path())
    if images in STYLES:
        return _packaged(images, lambda columns: load_style(images, columns=columns), styles_path())
    if images == "openclipart":
        if (root := find_openclipart()) is None:
            raise UserError("openclipart is not at hand: run jobs.train --stage align --download once")
        return _packaged(images, lambda columns: load_openclipart(root), None)
    source = open_source(images)
    told = source.describe()
    reader = open_reader(told)
    digest = hashlib.sha256(json.dumps(told).encode())
    rows, locators, left_out = [], list[bytes](), Counter[str]()
    for table in source.listing():
        for row in table.to_pylist():
            digest.update(repr([row[f] for f in ("path", "size", "mtime_ns", "reason")]).encode())
            if row["reason"] is not None:
                left_out[row["reason"]] += 1
                continue
            caption = row["caption"]
            if caption is None and row["caption_locator"] is not None:
                (caption,) = reader.read_captions([row["caption_locator"]])
            digest.update(repr(caption).encode())
            path = str(row["path"])
            rows.append(Row(path, caption or "", (), path, _split_of(path)))
            locators.append(row["locator"])

    def read(wanted: Sequence[int]) -> Iterator[bytes | ItemError]:
        for at in range(0, len(wanted), READ):
            yield from reader.read([locators[i] for i in wanted[at : at + READ]])

    return Listed(images=images, rows=rows, read=read, left_out=left_out, digest=digest.hexdigest())


def _packaged(images: str, load: Callable[[list[str]], pa.Table], file: Path | None) -> Listed:
    """A set with its own columns of words; `file` is where it lies, if it is a single one."""
    told = load(WORDS).select(WORDS).to_pylist()
    rows = [Row(r["id"], r["caption"], tuple(r["keywords"] or ()), r["group"], r["split"]) for r in told]
    digest = hashlib.sha256(repr(rows).encode())
    if file is not None:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())

    def read(wanted: Sequence[int]) -> Iterator[bytes]:
        pictures = load(["image"])["image"]
        for i in wanted:
            yield pictures[i].as_py()["bytes"]

    return Listed(images=images, rows=rows, read=read, digest=digest.hexdigest())


def load_collection(
    part: Collection,
    side: int,
    map_rows: MapRows = map,
    *,
    most: int | None = None,
    listed: Listed | None = None,
) -> Pictures:
    """Pictures of a collection, every split.

    most: so many at most, spread over all. listed: what `list_pictures` gave for it, if it was asked already.
    """
    listed = listed or list_pictures(part.images)
    return _fitted(listed, spread(range(len(listed.rows)), most), side, False, map_rows)


def load_pairs(
    part: Pairs, side: int, map_rows: MapRows = map, split: str | None = None, *,
    most: int | None = None, listed: tuple[Listed, Listed] | None = None,
) -> tuple[Pictures, Pictures]:  # fmt: skip
    """Sources and targets, row by row; a pair of which one side is missing or bad is left out of both.

    split: only this one; None: all. most, listed: as in `load_collection`.

    Raises `UserError` where no two pictures belong together.
    """
    source, target = listed or (list_pictures(part.source), list_pictures(part.target))
    keys, others = _keys(source), _keys(target)
    both = [key for key in keys if key in others]
    if not both:
        raise UserError(
            f"pairs {part.name!r}: no picture of {part.source} has one of the same name in {part.target}"
        )
    joined = {key: _joined(source.rows[keys[key]].split, target.rows[others[key]].split) for key in both}
    both = spread([key for key in both if split in (None, joined[key])], most)
    sides = []
    for side_listed, place in ((source, keys), (target, others)):
        rows = list(side_listed.rows)
        for key in both:
            rows[place[key]] = replace(rows[place[key]], id=key)
        named = replace(side_listed, rows=rows)
        sides.append(_fitted(named, [place[key] for key in both], side, part.box, map_rows))
    shared = {row.id for row in sides[0].rows} & {row.id for row in sides[1].rows}
    for pictures in sides:
        keep = [i for i, row in enumerate(pictures.rows) if row.id in shared]
        pictures.pixels, pictures.rows = pictures.pixels[keep], [pictures.rows[i] for i in keep]
    if not shared:
        raise UserError(f"pairs {part.name!r}: of no pair both pictures could be read")
    # words are the source's, or the target's where the source has none
    rows = [
        replace(mine if mine.caption else its, split=joined[mine.id])
        for mine, its in zip(sides[0].rows, sides[1].rows, strict=True)
    ]
    sides[0].rows, sides[1].rows = rows, rows
    return sides[0], sides[1]


def spread(rows: Sequence[Any], most: int | None) -> list[Any]:
    """At most so many of the rows, evenly spread over all of them; None: all."""
    many = len(rows) if most is None else min(most, len(rows))
    return [rows[i * len(rows) // many] for i in range(many)]


def _fitted(listed: Listed, wanted: Sequence[int], side: int, box: bool, map_rows: MapRows) -> Pictures:
    left_out, read = Counter(listed.left_out), list[Row]()

    def encoded() -> Iterator[bytes]:
        for i, data in zip(wanted, listed.read(wanted), strict=True):
            if isinstance(data, ItemError):
                left_out[str(data.reason)] += 1
                continue
            read.append(listed.rows[i])
            yield data

    pixels, rows = np.empty((len(wanted), side, side, 4), np.uint8), list[Row]()
    for place, made in enumerate(map_rows(partial(fit, side=side, box=box), encoded())):
        if isinstance(made, str):
            left_out[made] += 1
        else:
            pixels[len(rows)] = made
            rows.append(read[place])
    if not rows:
        raise UserError(f"no picture of {listed.images} could be read: {dict(left_out) or 'there is none'}")
    return Pictures(pixels[: len(rows)], rows, dict(left_out))


def _keys(listed: Listed) -> dict[str, int]:
    """Where each picture is, by the name under which it belongs to another: id, or path without ending."""
    packaged = listed.images in ("emoji", "openclipart", *STYLES)
    return {row.id if packaged else _stem(row.id): i for i, row in enumerate(listed.rows)}


def _joined(source: str, target: str) -> str:
    """Split of a pair: what one side leaves out of training, the pair does."""
    return "unused" if "unused" in (source, target) else source


def _stem(path: str) -> str:
    """A picture's path without its ending; a row of a Parquet file (`a.parquet#17`) is its number."""
    _, row, number = path.rpartition(".parquet#")
    return number if row else str(PurePosixPath(path).with_suffix(""))


def _split_of(path: str) -> str:
    """Split of a user's picture, from its path without the ending, for ever."""
    key = _stem(path)
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") / 2**32
    return (
        "test" if place < TEST_SHARE else "validation" if place < TEST_SHARE + VALIDATION_SHARE else "train"
    )
