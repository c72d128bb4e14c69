"""From a decoded picture to the fixed-size array an encoder wants, with Pillow alone.

Light on purpose: the driver and the decode tasks of a cluster import it, and they have
no torch. Transparency is gone before a picture comes here (see `llmvis.images`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

Mode = Literal["pad", "crop", "squash"]


@dataclass(frozen=True, kw_only=True)
class SquarePreprocess:
    """RGB picture of any size → `uint8 (size, size, 3)`.

    mode: `pad` keeps the whole picture and its proportions on a `background` square,
    `crop` keeps the middle square, `squash` keeps everything and lets proportions go.
    """

    size: int
    mode: Mode = "pad"
    background: tuple[int, int, int] = (255, 255, 255)

    @property
    def side(self) -> int:
        """Shortest side that it makes use of, pixels."""
        return self.size

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Resize with Pillow's antialiased bicubic filter; raises `ValueError` on a mode that is not RGB."""
        if image.mode != "RGB":
            raise ValueError(f"expected an RGB picture, got {image.mode}: convert it first")
        square = (self.size, self.size)
        if self.mode == "squash":
            out = image.resize(square, Image.Resampling.BICUBIC, reducing_gap=3.0)
        elif self.mode == "crop":
            out = ImageOps.fit(image, square, Image.Resampling.BICUBIC)
        else:
            longest = max(image.size)
            width, height = (max(1, round(side * self.size / longest)) for side in image.size)
            out = Image.new("RGB", square, self.background)
            small = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
            out.paste(small, ((self.size - width) // 2, (self.size - height) // 2))
        return np.asarray(out)
