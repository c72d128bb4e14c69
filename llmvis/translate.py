"""Pictures under instructions → pictures, as the job engine wants it.

`ReadSources` reads, decodes and fits on CPUs, and does there what needs no model: classic edits
by text. `Translate` runs models on the rest, in actors: the restorer on pictures in their own size where
noise or blur is to go or detail to come, else the translator. With a mask only its region changes, in the
picture's own size. Knows no Ray and no concrete model.

Shape legend: N rows, S side of the model's pictures.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from llmvis.edits import apply_region, parse_edit
from llmvis.enhance import check_size, parse_enhancement
from llmvis.images import decode, square, square_mask
from llmvis.ledger import dead_row
from llmvis.made import made_table, on_the_way, picture_columns, png_bytes
from llmvis.models.protocols import PictureRestorer, SynthesisInfo, Translator
from llmvis.scene import cutout
from llmvis.schema import ItemError, Reason, UserError
from llmvis.sources import Reader
from llmvis.sources.variants import ADDED

Row = dict[str, Any]
Pictures = npt.NDArray[np.uint8]
BATCH = 16
"""Rows that go to a translator at once; each must fit beside the model."""

WAY = [*(pa.field(name, pa.binary()) for name in ("made", "original", "mask")), pa.field("task", pa.string())]
"""Columns between reading and the model: what is ready, what is enhanced or what a masked result is put back
into, the mask, and the enhancement that is asked for."""


@dataclass(frozen=True, kw_only=True)
class ReadSources:
    """Listing rows → rows with what is known of the result, and `uint8 (N, S, S, 4)`: RGB on white and the mask.

    side: of the translator's pictures; 1 where no instruction needs one.
    whole: keep the pictures themselves, since a region of them is to be found.
    """

    reader: Reader
    masks: Reader | None
    side: int
    whole: bool
    max_pixels: int
    max_bytes: int

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, Pictures, list[Row], dict[str, float]]:
        listed = rows.to_pylist()
        seconds = {"read": 0.0, "decode": 0.0}
        kept, arrays, dead = list[Row](), list[Pictures](), list[Row]()
        sources = _Once(self.reader, listed, "locator", self.max_bytes)
        masks = self.masks and _Once(self.masks, listed, "mask_locator", self.max_bytes)
        texts = self.reader.read_captions(
            [None if row["caption"] else row["caption_locator"] for row in listed]
        )
        for place, row in enumerate(listed):
            begun = time.perf_counter()
            data = sources.bytes_of(place)
            mask = masks.bytes_of(place) if masks else None
            text = next(texts)
            row["caption"] = row["caption"] or text
            now = time.perf_counter()
            seconds["read"] += now - begun
            stage = "read" if isinstance(data, ItemError) or isinstance(mask, ItemError) else "decode"
            try:
                made, array = self._prepared(row, _sound(data), None if mask is None else _sound(mask))
                kept.append(made)
                arrays.append(array)
            except ItemError as error:
                dead.append(dead_row(row["id"], row["path"], stage, error))
            seconds["decode"] += time.perf_counter() - now
        arrays = arrays or [np.zeros((0, 1, 1, 4), np.uint8)]
        return on_the_way(kept, rows.schema, WAY), np.stack(arrays) if kept else arrays[0], dead, seconds

    def _prepared(self, row: Row, data: bytes, mask_data: bytes | None) -> tuple[Row, Pictures]:
        image = decode(data, max_pixels=self.max_pixels, max_bytes=self.max_bytes).image
        mask = None if mask_data is None else self._mask(mask_data, image.size)
        caption = row["caption"]
        instruction = row["instruction"].replace("{caption}", caption or "").strip(" :,")
        task = parse_enhancement(
            row["instruction"]
        )  # a caption in it does not decide which models are loaded
        made = {
            **row,
            "caption": caption,
            "instruction": instruction,
            "made": None,
            "original": None,
            "mask": None,
            "task": task,
        }
        edit = None if task else parse_edit(instruction)
        try:
            if task:
                check_size(task, *image.size, region=self.whole or mask is not None)
            if edit is not None:
                after = edit(image)
                after = after if mask is None else apply_region(image, after, mask)
                made["made"] = png_bytes(np.asarray(after))
        except UserError as error:
            raise ItemError(Reason.UNSUITABLE, str(error)) from error
        translated = edit is None and task is None
        array = np.zeros((self.side, self.side, 4), np.uint8)
        if translated or self.whole:
            array[..., :3] = np.asarray(square(image, self.side))
        if edit is None and mask is not None:
            made["mask"] = png_bytes(np.asarray(mask.convert("RGB")))
            if translated:
                array[..., 3] = 255 * square_mask(np.asarray(mask) > 0, *image.size, self.side)
        if self.whole or made["mask"] or task:
            made["original"] = png_bytes(np.asarray(image))
        return made, array

    def _mask(self, data: bytes, size: tuple[int, int]) -> Image.Image:
        mask = decode(data, max_pixels=self.max_pixels, max_bytes=self.max_bytes).image.convert("L")
        if mask.size != size:
            raise ItemError(Reason.UNSUITABLE, f"the mask is {mask.size}, the picture {size}")
        return mask


class _Once:
    """Bytes of many rows, of which neighbours share a file: each is read once and the last one held."""

    def __init__(self, reader: Reader, rows: Sequence[Row], column: str, most: int) -> None:
        self._of, order, first = [], dict[bytes, int](), list[Row]()
        for row in rows:
            if row[column] not in order:
                order[row[column]] = len(first)
                first.append(row)
            self._of.append(order[row[column]])
        stats = [(row["size"], row["mtime_ns"]) for row in first] if column == "locator" else None
        self._found = iter(reader.read([row[column] for row in first], stats, max_bytes=most))
        self._seen: list[bytes | ItemError] = []

    def bytes_of(self, place: int) -> bytes | ItemError:
        """Of row `place`, asked for in order."""
        while len(self._seen) <= self._of[place]:
            self._seen = [*([b""] * len(self._seen)), next(self._found)]
        return self._seen[self._of[place]]


def _sound(data: bytes | ItemError) -> bytes:
    if isinstance(data, ItemError):
        raise data
    return data


Region = Callable[[Pictures], npt.NDArray[np.bool_]]
"""Finds what is to change in one picture: uint8 (S, S, 3) → bool (S, S)."""


@dataclass(frozen=True, kw_only=True)
class Translate:
    """Prepared rows → made rows (`made.made_schema`).

    region: where only a part that it finds is to change; `cut`: cut out from the white ground.
    """

    translator: Translator | None
    info: SynthesisInfo
    region: Region | None
    cut: bool
    restorer: PictureRestorer | None = None

    def __call__(self, rows: pa.Table, arrays: Pictures) -> tuple[pa.Table, list[Row]]:
        listed, masks = rows.to_pylist(), arrays[..., 3]
        if self.region is not None:
            masks = np.stack([self.region(picture[..., :3]) for picture in arrays]).astype(np.uint8) * 255
        classic = [row["made"] is not None for row in listed]
        for row in listed:
            if row["task"] is not None:
                row["made"] = self._restored(row)
        todo = [i for i, row in enumerate(listed) if row["made"] is None]
        for masked in (False, True):
            some = [i for i in todo if self._in_region(listed[i]) == masked]
            for at in range(0, len(some), BATCH):
                batch = some[at : at + BATCH]
                asked = [listed[i] for i in batch]
                made = self._translated(asked, arrays[batch], masks[batch] if masked else None)
                for row, picture in zip(asked, made, strict=True):
                    row["made"] = png_bytes(picture)
        made_rows = [
            self._row(row, known, mask) for row, known, mask in zip(listed, classic, masks, strict=True)
        ]
        return made_table(made_rows, rows, [*ADDED, *WAY]), []

    def _translated(self, rows: list[Row], arrays: Pictures, masks: Pictures | None) -> Pictures:
        assert self.translator is not None
        return self.translator.translate(
            np.ascontiguousarray(arrays[..., :3]),
            [row["instruction"] for row in rows],
            seeds=[row["seed"] for row in rows],
            ids=[f"{row['source_id']}/{row['instruction']}" for row in rows],
            masks=None if masks is None else masks > 0,
        )

    def _restored(self, row: Row) -> bytes:
        """The whole picture in its own size, enhanced, as PNG."""
        assert self.restorer is not None
        return png_bytes(self.restorer.restore(np.asarray(_opened(row["original"])), row["task"]))

    def _in_region(self, row: Row) -> bool:
        """Whether only a part of the picture is to change."""
        return self.region is not None or row["mask"] is not None

    def _row(self, row: Row, classic: bool, mask: Pictures) -> Row:
        data: bytes = row["made"]
        if self._in_region(row) or self.cut:
            picture = _opened(data)
            if self._in_region(row):
                picture = _into(row, picture, mask, classic or row["task"] is not None)
            if self.cut:
                picture = cutout(picture.convert("RGB"))
            data = png_bytes(np.asarray(picture))
        info = self.restorer.info if self.restorer and row["task"] else self.info
        return {
            **row,
            **picture_columns(row["id"], data),
            "prompt": row["instruction"],
            "source": row["path"],
            "model": "pillow" if classic else info.name,
            "model_fingerprint": "" if classic else info.fingerprint,
        }


def _into(row: Row, made: Image.Image, mask: Pictures, own_size: bool) -> Image.Image:
    """What was made, put inside the region of the picture that it was made for, in that one's size.

    mask: uint8 (S, S) of the fitted picture; the row's own mask is finer and comes first. own_size: what was
    made has the picture's size already.
    """
    original = _opened(row["original"])
    region = _unfitted(Image.fromarray(mask), original.size)
    if row["mask"] is not None:
        region = _opened(row["mask"]).convert("L")
    return apply_region(original, made if own_size else _unfitted(made, original.size), region)


def _unfitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The reverse of `images.square`: a square picture as it lies over one of `size`."""
    longest = max(size)
    left, top = (longest - size[0]) // 2, (longest - size[1]) // 2
    large = image.resize((longest, longest), Image.Resampling.BICUBIC)
    return large.crop((left, top, left + size[0], top + size[1]))


def _opened(png: bytes) -> Image.Image:
    """Our own PNG."""
    return Image.open(io.BytesIO(png))


def load_region(text: str) -> Region:
    """The part of a picture that `text` points at, by Grad-CAM of the packaged retrieval model."""
    from llmvis.explain import region_of
    from llmvis.models.two_tower import load_two_tower

    encoder = load_two_tower()

    def find(picture: Pictures) -> npt.NDArray[np.bool_]:
        return region_of(encoder, picture, text)

    return find


@dataclass(frozen=True, kw_only=True)
class LoadTranslator:
    """Loads the models in the actor, from their names; none where no instruction needs one.

    restorer: with what it was planned to be.
    """

    load: Callable[[], Translator] | None
    info: SynthesisInfo
    region: str | None
    cut: bool
    restorer: tuple[Callable[[], PictureRestorer], SynthesisInfo] | None = None

    def __call__(self) -> Translate:
        translator = self.load() if self.load else None
        if translator is not None:
            check_loaded(translator.info, self.info)
        restorer = None
        if self.restorer is not None:
            load, planned = self.restorer
            restorer = load()
            check_loaded(restorer.info, planned)
        region = None if self.region is None else load_region(self.region)
        return Translate(
            translator=translator, info=self.info, region=region, cut=self.cut, restorer=restorer
        )


def check_loaded(found: SynthesisInfo, planned: SynthesisInfo) -> None:
    """Raises `RuntimeError` if this node has another model than the one that was planned with."""
    if found.fingerprint != planned.fingerprint:
        raise RuntimeError(
            f"the model {found.name} on this node is not the one that was planned with "
            f"({found.fingerprint[:12]}… against {planned.fingerprint[:12]}…); install the same files"
        )
