"""Decoding: every input of the catalogue, every turn, every depth; and bytes that nobody foresaw."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from llmvis.images import Decoded, ImageError, _quiet_pillow, contact_sheet, decode, thumbnail
from llmvis.schema import Reason
from tests import catalogue
from tests.catalogue import encoded, photo

ROOT = Path(__file__).parents[1]
GOOD = catalogue.good()
BAD = catalogue.bad()


def array(decoded: Decoded) -> np.ndarray:
    return np.asarray(decoded.image).astype(int)


def outcome(data: bytes, target: int | None = None) -> Reason | tuple[int, int]:
    try:
        decoded = decode(data, target=target)
    except ImageError as e:
        return e.reason
    assert decoded.image.mode == "RGB"
    return decoded.width, decoded.height


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_its_reason(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert caught.value.reason is reason
    assert caught.value.detail.isprintable() and 0 < len(caught.value.detail) <= 200


@pytest.mark.parametrize("name", GOOD)
def test_unusual_pictures_decode(name: str) -> None:
    decoded = decode(GOOD[name])
    assert decoded.image.mode == "RGB"
    assert decoded.image.size == (decoded.width, decoded.height)
    assert not decoded.image.info and not decoded.image.getexif()
    assert len(np.unique(array(decoded))) > 1 or name == "one pixel.png"


def test_the_catalogue_on_disk_is_the_one_tested(tmp_path: Path) -> None:
    expected = catalogue.write(tmp_path)
    assert set(expected) == set(GOOD) | set(BAD)
    for name, reason in expected.items():
        found = outcome((tmp_path / name).read_bytes())
        assert (found if isinstance(found, Reason) else None) is reason, name


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = photo()
    data = encoded(source, kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB")
    decoded = decode(data)
    assert (decoded.width, decoded.height) == ((96, 64) if orientation < 5 else (64, 96))
    assert np.array_equal(array(decoded), np.asarray(upright))
    turned = [source.transpose(t) for t in Image.Transpose] + [source]
    gaps = [
        np.abs(array(decoded) - np.asarray(t).astype(int)).mean()
        for t in turned
        if t.size == decoded.image.size
    ]
    assert min(gaps) < 12 < max(gaps)  # one of the eight turns, and turns differ


@pytest.mark.parametrize("name", ["grey16.png", "grey16-intel.tif", "grey16-motorola.tif"])
def test_sixteen_bit_grey_is_rescaled_not_clipped(name: str) -> None:
    found = array(decode(GOOD[name]))
    wanted = catalogue.gradient16() / 257
    assert np.abs(found - wanted[..., None]).max() <= 0.5
    assert len(np.unique(found)) == 256


def test_sixteen_bit_grey_through_other_doors() -> None:
    grey = catalogue.gradient16()
    pnm = b"P5 256 16 65535\n" + grey.astype(">u2").tobytes()
    assert np.abs(array(decode(pnm))[..., 0] - grey / 257).max() <= 0.5
    tiff = encoded(Image.fromarray(grey), "TIFF", tiffinfo={262: 0})  # white is zero
    assert np.abs(array(decode(tiff))[..., 0] - (255 - grey / 257)).max() <= 0.5
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in grey)
    keyed = catalogue.png(256, 16, 16, 0, raw, catalogue.png_chunk(b"tRNS", b"\0\0"))
    found = array(decode(keyed, background=(9, 8, 7)))
    assert found[0, 0].tolist() == [9, 8, 7] and found[0, 255].tolist() == [255] * 3


@pytest.mark.parametrize("name", ["rgba.png", "la.png"])
@pytest.mark.parametrize("colour", [(255, 255, 255), (10, 20, 30)])
def test_alpha_is_composited_on_the_background(name: str, colour: tuple[int, int, int]) -> None:
    found = array(decode(GOOD[name], background=colour))
    assert (found[:, :48] == colour).all()
    solid = np.asarray(photo().convert("RGBA" if name[0] == "r" else "L").convert("RGB"))
    assert np.array_equal(found[:, 48:], solid[:, 48:])


def test_palette_transparency_is_composited() -> None:
    indexed = Image.open(BytesIO(GOOD["palette alpha.png"]))
    index = np.asarray(indexed)
    colours = np.asarray(indexed.getpalette()).reshape(-1, 3)[index]
    found = array(decode(GOOD["palette alpha.png"], background=(0, 255, 0)))
    assert (index == 0).any() and (index == 1).any()
    assert (found[index == 0] == (0, 255, 0)).all()
    half = colours[index == 1] * 128 / 255 + np.array((0, 255, 0)) * 127 / 255
    assert np.abs(found[index == 1] - half).max() <= 1
    assert np.array_equal(found[index > 1], colours[index > 1])


def test_without_a_background_transparency_is_kept() -> None:
    found = decode(GOOD["rgba.png"], background=None).image
    assert found.mode == "RGBA"
    assert (np.asarray(found)[:, :48, 3] == 0).all() and (np.asarray(found)[:, 48:, 3] == 255).all()
    for name, data in GOOD.items():
        with_alpha = decode(data, background=None)
        assert with_alpha.image.mode == "RGBA" and not with_alpha.image.info, name
        canvas = Image.new("RGBA", with_alpha.image.size, (255, 255, 255, 255))
        flat = np.asarray(Image.alpha_composite(canvas, with_alpha.image).convert("RGB")).astype(int)
        assert np.abs(flat - array(decode(data))).max() <= 1, name


@pytest.mark.parametrize("name", ["animated.gif", "animated.webp", "animated.png"])
def test_first_frame_of_an_animation(name: str) -> None:
    found = array(decode(GOOD[name]))
    gaps = [np.abs(found - np.asarray(photo(seed=s)).astype(int)).mean() for s in range(3)]
    assert gaps[0] < 15 < min(gaps[1:])


def test_cmyk_keeps_its_colours() -> None:
    found = array(decode(GOOD["cmyk.jpg"]))
    assert np.abs(found - np.asarray(photo()).astype(int)).mean() < 12


def test_caps_are_inclusive_and_settable() -> None:
    data = GOOD["plain.png"]
    decode(data, max_pixels=96 * 64, max_bytes=len(data))
    for caps in ({"max_pixels": 96 * 64 - 1}, {"max_bytes": len(data) - 1}):
        with pytest.raises(ImageError) as caught:
            decode(data, **caps)
        assert caught.value.reason is Reason.TOO_LARGE


def test_a_bomb_costs_no_memory() -> None:
    code = """
import resource
from llmvis.images import ImageError, decode
from tests.catalogue import bomb, good
decode(good()["plain.png"])
data = bomb(10_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode(data)
except ImageError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 20_000  # KiB; decoding it would take 12 MB as bits and 300 MB as RGB


@pytest.mark.parametrize("name", ["plain.jpg", "progressive.jpg", "plain.png", "plain.webp", "animated.gif"])
def test_a_truncated_file_never_gives_another_picture(name: str) -> None:
    data = GOOD[name]
    whole = array(decode(data))
    failed = 0
    for end in range(12, len(data), max(len(data) // 60, 1)):
        try:
            assert np.array_equal(array(decode(data[:end])), whole), end
        except ImageError as e:
            assert e.reason is Reason.TRUNCATED, (end, e)
            failed += 1
    assert failed > 20


def broken(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    if rng.random() < 0.3:
        changed = changed[: rng.integers(1, len(changed))]
    for _ in range(rng.integers(1, 6)):
        changed[rng.integers(0, len(changed))] = rng.integers(0, 256)
    return bytes(changed)


FORMATS = [
    "plain.jpg",
    "progressive.jpg",
    "plain.png",
    "plain.webp",
    "animated.gif",
    "deflate.tiff",
    "turned.jpg",
]


def test_broken_bytes_give_a_picture_or_an_image_error() -> None:
    rng = np.random.default_rng(20261123)
    seen = {type(outcome(broken(GOOD[FORMATS[i % len(FORMATS)]], rng))) for i in range(300)}
    assert seen == {tuple, Reason}


def test_draft_decoding_fails_exactly_where_full_decoding_fails() -> None:
    rng = np.random.default_rng(5)
    sources = [encoded(photo(400, 300), "JPEG", progressive=p) for p in (False, True)]
    outcomes = set()
    for i in range(200):
        data = broken(sources[i % 2], rng)
        full = outcome(data)
        assert outcome(data, target=18) == full
        outcomes.add(full)
    assert len(outcomes) > 2


def test_draft_decoding_is_smaller_but_never_below_twice_the_target() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    source = photo(1600, 1000)
    data = encoded(source, "JPEG", exif=exif)
    full = decode(data)
    assert full.image.size == (full.width, full.height) == (1000, 1600)
    for target, size in ((62, (125, 200)), (63, (250, 400)), (250, (500, 800)), (251, (1000, 1600))):
        small = decode(data, target=target)
        assert (small.width, small.height) == (1000, 1600)
        assert small.image.size == size
        fair = np.asarray(full.image.resize(size, Image.Resampling.BOX)).astype(int)
        assert np.abs(array(small) - fair).mean() < 2


def test_warnings_stay_inside_and_filters_come_back_with_threads() -> None:
    noisy = encoded(photo(), "TIFF")[:-3] + b"\0\0\0"
    noisy = noisy[:12] + b"\xff" + noisy[13:]
    loud = encoded(Image.new("1", (10_000, 9_000)), "PNG")  # Pillow warns above 89.5 megapixels
    with warnings.catch_warnings(record=True) as plain:
        warnings.simplefilter("always")
        Image.open(BytesIO(loud)).close()
    assert plain  # the fault fires
    before = list(warnings.filters)
    found: list[object] = []

    def work() -> None:
        found.extend([outcome(loud), outcome(noisy), outcome(GOOD["plain.jpg"])])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(found) == 24 and found.count(Reason.TOO_LARGE) == 8
    assert list(warnings.filters) == before


def test_silence_lasts_until_the_last_one_is_out() -> None:
    def warn() -> None:
        warnings.warn_explicit("from Pillow", UserWarning, "Image.py", 1, module="PIL.Image")

    with _quiet_pillow:
        with _quiet_pillow:
            warn()
        warn()
        with pytest.raises(UserWarning):  # other people's warnings are not ours to silence
            warnings.warn_explicit("from elsewhere", UserWarning, "other.py", 1, module="other")
    with pytest.raises(UserWarning):
        warn()


def test_only_the_announced_format_is_tried() -> None:
    """Pillow by itself would open this as a Kodak Photo CD, whose magic lies at byte 2048."""
    disguised = b"\xff\xd8\xff".ljust(2048, b"\0") + b"PCD_IPI".ljust(1_000_000, b"\0")
    with Image.open(BytesIO(disguised)) as image:
        assert image.format == "PCD"
    with pytest.raises(ImageError):
        decode(disguised)


def test_image_error_survives_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(ImageError(Reason.CORRUPT, "a\nb\0" + "x" * 900)))
    assert error.reason is Reason.CORRUPT
    assert error.detail.startswith("a b x") and len(error.detail) == 200


def test_thumbnail_is_small_and_carries_no_metadata() -> None:
    exif = Image.Exif()
    exif[0x010F] = "SECRET CAMERA"
    image = Image.open(BytesIO(encoded(photo(900, 300), "JPEG", exif=exif)))
    data = thumbnail(image, 120)
    small = Image.open(BytesIO(data))
    assert small.format == "WEBP" and small.size == (120, 40)
    assert b"SECRET" not in data and not small.getexif()
    assert thumbnail(image, 120) == data
    assert Image.open(BytesIO(thumbnail(photo(30, 20), 120))).size == (30, 20)  # never enlarged


HOSTILE_CAPTIONS = [
    *("", "a cat", "x" * 10_000, "two\nlines\ttab", "\0nul"),
    *("שלום עולם", "赤い花 🌹", "\ud800", "e\u0301\u202e", "\U0010ffff"),
]


def test_contact_sheet_takes_any_caption() -> None:
    images = [photo(64 + 40 * i, 100, seed=i) for i in range(len(HOSTILE_CAPTIONS))]
    sheet = contact_sheet(images, HOSTILE_CAPTIONS, columns=4, cell=96)
    assert sheet.mode == "RGB" and sheet.width > 4 * 96 and sheet.height > 3 * 96
    again = contact_sheet(images, HOSTILE_CAPTIONS, columns=4, cell=96)
    assert np.array_equal(np.asarray(sheet), np.asarray(again))


def test_contact_sheet_shows_the_pictures_and_keeps_captions_in_their_cell() -> None:
    red, blue = (Image.new("RGB", (50, 50), c) for c in ("#ff0000", "#0000ff"))
    sheet = np.asarray(contact_sheet([red, blue], ["", "long " * 99], columns=2, cell=100)).astype(int)
    reds = np.argwhere((sheet == (255, 0, 0)).all(-1))
    blues = np.argwhere((sheet == (0, 0, 255)).all(-1))
    assert reds[:, 1].max() < blues[:, 1].min() and len(reds) > 80**2
    below = sheet[blues[:, 0].max() + 8 :]
    ink = np.argwhere(below.min(-1) < 150)
    assert len(ink) > 50
    assert ink[:, 1].min() >= blues[:, 1].min() - 8 and ink[:, 1].max() <= blues[:, 1].max() + 8


def test_contact_sheet_of_nothing_and_of_wrong_numbers() -> None:
    assert contact_sheet([], [], columns=3, cell=64).size[0] > 0
    with pytest.raises(ValueError, match="1 images but 0 captions"):
        contact_sheet([photo()], [], columns=1, cell=64)
    with pytest.raises(ValueError, match="columns"):
        contact_sheet([photo()], [""], columns=0, cell=64)
