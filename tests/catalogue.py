"""Every bad input of the catalogue (and its good neighbours) as files in a folder.

`write(folder)` returns {relative name: expected Reason, or None for a picture that must
decode}. Names of other kinds of trouble (links, names that are not UTF-8) are left to the
tests of listing: here the content is what is wrong.
"""

from __future__ import annotations

import struct
import zlib
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from llmvis.schema import Reason

HEIC = b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(64)
SVG = b"""<?xml version="1.0"?>\n<!-- drawn by hand -->\n<svg xmlns="http://www.w3.org/2000/svg"/>"""
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"
PDF = b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n%%EOF\n"
HTML = b"<!DOCTYPE html><html><body><h1>404</h1><svg></svg></body></html>"


def photo(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """A smooth RGB picture with some noise: compresses like a photograph, differs by seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noise = rng.integers(-9, 10, smooth.shape)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """`image` in Pillow's format `kind`."""
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """One PNG chunk with its length and checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, raw: bytes, *extra: bytes) -> bytes:
    """A PNG made by hand: `raw` are the filtered scan lines, `extra` chunks go before IDAT."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", png_chunk(b"IHDR", head), *extra]
    return b"".join([*parts, png_chunk(b"IDAT", zlib.compress(raw, 9)), png_chunk(b"IEND", b"")])


def gradient16() -> np.ndarray:
    """`uint16 (16, 256)`: 0 to 65535 from left to right."""
    return np.tile(np.linspace(0, 65535, 256).round().astype(np.uint16), (16, 1))


@cache
def bomb(side: int) -> bytes:
    """A valid PNG of `side` x `side` one-bit pixels, a few kilobytes long."""
    row = b"\0" * (1 + (side + 7) // 8)
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    body = b"".join([*(packer.compress(row * 500) for _ in range(side // 500)), packer.flush()])
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            png_chunk(b"IHDR", head),
            png_chunk(b"IDAT", body),
            png_chunk(b"IEND", b""),
        )
    )


def _big_text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "A" * 3_000_000, zip=True)
    return info


def _translucent(mode: str) -> Image.Image:
    image = photo().convert("RGBA")
    alpha = np.zeros((64, 96), np.uint8)
    alpha[:, 48:] = 255
    image.putalpha(Image.fromarray(alpha))
    return image.convert(mode)


def _palette_trns() -> bytes:
    image = photo().quantize(16)
    return encoded(image, "PNG", transparency=bytes([0, 128] + [255] * 14))


def _animation(kind: str) -> bytes:
    frames = [photo(seed=s) for s in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)


def good() -> dict[str, bytes]:
    """Unusual pictures that must decode."""
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = Image.fromarray(gradient16())
    return {
        "plain.jpg": encoded(photo(), "JPEG"),
        "progressive.jpg": encoded(photo(), "JPEG", progressive=True),
        "cmyk.jpg": encoded(photo().convert("CMYK"), "JPEG"),
        "grey.jpg": encoded(photo().convert("L"), "JPEG"),
        "turned.jpg": encoded(photo(), "JPEG", exif=exif),
        "broken exif.jpg": encoded(photo(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"),
        "plain.png": encoded(photo(), "PNG"),
        "grey16.png": encoded(grey, "PNG"),
        "grey16-intel.tif": encoded(grey, "TIFF"),
        "grey16-motorola.tif": encoded(Image.fromarray(gradient16().astype(">u2")), "TIFF"),
        "rgba.png": encoded(_translucent("RGBA"), "PNG"),
        "la.png": encoded(_translucent("LA"), "PNG"),
        "palette alpha.png": _palette_trns(),
        "one bit.png": encoded(photo().convert("1"), "PNG"),
        "animated.gif": _animation("GIF"),
        "animated.webp": _animation("WEBP"),
        "animated.png": _animation("PNG"),
        "plain.webp": encoded(photo(), "WEBP"),
        "plain.avif": encoded(photo(), "AVIF"),
        "plain.bmp": encoded(photo(), "BMP"),
        "deflate.tiff": encoded(photo(), "TIFF", compression="tiff_adobe_deflate"),
        "plain.ppm": encoded(photo(), "PPM"),
        "a PNG by content.jpg": encoded(photo(), "PNG"),
        "no extension": encoded(photo(), "JPEG"),
        "sub/日本語 \N{ROSE}.png": encoded(photo(), "PNG"),
        "one pixel.png": encoded(photo(1, 1), "PNG"),
    }


def bad() -> dict[str, tuple[bytes, Reason]]:
    """Contents that must become dead letters, and why."""
    jpeg, plain = encoded(photo(), "JPEG"), encoded(photo(), "PNG")
    webp, gif = encoded(photo(), "WEBP"), encoded(photo(), "GIF")
    tiff = encoded(photo(), "TIFF", compression="tiff_adobe_deflate")
    float_tiff = encoded(Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF")
    int_tiff = encoded(Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8)), "TIFF")
    scrambled = bytearray(plain)
    scrambled[60:90] = bytes(30)
    rng = np.random.default_rng(7)
    contents: dict[Reason, dict[str, bytes]] = {
        Reason.EMPTY: {"empty.jpg": b"", "empty.png": b""},
        Reason.NOT_AN_IMAGE: {
            "page.jpg": HTML,
            "text.png": b"BMW makes cars; this is not a bitmap.\n",
            "pnm like.txt.jpg": b"P5 is the name of a pentium\n",
            "random.jpg": b"\x00" + rng.bytes(5000),
            "archive.jpg": b"PK\x03\x04" + bytes(100),
            "film.jpg": b"\x00\x00\x00\x18ftypisom\x00\x00\x02\x00isomiso2" + bytes(64),
        },
        Reason.UNSUPPORTED_FORMAT: {
            "drawing.svg": SVG,
            "drawing.jpg": SVG,
            "postscript.jpg": EPS,
            "document.png": PDF,
            "phone.heic": HEIC,
            "phone.jpg": HEIC,
            "float.tif": float_tiff,
            "int32.tif": int_tiff,
        },
        Reason.TOO_LARGE: {
            "bomb of 100 megapixels.png": bomb(10_000),
            "bomb of 65500 squared.png": bomb(65_500),
            "text bomb.png": encoded(photo(), "PNG", pnginfo=_big_text()),
        },
        Reason.TRUNCATED: {
            "half.jpg": jpeg[: len(jpeg) // 2],
            "header only.jpg": jpeg[:40],
            "three bytes.jpg": jpeg[:3],
            "half.png": plain[: len(plain) // 2],
            "header only.png": plain[:20],
            "half.webp": webp[: len(webp) // 2],
            "half.gif": gif[: len(gif) // 2],
            "half.tif": tiff[: len(tiff) // 2],
        },
        Reason.CORRUPT: {
            "no pixels.png": png(0, 0, 8, 2, b""),
            "no pixels.gif": b"GIF89a\0\0\0\0\0\0\0;",
            "scrambled.png": bytes(scrambled),
        },
    }
    return {name: (data, reason) for reason, files in contents.items() for name, data in files.items()}


def write(folder: Path) -> dict[str, Reason | None]:
    """Write the whole catalogue under `folder`; gives what each file must come to."""
    expected: dict[str, Reason | None] = {}
    files = {name: (data, None) for name, data in good().items()} | bad()
    for name, (data, reason) in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        expected[name] = reason
    return expected
