"""Augmented views of a drawing for training: position, size, ground, turn, colour. Pillow only.

Every view is a function of (picture, seed, number of the view), so a training set can be
rebuilt anywhere. View 0 is the picture as the encoder will see it.
"""

from __future__ import annotations

import io
import random

import numpy as np
from PIL import Image, ImageEnhance

from llmvis.models.preprocess import SquarePreprocess

_BICUBIC = Image.Resampling.BICUBIC


def view_of(data: bytes, preprocess: SquarePreprocess, number: int, seed: int) -> np.ndarray:
    """View `number` of an encoded picture (alpha allowed): `uint8 (size, size, 3)`."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    if number == 0:
        return preprocess(on_ground(picture, (255, 255, 255)))
    return preprocess(_changed(picture, random.Random(f"{seed}/{number}")))


def on_ground(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """An RGBA picture on a plain ground, as RGB."""
    ground = Image.new("RGB", picture.size, colour)
    ground.paste(picture, (0, 0), picture)
    return ground


def _changed(picture: Image.Image, rng: random.Random) -> Image.Image:
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.3:
        picture = picture.rotate(rng.uniform(-20, 20), expand=True, resample=_BICUBIC)
    if rng.random() < 0.5:  # trim the margin
        picture = picture.crop(picture.getchannel("A").getbbox())
    side = int(max(picture.size) * rng.uniform(1.0, 1.5))
    square = Image.new("RGBA", (side, side))
    square.paste(
        picture, (int((side - picture.width) * rng.random()), int((side - picture.height) * rng.random()))
    )
    out = on_ground(square, _ground_colour(rng))
    if rng.random() < 0.5:  # a part of it
        part = int(side * rng.uniform(0.7, 1.0))
        left, top = rng.randint(0, side - part), rng.randint(0, side - part)
        out = out.crop((left, top, left + part, top + part))
    if rng.random() < 0.4:
        out = ImageEnhance.Color(out).enhance(rng.uniform(0.2, 1.6))
        out = ImageEnhance.Brightness(out).enhance(rng.uniform(0.7, 1.2))
        out = ImageEnhance.Contrast(out).enhance(rng.uniform(0.7, 1.3))
    return out.convert("L").convert("RGB") if rng.random() < 0.1 else out


def _ground_colour(rng: random.Random) -> tuple[int, int, int]:
    """White half of the time, a light grey a quarter, any colour a quarter."""
    if rng.random() < 0.5:
        return (255, 255, 255)
    if rng.random() < 0.5:
        grey = rng.randint(180, 255)
        return (grey, grey, grey)
    return (rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255))
