"""Pictures → embeddings, as the job engine wants it: `ReadPictures` on CPUs, `EncodePictures` in actors.

Knows readers, decoding and the `Encoder` protocol; knows no Ray and no concrete model.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmvis.images import decode
from llmvis.ledger import dead_row
from llmvis.models.protocols import Encoder, Preprocess
from llmvis.schema import LISTING, MAX_CAPTION, ItemError, Reason
from llmvis.sources import Reader

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ReadPictures:
    """Listing rows → rows with caption and size, and their pictures `uint8 (N, H, W, 3)`."""

    reader: Reader
    preprocess: Preprocess
    max_pixels: int
    max_bytes: int

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, npt.NDArray[np.uint8], list[Row], dict[str, float]]:
        listed = rows.select(
            ["id", "path", "locator", "size", "mtime_ns", "caption", "caption_locator"]
        ).to_pylist()
        seconds = {"read": 0.0, "decode": 0.0}
        pictures: list[npt.NDArray[np.uint8]] = []
        kept: list[int] = []
        extra: list[Row] = []
        dead: list[Row] = []
        begun = time.perf_counter()
        found = self.reader.read(
            [row["locator"] for row in listed],
            [(row["size"], row["mtime_ns"]) for row in listed],
            max_bytes=self.max_bytes,
        )
        texts = self.reader.read_captions(
            [row["caption_locator"] if row["caption"] is None else None for row in listed]
        )
        for index, (row, data, text) in enumerate(zip(listed, found, texts, strict=True)):
            now = time.perf_counter()
            seconds["read"] += now - begun
            try:
                if isinstance(data, ItemError):
                    raise data
                decoded = decode(
                    data, target=self.preprocess.side, max_pixels=self.max_pixels, max_bytes=self.max_bytes
                )
                pictures.append(self.preprocess(decoded.image))
                caption = text if row["caption"] is None else str(row["caption"])
                extra.append({**clip(caption), "width": decoded.width, "height": decoded.height})
                kept.append(index)
            except ItemError as error:
                stage = "read" if error is data else "decode"
                dead.append(dead_row(row["id"], row["path"], stage, error))
            begun = time.perf_counter()
            seconds["decode"] += begun - now
        return self._joined(rows, kept, extra), stack(pictures), dead, seconds

    @staticmethod
    def _joined(rows: pa.Table, kept: list[int], extra: list[Row]) -> pa.Table:
        """The kept rows, less what only the reader needs, with what was found out."""
        drop = [name for name in LISTING.names if name not in ("id", "path", "locator")]
        table = rows.take(pa.array(kept, pa.int64())).drop_columns(drop)
        kinds = {
            "caption": pa.string(),
            "caption_truncated": pa.bool_(),
            "width": pa.int32(),
            "height": pa.int32(),
        }
        for name, kind in kinds.items():
            table = table.append_column(name, pa.array([e[name] for e in extra], kind))
        return table


@dataclass(frozen=True, kw_only=True)
class EncodePictures:
    """Rows and pictures → rows with `embedding`; a vector that is not finite is a dead letter."""

    encoder: Encoder

    def __call__(self, rows: pa.Table, pictures: npt.NDArray[np.uint8]) -> tuple[pa.Table, list[Row]]:
        vectors = self.encoder.encode_images(pictures).astype(np.float16)
        finite = np.isfinite(vectors).all(axis=1)
        error = ItemError(Reason.MODEL_ERROR, "the model's embedding is not finite")
        bad = rows.filter(pa.array(~finite)).select(["id", "path"]).to_pylist()
        dead = [dead_row(row["id"], row["path"], "model", error) for row in bad]
        flat = pa.array(vectors[finite].reshape(-1))
        column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        return rows.filter(pa.array(finite)).append_column("embedding", column), dead


@dataclass(frozen=True, kw_only=True)
class LoadEncoder:
    """Loads the model in the actor, from a name: weights are never sent around."""

    load: Callable[..., Encoder]
    model: str | None
    fingerprint: str

    def __call__(self) -> EncodePictures:
        encoder = self.load(self.model)
        if encoder.info.fingerprint != self.fingerprint:
            raise RuntimeError(
                f"the model {encoder.info.name} on this node is not the one that was planned with "
                f"({encoder.info.fingerprint[:12]}… against {self.fingerprint[:12]}…); install the same files"
            )
        return EncodePictures(encoder=encoder)


def clip(caption: str | None) -> Row:
    """`caption` cut to `MAX_CAPTION` characters, with the flag that says so; otherwise verbatim."""
    cut = caption is not None and len(caption) > MAX_CAPTION
    return {"caption": caption[:MAX_CAPTION] if caption is not None else None, "caption_truncated": cut}


def stack(pictures: list[npt.NDArray[np.uint8]]) -> npt.NDArray[np.uint8]:
    """`uint8 (N, H, W, 3)`, also for N = 0."""
    return np.stack(pictures) if pictures else np.zeros((0, 1, 1, 3), np.uint8)
