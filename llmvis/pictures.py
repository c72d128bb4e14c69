"""Small pictures for training a synthesis model, in memory: from a recipe's names to RGBA arrays.

A picture is fitted whole into a square, the rest transparent; alpha stays, so that training
can change the ground. Rows carry words, leak group and split. Bad pictures are counted and
left out. Knows no models, no Ray.

Shape legend: N pictures, S side in pixels.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from llmvis.data import load_emoji
from llmvis.data.openclipart import find_openclipart, load_openclipart
from llmvis.data.styles import STYLES, load_style
from llmvis.recipe import Collection, Pairs
from llmvis.schema import ItemError, UserError
from llmvis.sources import open_reader, open_source

VALIDATION_SHARE, TEST_SHARE = 0.05, 0.05  # of a user's own collection
MARGIN = 0.04  # of the side, around what is drawn, where a picture is cut to its box


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
    left_out: dict[str, int] = field(default_factory=dict)  # reason → count

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
"""`uint8 (S, S, 4)`, or why there is none."""
MapRows = Callable[[Callable[[bytes], Fitted], Iterable[bytes]], Iterator[Fitted]]
"""Applies a function to each of many encoded pictures, in order: `map`, or a cluster's."""


def fit(data: bytes, side: int, box: bool = False) -> Fitted:
    """Encoded picture → `uint8 (side, side, 4)`, whole and centred on transparent ground.

    box: cut away what is transparent or white all around first.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data)).convert("RGBA")
    except Exception as error:  # noqa: BLE001 - Pillow's plugins raise anything on hostile bytes
        return type(error).__name__
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


def load_collection(part: Collection, side: int, map_rows: MapRows = map) -> Pictures:
    """All pictures of a collection, every split."""
    return _fitted(_listed(part.images), side, False, map_rows)


def load_pairs(
    part: Pairs, side: int, map_rows: MapRows = map, split: str | None = None
) -> tuple[Pictures, Pictures]:
    """Sources and targets, row by row; a pair of which one side is missing or bad is left out of both.

    split: only this one; None: all.

    Raises `UserError` where no two pictures belong together.
    """
    source, target = dict(_keyed(part.source)), dict(_keyed(part.target))
    both = [key for key in source if key in target]
    if not both:
        raise UserError(
            f"pairs {part.name!r}: no picture of {part.source} has one of the same name in {part.target}"
        )
    if split is not None:
        both = [key for key in both if _joined(source[key][0].split, target[key][0].split) == split]
    sides = [_fitted([listed[key] for key in both], side, part.box, map_rows) for listed in (source, target)]
    shared = {row.id for row in sides[0].rows} & {row.id for row in sides[1].rows}
    for pictures in sides:
        keep = [i for i, row in enumerate(pictures.rows) if row.id in shared]
        pictures.pixels, pictures.rows = pictures.pixels[keep], [pictures.rows[i] for i in keep]
    targets = {row.id: row for row in sides[1].rows}
    # words are the source's, or the target's where the source has none
    rows = [
        replace(row if row.caption else targets[row.id], split=_joined(row.split, targets[row.id].split))
        for row in sides[0].rows
    ]
    sides[0].rows, sides[1].rows = rows, rows
    return sides[0], sides[1]


def _fitted(listed: Sequence[tuple[Row, bytes]], side: int, box: bool, map_rows: MapRows) -> Pictures:
    rows, pixels = [], []
    left_out: dict[str, int] = {}
    for (row, _), made in zip(
        listed, map_rows(lambda data: fit(data, side, box), [d for _, d in listed]), strict=True
    ):
        if isinstance(made, str):
            left_out[made] = left_out.get(made, 0) + 1
        else:
            rows.append(row)
            pixels.append(made)
    if not rows:
        raise UserError(f"no picture could be read: {left_out}")
    return Pictures(np.stack(pixels), rows, left_out)


def _keyed(images: str) -> Iterator[tuple[str, tuple[Row, bytes]]]:
    for row, data in _listed(images):
        key = row.id if _is_packaged(images) else _stem(row.id)
        yield key, (Row(key, row.caption, row.keywords, row.group, row.split), data)


def _joined(source: str, target: str) -> str:
    """Split of a pair: what one side leaves out of training, the pair does."""
    return "unused" if "unused" in (source, target) else source


def _is_packaged(images: str) -> bool:
    return images in ("emoji", "openclipart", *STYLES)


def _listed(images: str) -> list[tuple[Row, bytes]]:
    """Rows and encoded pictures of a packaged set, or of a user's collection."""
    if images == "emoji":
        return _packaged(load_emoji())
    if images in STYLES:
        return _packaged(load_style(images))
    if images == "openclipart":
        if (root := find_openclipart()) is None:
            raise UserError("openclipart is not at hand: run jobs.train --stage align --download once")
        return _packaged(load_openclipart(root))
    source = open_source(images)
    reader = open_reader(source.describe())
    out = []
    for table in source.listing():
        for row in table.to_pylist():
            if row["reason"] is not None:
                continue
            data = next(iter(reader.read([row["locator"]])))
            if isinstance(data, ItemError):
                continue
            caption = row["caption"]
            if caption is None and row["caption_locator"] is not None:
                caption = reader.read_caption(row["caption_locator"])
            path = str(row["path"])
            out.append((Row(path, caption or "", (), path, _split_of(path)), data))
    return out


def _packaged(table: pa.Table) -> list[tuple[Row, bytes]]:
    columns = ["id", "caption", "keywords", "group", "split", "image"]
    rows: list[dict[str, Any]] = table.select(columns).to_pylist()
    return [
        (Row(r["id"], r["caption"], tuple(r["keywords"] or ()), r["group"], r["split"]), r["image"]["bytes"])
        for r in rows
    ]


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
