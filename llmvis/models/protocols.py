"""The seams where a model meets the rest: `Encoder`, `Translator`, `Generator`, `PictureRestorer`, and what they say.

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

from llmvis.enhance import Task


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


@dataclass(frozen=True, kw_only=True)
class SynthesisInfo:
    """What the driver and the reading tasks need to know of a translator or generator.

    `side`: pictures come in fitted into a square of so many pixels, on white. `fingerprint` is a
    sha256 over all that decides the output but the request itself: weights, configuration,
    how it samples.
    """

    name: str
    fingerprint: str
    side: int
    licence: str = "unknown"


@runtime_checkable
class Translator(Protocol):
    """Pictures under instructions → pictures. The same request gives the same picture in any batch."""

    info: SynthesisInfo

    def translate(
        self, pictures: np.ndarray, instructions: Sequence[str], *, seeds: Sequence[int], ids: Sequence[str],
        masks: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """`uint8 (B, S, S, 3)` and B instructions → `uint8 (B, H, W, 3)`.

        `ids` and `seeds` name the random stream of each row. masks, `bool (B, S, S)`: only what is
        True is made anew, under the instruction as a description; a translator that can't
        raises `UserError`.
        """
        ...


@runtime_checkable
class Generator(Protocol):
    """Prompts → pictures. The same request gives the same picture in any batch."""

    info: SynthesisInfo

    def generate(
        self, prompts: Sequence[str], *, negatives: Sequence[str | None], seeds: Sequence[int],
        ids: Sequence[str],
    ) -> np.ndarray:  # fmt: skip
        """B prompts, and what to stay away from → `uint8 (B, H, W, 3)`."""
        ...


@runtime_checkable
class PictureRestorer(Protocol):
    """Takes noise or blur out of a picture, or enlarges it with detail. No chance has a part in it."""

    @property
    def info(self) -> SynthesisInfo: ...

    def restore(self, picture: np.ndarray, task: Task) -> np.ndarray:
        """`uint8 (H, W, 3)` of any size → `uint8 (H, W, 3)`; "enlarge" gives `(2 H, 2 W, 3)`."""
        ...
