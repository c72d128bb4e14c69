"""One classic edit each: brightness, blur, size, crop, ground …, as Pillow does them, exactly.

A step is a small frozen value (it can be compared, hashed and pickled), called with an RGB or
RGBA picture and giving a new one. Alpha is kept by all but `Ground`, and colours under
transparent pixels never bleed into visible ones. The range of an amount is checked when a
step is made. What it does not know: words (see `edits`), files, models, torch, Ray.

Colours are sRGB values as stored, not linear light, as in Pillow and in CSS filters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar, Literal, Protocol

from PIL import Image, ImageChops, ImageFilter, ImageOps, ImageStat

from llmvis.images import MAX_PIXELS
from llmvis.schema import UserError

MAX_SIDE = 16_384
"""Largest width or height, in pixels, that a resize may ask for."""

NEAR_WHITE = 245
"""A pixel all of whose channels are at least this is part of a white border."""

Ratio = tuple[int, int]
RGBColour = tuple[int, int, int]


class Step(Protocol):
    """What an edit is made of."""

    changes_size: ClassVar[bool]

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGB or RGBA picture → a new one."""

    def describe(self) -> str:
        """Its canonical wording, which `edits.parse_edit` reads back as the same step."""


LUMA = (0.299, 0.587, 0.114)
"""Weights of R, G, B in grey: ITU-R BT.601, those of Pillow's mode L."""

SEPIA = ((0.393, 0.769, 0.189), (0.349, 0.686, 0.168), (0.272, 0.534, 0.131))
"""Rows for R, G, B. W3C, Filter Effects Module Level 1, `sepia(100%)`."""


def _number(value: float) -> str:
    """Plain decimal notation, nothing rounded away: 25, 12.5, 0.0000001."""
    return f"{Decimal(repr(float(value))):f}".removesuffix(".0")


def _point(image: Image.Image, functions: Sequence[Callable[[int], float]]) -> Image.Image:
    """Each colour channel through its own function, rounded and clipped; alpha is kept."""
    tables = [min(max(round(f(v)), 0), 255) for f in functions for v in range(256)]
    return image.point(tables + list(range(256)) * (len(image.getbands()) - 3))


def _matrix(image: Image.Image, rows: Sequence[Sequence[float]]) -> Image.Image:
    """A 3 x 3 matrix on (R, G, B), rounded and clipped; alpha is kept."""
    return _with_alpha_of(
        image, image.convert("RGB").convert("RGB", tuple(x for row in rows for x in (*row, 0.0)))
    )


def _alpha(image: Image.Image) -> Image.Image | None:
    return image.getchannel("A") if image.mode == "RGBA" else None


def _with_alpha_of(image: Image.Image, changed: Image.Image) -> Image.Image:
    if (alpha := _alpha(image)) is not None:
        changed.putalpha(alpha)
    return changed


def _grey(image: Image.Image) -> Image.Image:
    return _with_alpha_of(image, image.convert("RGB").convert("L").convert("RGB"))


def _trim(image: Image.Image) -> Image.Image:
    """Without white or transparent rows and columns around it; as it is where that is all."""
    red, green, blue = Ground(colour=(255, 255, 255))(image).split()
    darkest = ImageChops.darker(ImageChops.darker(red, green), blue)
    return image.crop(darkest.point([255] * NEAR_WHITE + [0] * (256 - NEAR_WHITE)).getbbox())


def _autocontrast(image: Image.Image) -> Image.Image:
    # One stretch of all three channels, so that hues stay; what is transparent has no vote.
    rgb = image.convert("RGB")
    return _with_alpha_of(image, ImageOps.autocontrast(rgb, mask=_alpha(image), preserve_tone=True))


def _equalise(image: Image.Image) -> Image.Image:
    return _with_alpha_of(image, ImageOps.equalize(image.convert("RGB"), mask=_alpha(image)))


_PLAIN: dict[str, Callable[[Image.Image], Image.Image]] = {
    "grey": _grey,
    "sepia": lambda image: _matrix(image, SEPIA),
    "invert": lambda image: _point(image, [lambda v: 255 - v] * 3),
    "mirror": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "flip upside down": lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    "autocontrast": _autocontrast,
    "equalise": _equalise,
}


@dataclass(frozen=True, kw_only=True)
class Plain:
    """An edit without an amount, by the name in `describe()`.

    grey: luma with the weights `LUMA`. sepia: the matrix `SEPIA`. invert: 255 - v. autocontrast:
    one linear stretch that brings the darkest luma to 0 and the lightest to 255. equalise: each
    channel's histogram made flat (`PIL.ImageOps.equalize`).
    """

    changes_size: ClassVar[bool] = False
    name: str

    def __call__(self, image: Image.Image) -> Image.Image:
        return _PLAIN[self.name](image)

    def describe(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True)
class Trim:
    """The white or transparent border cut away: white is `NEAR_WHITE` or more in every channel."""

    changes_size: ClassVar[bool] = True

    def __call__(self, image: Image.Image) -> Image.Image:
        return _trim(image)

    def describe(self) -> str:
        return "trim the white border"


TONES: dict[str, tuple[str, str]] = {
    "brightness": ("brighter", "darker"),
    "contrast": ("more contrast", "less contrast"),
    "colour": ("more colourful", "less colourful"),
    "warmth": ("warmer", "cooler"),
    "sharpness": ("sharper", "less sharp"),  # for less there is `Blur`
}
"""Quality → the words for more and less of it."""


@dataclass(frozen=True, kw_only=True)
class Tone:
    """More or less of a quality by `percent`, -100 to 1000. With f = 1 + percent / 100:

    brightness: f v. contrast: m + f (v - m), m the mean luma of visible pixels, rounded. colour:
    y + f (v - y), y the pixel's luma. These three as in Haeberli and Voorhies, "Image processing
    by interpolation and extrapolation", IRIS Universe 28 (1994). warmth: a gain of f on red and
    of 2 - f on blue, a von Kries diagonal, never below 0. sharpness: v + (f - 1) (v - b), b the
    picture blurred by a Gaussian of 2 px: unsharp masking.

    Raises `UserError` when made with a percentage out of range.
    """

    changes_size: ClassVar[bool] = False
    quality: Literal["brightness", "contrast", "colour", "warmth", "sharpness"]
    percent: float

    def __post_init__(self) -> None:
        least = 0 if self.quality == "sharpness" else -100
        if not least <= self.percent <= 1000:
            raise UserError(f"{self.describe()}: 1000 % more or 100 % less at most; ask for a smaller amount")

    def __call__(self, image: Image.Image) -> Image.Image:
        f = 1 + self.percent / 100
        if self.quality == "brightness":
            return _point(image, [lambda v: f * v] * 3)
        if self.quality == "contrast":
            visible = ImageStat.Stat(image.convert("RGB").convert("L"), _alpha(image))
            mean = round(visible.sum[0] / max(visible.count[0], 1))
            return _point(image, [lambda v: mean + f * (v - mean)] * 3)
        if self.quality == "colour":
            return _matrix(
                image, [[(1 - f) * w + f * (i == j) for j, w in enumerate(LUMA)] for i in range(3)]
            )
        if self.quality == "warmth":
            return _point(image, [lambda v: f * v, lambda v: v, lambda v: (2 - f) * v])
        blurred = _gaussian(image, 2).convert("RGB")
        return _with_alpha_of(image, Image.blend(blurred, image.convert("RGB"), f))

    def describe(self) -> str:
        return f"{_number(abs(self.percent))} % {TONES[self.quality][self.percent < 0]}"


def _gaussian(image: Image.Image, radius: float) -> Image.Image:
    """Standard deviation in pixels. Pillow's: three extended box blurs (Gwosdek et al. 2011)."""
    if image.mode != "RGBA":
        return image.filter(ImageFilter.GaussianBlur(radius))
    premultiplied = image.convert("RGBa")  # so that what is transparent gives no colour away
    return premultiplied.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")


@dataclass(frozen=True, kw_only=True)
class Blur:
    """A Gaussian of `amount` standard deviation, in pixels or in percent of the shorter side.

    Raises `UserError` when made with more than 1000 px or 100 %.
    """

    changes_size: ClassVar[bool] = False
    amount: float
    unit: Literal["px", "%"]

    def __post_init__(self) -> None:
        most = 1000 if self.unit == "px" else 100
        if not 0 <= self.amount <= most:
            raise UserError(f"{self.describe()}: a blur is {most} {self.unit} at most; ask for a smaller one")

    def __call__(self, image: Image.Image) -> Image.Image:
        return _gaussian(
            image, self.amount if self.unit == "px" else self.amount / 100 * min(image.width, image.height)
        )

    def describe(self) -> str:
        return f"blur {_number(self.amount)} {self.unit}"


@dataclass(frozen=True, kw_only=True)
class Posterise:
    """Each channel to `levels` evenly spaced values from 0 to 255, 2 to 64 of them.

    floor(v levels / 256) 255 / (levels - 1). Raises `UserError` when made with another number.
    """

    changes_size: ClassVar[bool] = False
    levels: int

    def __post_init__(self) -> None:
        if not 2 <= self.levels <= 64:
            raise UserError(f"{self.describe()}: give 2 to 64 levels")

    def __call__(self, image: Image.Image) -> Image.Image:
        return _point(image, [lambda v: v * self.levels // 256 * 255 / (self.levels - 1)] * 3)

    def describe(self) -> str:
        return f"posterise to {self.levels} levels"


@dataclass(frozen=True, kw_only=True)
class Ground:
    """Transparent parts on a plain colour; the result is RGB. An opaque picture stays as it is."""

    changes_size: ClassVar[bool] = False
    colour: RGBColour

    def __call__(self, image: Image.Image) -> Image.Image:
        if (alpha := _alpha(image)) is None:
            return image.copy()
        ground = Image.new("RGB", image.size, self.colour)
        ground.paste(image.convert("RGB"), mask=alpha)
        return ground

    def describe(self) -> str:
        return "on #{:02x}{:02x}{:02x} ground".format(*self.colour)


@dataclass(frozen=True, kw_only=True)
class Resize:
    """To a size, by Lanczos resampling. `first` and `second` are what `rule` says:

    "%": percent of both sides. "px": of the longer side, "px wide", "px high": of that side, the
    other one in proportion. "x": width and height, whatever the proportion.

    Raises `UserError` when made with no size or one above `MAX_SIDE`, and when called with a
    picture of which it would make one above `MAX_SIDE` or `MAX_PIXELS`.
    """

    changes_size: ClassVar[bool] = True
    rule: Literal["%", "px", "px wide", "px high", "x"]
    first: float
    second: int = 0

    def __post_init__(self) -> None:
        of_one_pixel = self.first / 100 if self.rule == "%" else self.first
        self._check(of_one_pixel, self.second if self.rule == "x" else of_one_pixel)

    def _check(self, *sides: float) -> None:
        if not all(0 < side <= MAX_SIDE for side in sides):
            raise UserError(f"{self.describe()}: a side must have 1 to {MAX_SIDE} px; ask for another size")

    def _size(self, width: int, height: int) -> tuple[float, float]:
        if self.rule == "x":
            return self.first, self.second
        whole = {"%": 100, "px": max(width, height), "px wide": width, "px high": height}[self.rule]
        return width * self.first / whole, height * self.first / whole

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = (max(round(side), 1) for side in self._size(*image.size))
        self._check(width, height)
        if width * height > MAX_PIXELS:
            raise UserError(
                f"{self.describe()}: {width} x {height} is more than {MAX_PIXELS:,} pixels; ask for less"
            )
        return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)

    def describe(self) -> str:
        if self.rule == "x":
            return f"resize to {_number(self.first)}x{self.second} px"
        return f"resize to {_number(self.first)} {self.rule}"


@dataclass(frozen=True, kw_only=True)
class Rotate:
    """Clockwise by `degrees`, above -180 and up to 180; negative ones turn the other way.

    Quarter turns move pixels and change none. Other angles are bicubic, and the picture grows
    to hold all of itself, with white corners (transparent ones for RGBA).
    """

    changes_size: ClassVar[bool] = True
    degrees: float

    def __call__(self, image: Image.Image) -> Image.Image:
        # Pillow turns quarters by transposing, and counts the other way round
        white = (255, 255, 255) if image.mode == "RGB" else None
        return image.rotate(-self.degrees, Image.Resampling.BICUBIC, expand=True, fillcolor=white)

    def describe(self) -> str:
        return f"rotate {_number(abs(self.degrees))} degrees {'anti' * (self.degrees < 0)}clockwise"


@dataclass(frozen=True, kw_only=True)
class Crop:
    """The largest part of these proportions (width : height), from the middle.

    Raises `UserError` when made with a ratio beyond 100 : 1.
    """

    changes_size: ClassVar[bool] = True
    ratio: Ratio

    def __post_init__(self) -> None:
        if min(self.ratio) < 1 or max(self.ratio) > 100 * min(self.ratio):
            raise UserError(f"{self.describe()}: proportions go from 1:100 to 100:1; ask for others")

    def __call__(self, image: Image.Image) -> Image.Image:
        across, down = self.ratio
        width = min(image.width, max(round(image.height * across / down), 1))
        height = min(image.height, max(round(image.width * down / across), 1))
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))

    def describe(self) -> str:
        return "crop to {}:{}".format(*self.ratio)
