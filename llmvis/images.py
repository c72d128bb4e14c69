"""Untrusted bytes → an upright 8-bit RGB or RGBA picture, or a reason why not; thumbnails and contact sheets.

`decode` is the one door for pictures. It looks at content and never at a file name, asks
Pillow for exactly the format that the first bytes announce (so PostScript named `.jpg` never
reaches Ghostscript), checks bytes and pixels before it decodes, and gives `Decoded` or
raises `ImageError` with a `Reason`: no other exception, no warning.

What it does not know: colour profiles (pixel values are taken for sRGB), later frames of an
animation or pages of a TIFF (the first one counts), what libtiff itself prints to standard
error about a broken TIFF, files and storage, torch, Ray.
"""

from __future__ import annotations

import threading
import unicodedata
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont, UnidentifiedImageError

from llmvis import formats
from llmvis.schema import ItemError, Reason

RGBColour = tuple[int, int, int]

MAX_PIXELS = 89_478_485
"""Default cap: Pillow's own warning threshold, 256 MiB as RGB. With an alpha channel to
composite and an EXIF turn, a decode task at the cap stays below 1.5 GiB.
Pillow refuses more than twice this number whatever `max_pixels` says."""

MAX_BYTES = 256 * 2**20
"""Default cap on the encoded file; an 8-bit RGB picture at `MAX_PIXELS` fits even uncompressed."""

_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # EXIF orientation → what makes it upright


class ImageError(ItemError):
    """A picture that can't be had: `reason` is for the ledger, `detail` for a person."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, "".join(c if c.isprintable() else " " for c in detail)[:200])


@dataclass(frozen=True)
class Decoded:
    """An upright RGB (or, where transparency was to be kept, RGBA) picture, and its full width and height in pixels.

    `image` may be smaller than `width` x `height` where `decode` was given a `target`.
    It carries no metadata: no EXIF (no place, no camera), no colour profile.
    """

    image: Image.Image
    width: int
    height: int


class _QuietPillow:
    """Silence warnings that come from Pillow, for all threads that are inside at the time.

    `warnings.catch_warnings` saves and restores process-wide state; two threads that
    overlap would leave the wrong filters behind. So the first one in saves and the last
    one out restores.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._saved: warnings.catch_warnings[None] | None = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._saved is not None:
                self._saved.__exit__(None, None, None)
                self._saved = None


_quiet_pillow = _QuietPillow()


def decode(
    data: bytes,
    *,
    max_pixels: int = MAX_PIXELS,
    max_bytes: int = MAX_BYTES,
    background: RGBColour | None = (255, 255, 255),
    target: int | None = None,
) -> Decoded:
    """Decode an encoded picture to upright 8-bit RGB, or to RGBA.

    Formats: JPEG (MPO too), PNG, GIF, WebP, TIFF, BMP, AVIF, PNM; the first frame of animations.
    EXIF orientation is applied; transparency is composited on `background`; 16-bit grey is
    rescaled, full scale to full scale.

    Args:
        data: the file's content.
        max_pixels: cap on width x height, checked before any pixel is decoded.
        max_bytes: cap on `len(data)`.
        background: the colour under transparent pixels; None keeps them, and the image is RGBA.
        target: shortest side in pixels that the caller will resize to. A large JPEG is then
            decoded at 1/2, 1/4 or 1/8 scale, never below twice the target, two to three times
            faster; the whole file is still read and checked. Other formats ignore it.
            Twice, because embeddings notice: EfficientNet-Lite0 features of two photographs
            had a cosine of 0.977-0.996 with those of a full decode when decoded down to the
            target itself, and of 0.9985 or more at twice the target.

    Raises:
        ImageError: with `.reason` one of EMPTY, TOO_LARGE, NOT_AN_IMAGE,
            UNSUPPORTED_FORMAT, TRUNCATED, CORRUPT.
    """
    if not data:
        raise ImageError(Reason.EMPTY, "no bytes")
    if len(data) > max_bytes:
        raise ImageError(Reason.TOO_LARGE, f"{len(data)} bytes, the cap is {max_bytes}")
    reason, kind = formats.sniff(data)
    if reason is not None:
        raise ImageError(reason, kind)
    with _quiet_pillow:
        try:
            return _decode(data, kind, max_pixels, background, target)
        except ImageError:
            raise
        except (MemoryError, Image.DecompressionBombError) as e:
            raise ImageError(Reason.TOO_LARGE, str(e) or "not enough memory to decode it") from e
        except Exception as e:  # Pillow's plugins raise anything on hostile bytes
            raise _explain(e, data, kind) from e


def _decode(
    data: bytes, kind: str, max_pixels: int, background: RGBColour | None, target: int | None
) -> Decoded:
    with Image.open(BytesIO(data), formats=[kind]) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(
                Reason.TOO_LARGE, f"{width} x {height} = {width * height} pixels, the cap is {max_pixels}"
            )
        if target is not None and kind == "JPEG":
            image.draft(None, (max(2 * target, 1), max(2 * target, 1)))
        image.load()
        orientation = _orientation(image)  # after load: in a PNG it may come last
        turn = _TURN.get(orientation)
        flat = _flattened(image, background)
        if kind == "TIFF":  # Pillow has already turned it, and changed `size`
            width, height = flat.size
        if turn is not None:
            flat = flat.transpose(turn)
            if orientation >= 5:
                width, height = height, width
        elif flat is image:
            flat = image.copy()  # a plain Image, which holds neither file nor EXIF
        flat.info.clear()
        return Decoded(flat, width, height)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1-8; a broken EXIF block is no reason to lose the picture."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001 - Pillow's EXIF parser raises anything on hostile bytes
        return 1
    return value if isinstance(value, int) else 1


def _flattened(image: Image.Image, background: RGBColour | None) -> Image.Image:
    """Any mode → 8-bit RGB on a background, or RGBA without one."""
    if image.mode == "F":
        raise ImageError(Reason.UNSUPPORTED_FORMAT, "floating-point pixels have no stated range")
    if image.mode == "LAB":
        raise ImageError(Reason.UNSUPPORTED_FORMAT, "L*a*b* pixels")
    if image.mode == "I" or image.mode.startswith("I;"):
        image = _eight_bits(image)
    if background is None:
        return image if image.mode == "RGBA" else image.convert("RGBA")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    canvas = Image.new("RGB", rgba.size, background)
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return canvas


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey (`I;16`, `I;16B`, `I;12` or 16-bit values in mode `I`) → `L`, or `LA` with a colour key."""
    bits, white_is_zero = 16, False
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        bits = int(tags.get(258, (1,))[0])
        white_is_zero = tags.get(262) == 0
        signed = tags.get(339, (1,))[0] != 1
        if bits > 16 or signed:
            raise ImageError(Reason.UNSUPPORTED_FORMAT, f"{bits}-bit {'signed ' * signed}integer pixels")
    full = 2**bits - 1
    values = np.asarray(image).clip(0, full)
    shades = ((np.arange(full + 1) * 255 + full // 2) // full).astype(np.uint8)
    grey = shades[values]
    if white_is_zero:
        grey = 255 - grey
    luma = Image.fromarray(grey)
    key = image.info.get("transparency")
    if isinstance(key, int):
        luma.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return luma


def _explain(error: Exception, data: bytes, kind: str) -> ImageError:
    said = " ".join(str(error).split())
    if isinstance(error, UnidentifiedImageError):
        said = f"{kind} that can't be opened"  # Pillow's own words name a BytesIO
    elif not said:
        said = type(error).__name__
    lower = said.lower()
    if "too large" in lower or "too much memory" in lower:
        return ImageError(Reason.TOO_LARGE, said)
    if "truncated" in lower or "unexpected end" in lower or formats.ends_early(data, kind):
        return ImageError(Reason.TRUNCATED, said)
    return ImageError(Reason.CORRUPT, said)


def square(image: Image.Image, side: int) -> Image.Image:
    """An RGB picture fitted whole into `side` × `side` pixels, centred on white."""
    *size, left, top = _fitted(image.width, image.height, side)
    small = image
    if image.size != tuple(size):
        small = image.resize((size[0], size[1]), Image.Resampling.BICUBIC, reducing_gap=3.0)
    out = Image.new("RGB", (side, side), (255, 255, 255))
    out.paste(small, (left, top))
    return out


def square_mask(mask: np.ndarray, width: int, height: int, side: int) -> np.ndarray:
    """The mask of a picture of `width` × `height`, fitted as `square` fits that one.

    A mask, bool (h, w), has its picture's shape at any resolution. Gives bool (S, S), True in every
    pixel that the mask touches: thin lines are not lost. Raises `ValueError` for another shape.
    """
    if mask.ndim != 2 or abs(mask.shape[0] * width - mask.shape[1] * height) > max(height, width):
        raise ValueError(
            f"a mask of {mask.shape} does not fit a picture of {(height, width)}: give it that shape"
        )
    *size, left, top = _fitted(width, height, side)
    share = Image.fromarray(mask.astype(np.float32)).resize((size[0], size[1]), Image.Resampling.BOX)
    out = np.zeros((side, side), bool)
    out[top : top + size[1], left : left + size[0]] = np.asarray(share) > 0
    return out


def _fitted(width: int, height: int, side: int) -> tuple[int, int, int, int]:
    """Width, height, left and top of a picture in its square."""
    scale = side / max(width, height)
    w, h = max(1, round(width * scale)), max(1, round(height * scale))
    return w, h, (side - w) // 2, (side - h) // 2


def thumbnail(image: Image.Image, side: int) -> bytes:
    """RGB picture → WebP bytes, at most `side` pixels on its longer side, without metadata."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    small.info.clear()
    out = BytesIO()
    small.save(out, "WEBP", quality=85, method=4)
    return out.getvalue()


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int, cell: int, *, title: str = ""
) -> Image.Image:
    """A grid of pictures with one caption line under each, on a light background.

    Args:
        images: RGB pictures of any size; each is fitted into a `cell` x `cell` square.
        captions: one for each picture, any text; what does not fit ends in an ellipsis.
        columns: pictures in a row, at least 1.
        cell: side of a picture's square in pixels, at least 32.
        title: a line above the grid, if any.

    Returns:
        An RGB picture. A glyph that no font at hand has shows as a box.

    Raises:
        ValueError: when lengths differ or a number is too small.
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images but {len(captions)} captions")
    if columns < 1 or cell < 32:
        raise ValueError(f"columns must be >= 1 and cell >= 32, got {columns} and {cell}")
    size = max(cell // 11, 10)
    gap, line = max(cell // 12, 6), size * 2
    columns = max(min(columns, len(images)), 1)
    rows = -(-len(images) // columns)
    head = size * 3 if title else 0
    width = gap + columns * (cell + gap)
    sheet = Image.new("RGB", (width, head + gap + rows * (cell + line + gap)), (244, 244, 242))
    draw = ImageDraw.Draw(sheet)
    if title:
        text, font = _lettering(title, size * 4 // 3)
        text = _ellipsised(text, font, width - 2 * gap)
        draw.text((gap, (head + gap) / 2 + gap / 3), text, fill=(29, 29, 31), font=font, anchor="lm")
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x = gap + i % columns * (cell + gap)
        y = head + gap + i // columns * (cell + line + gap)
        draw.rounded_rectangle((x, y, x + cell - 1, y + cell - 1), radius=gap // 2, fill=(255, 255, 255))
        inner = cell - 2 * (gap // 2)
        fitted = image.convert("RGB")
        scale = min(inner / fitted.width, inner / fitted.height)
        w, h = max(round(fitted.width * scale), 1), max(round(fitted.height * scale), 1)
        fitted = fitted.resize((w, h), Image.Resampling.LANCZOS, reducing_gap=3.0)
        sheet.paste(fitted, (x + (cell - w) // 2, y + (cell - h) // 2))
        text, font = _lettering(caption, size)
        text = _ellipsised(text, font, cell)
        left = x + (cell - font.getlength(text)) / 2
        draw.text((left, y + cell + line / 2), text, fill=(70, 70, 74), font=font, anchor="lm")
    return sheet


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_DROPPED = frozenset(("Mn", "So", "Sk"))  # accents and symbols
_SYSTEM_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "DejaVuSans.ttf",
    "Arial Unicode.ttf",
    "NotoSansHebrew-Regular.ttf",
)


@lru_cache(maxsize=64)
def _font(name: str, size: int) -> _Font | None:
    """A system font by file name, Pillow's own for `""`, None where there is no such font."""
    try:
        return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)
    except OSError:
        return None


def _covers(font: _Font, text: str) -> bool:
    missing = bytes(font.getmask("\U0010ffff"))
    return all(c == " " or bytes(font.getmask(c)) != missing for c in text)


def _lettering(text: str, size: int) -> tuple[str, _Font]:
    """The text as one printable line, and a font that can show it.

    Pillow's own font knows ASCII. For the rest we look among the system's fonts; where none
    will do, accents and symbols are dropped, and what is still unknown shows as a box.
    """
    text = " ".join(text[:300].encode("utf-8", "replace").decode().split())
    text = "".join(c for c in text if c.isprintable())
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) not in _DROPPED)
    for line in (text, " ".join(plain.split())):
        for name in ("", *_SYSTEM_FONTS):
            font = _font(name, size)
            if font is not None and _covers(font, line):
                return line, font
    return text, _font("NotoSansCJK-Regular.ttc", size) or ImageFont.load_default(size)


def _ellipsised(text: str, font: _Font, width: int) -> str:
    """The longest beginning of a line that fits into `width` pixels."""
    if font.getlength(text) <= width:
        return text
    low, high = 0, len(text)
    while low < high:  # the longest prefix that fits with its ellipsis
        middle = (low + high + 1) // 2
        if font.getlength(text[:middle].rstrip() + "…") <= width:
            low = middle
        else:
            high = middle - 1
    return text[:low].rstrip() + "…"
