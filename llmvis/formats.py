"""What a file's bytes say they are: which image format, and whether the file ends too early.

Looks at signatures and container lengths only; decodes nothing and never looks at a name.
It does not know Pillow.
"""

from __future__ import annotations

import re
from typing import Literal

from llmvis.schema import Reason

_OTHER_IMAGES = (
    (b"%!PS", "EPS"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"%PDF", "PDF"),
    (b"8BPS", "PSD"),
    (b"\x00\x00\x01\x00", "ICO"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\x00\x00\x00\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\xd7\xcd\xc6\x9a", "WMF"),
    (b"DDS ", "DDS"),
    (b"qoif", "QOI"),
    (b"v/1\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"AT&TFORM", "DjVu"),
    (b"gimp xcf", "XCF"),
    (b"SIMPLE  =", "FITS"),
    (b"/* XPM */", "XPM"),
    (b"PF\n", "PFM"),
    (b"Pf\n", "PFM"),
)  # images of a kind we do not decode: first bytes, name
_HEIF_BRANDS = frozenset((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"))
_BMP_HEADERS = frozenset((12, 16, 40, 52, 56, 64, 108, 124))  # sizes that a BMP info header can have
_PNM = re.compile(rb"P[1-6]\s(?:\s|#[^\n]*\n)*\d")
_SVG = re.compile(rb"<(?:\w{1,32}:)?svg[\s>/]")


def sniff(data: bytes) -> tuple[Reason | None, str]:
    """What the first bytes announce.

    Returns:
        `(None, kind)` for a format that we decode, by Pillow's name (`"JPEG"`, …);
        `(Reason.UNSUPPORTED_FORMAT, name)` for another kind of image;
        `(Reason.NOT_AN_IMAGE, description)` for the rest.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return None, "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return None, "PNG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return None, "GIF"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return None, "WEBP"
    if data.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return None, "TIFF"
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in _BMP_HEADERS:
        return None, "BMP"
    if data[4:8] == b"ftyp":
        size = min(int.from_bytes(data[:4], "big"), 256)
        brands = {data[8:12], *(data[i : i + 4] for i in range(16, size, 4))}
        if brands & {b"avif", b"avis"}:
            return None, "AVIF"
        if brands & _HEIF_BRANDS:
            return Reason.UNSUPPORTED_FORMAT, "HEIC"
    if _PNM.match(data[:512]):
        return None, "PPM"
    for magic, name in _OTHER_IMAGES:
        if data.startswith(magic):
            return Reason.UNSUPPORTED_FORMAT, name
    if data[128:132] == b"DICM":
        return Reason.UNSUPPORTED_FORMAT, "DICOM"
    if _is_svg(data[:65536]):
        return Reason.UNSUPPORTED_FORMAT, "SVG"
    return Reason.NOT_AN_IMAGE, f"begins with {data[:24]!r}"


def _is_svg(head: bytes) -> bool:
    """Whether the root element is `<svg>`, after a declaration, comments and a document type."""
    head = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    while head.startswith((b"<?", b"<!--", b"<!DOCTYPE svg", b"<!doctype svg")):
        ends = b"?>" if head[1:2] == b"?" else b"-->" if head[2:4] == b"--" else b">"
        if ends == b">" and 0 <= head.find(b"[") < head.find(b">"):
            ends = b"]>"
        _, found, head = head.partition(ends)
        if not found:
            return False
        head = head.lstrip()
    return bool(_SVG.match(head))


def ends_early(data: bytes, kind: str) -> bool:
    """Whether the container announces more bytes than there are (asked of failed files only)."""
    n = len(data)
    match kind:
        case "JPEG":
            return not data.rstrip(b"\0").endswith(b"\xff\xd9")
        case "PNG":
            return b"IEND\xaeB`\x82" not in data[-1024:]
        case "GIF":
            return not data.rstrip(b"\0").endswith(b"\x3b")
        case "WEBP":
            return n < 12 or int.from_bytes(data[4:8], "little") + 8 > n
        case "BMP":
            return n < 26 or int.from_bytes(data[2:6], "little") > n
        case "TIFF":
            return _tiff_ends_early(data)
        case "AVIF":
            at = 0
            while at + 8 <= n:
                size = int.from_bytes(data[at : at + 4], "big")
                if size in (0, 1):  # to the end of the file; 64-bit: not worth a parser here
                    return False
                at += max(size, 8)
            return at != n
    return False


_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}


def _tiff_ends_early(data: bytes) -> bool:
    """Whether the first directory, a value or a strip of pixels lies beyond the end (not BigTIFF)."""
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], order)

    start = number(4, 4)
    entries = number(start, 2)
    if len(data) < 8 or start + 2 + 12 * entries > len(data):
        return True
    strips: dict[int, list[int]] = {}
    for at in range(start + 2, start + 2 + 12 * entries, 12):
        tag, size, count = number(at, 2), _TIFF_SIZES.get(number(at + 2, 2), 1), number(at + 4, 4)
        values = at + 8 if size * count <= 4 else number(at + 8, 4)
        if values + size * count > len(data):
            return True
        if tag in (273, 279, 324, 325):  # offsets and lengths of strips or tiles
            strips[tag] = [number(values + i * size, size) for i in range(count)]
    return any(
        offset + length > len(data)
        for offsets, lengths in ((273, 279), (324, 325))
        for offset, length in zip(strips.get(offsets, []), strips.get(lengths, []), strict=False)
    )
