"""The seams where a model meets the rest: `Encoder` and what it says of itself.

An encoder comes in two halves, so that a cluster can use CPUs and GPUs at once.
`EncoderInfo` is light (no weights, no torch): the driver plans with it, and CPU
tasks use its `preprocess` to turn a decoded picture into the fixed-size array the
model wants. `Encoder` holds the weights and lives in an actor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image


class Preprocess(Protocol):
    """Picklable, weightless: RGB picture of any size → `uint8 (H, W, 3)` of one fixed size."""

    @property
    def side(self) -> int:
        """Shortest side in pixels that it makes use of: a JPEG may be decoded down to that."""
        ...

    def __call__(self, image: Image.Image) -> np.ndarray: ...


@dataclass(frozen=True, kw_only=True)
class EncoderInfo:
    """What the driver and the decode tasks need to know of an encoder.

    `fingerprint` is a sha256 over weights, tokenizer and preprocessing: two encoders
    with the same fingerprint give the same embeddings, and an index built with one
    refuses queries of another.
    """

    name: str
    fingerprint: str
    dim: int
    preprocess: Preprocess
    licence: str = "unknown"


@runtime_checkable
class Encoder(Protocol):
    """Pictures and texts in one space; rows are unit length, so a dot product is a cosine."""

    info: EncoderInfo

    def encode_images(self, images: np.ndarray) -> np.ndarray:
        """`uint8 (B, H, W, 3)`, sized by `info.preprocess` → `float32 (B, D)`, unit norm."""
        ...

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """B texts in any length (the model truncates) → `float32 (B, D)`, unit norm."""
        ...
