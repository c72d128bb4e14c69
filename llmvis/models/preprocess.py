"""From a decoded picture to the fixed-size array an encoder wants, with Pillow alone.

Light on purpose: the driver and the decode tasks of a cluster import it, and they have
no torch. Transparency is gone before a picture comes here (see `llmvis.images`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

Mode = Literal["fit", "pad", "crop", "squash"]
_SQUEEZE = 1.5  # `fit` squeezes proportions up to 3:2, the common format of photographs


@dataclass(frozen=True, kw_only=True)
class SquarePreprocess:
    """RGB picture of any size → `uint8 (size, size, 3)`.

    mode: `pad` keeps the whole picture and its proportions on a `background` square,
    `crop` keeps the middle square, `squash` keeps everything and lets proportions go, and
    `fit` squashes what is no longer than 3:2 and pads the rest of a longer picture.
    """

    size: int
    mode: Mode = "fit"
    background: tuple[int, int, int] = (255, 255, 255)

    @property
    def side(self) -> int:
        """Shortest side that it makes use of, pixels."""
        return self.size

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Resize with Pillow's antialiased bicubic filter; raises `ValueError` on a mode that is not RGB."""
        if image.mode != "RGB":
            raise ValueError(f"expected an RGB picture, got {image.mode}: convert it first")
        if self.mode == "crop":
            return np.asarray(ImageOps.fit(image, (self.size, self.size), Image.Resampling.BICUBIC))
        squeeze = {"pad": 1.0, "fit": _SQUEEZE, "squash": float("inf")}[self.mode]
        longest = max(image.size)
        width, height = (max(1, round(self.size * min(1.0, squeeze * side / longest))) for side in image.size)
        small = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
        if small.size == (self.size, self.size):
            return np.asarray(small)
        out = Image.new("RGB", (self.size, self.size), self.background)
        out.paste(small, ((self.size - width) // 2, (self.size - height) // 2))
        return np.asarray(out)
