"""Cut-outs against a known alpha, and glTF files against the Khronos validator and by their bytes."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from llmvis.data import load_emoji
from llmvis.scene import _CORNERS, _QUAD, _TRIANGLES, _reached, cutout, write_gltf
from llmvis.schema import UserError

ROOT = Path(__file__).resolve().parent.parent
WHITE = (255, 255, 255)


def on(picture: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    ground = Image.new("RGB", picture.size, colour)
    ground.paste(picture, mask=picture.getchannel("A"))
    return ground


def emoji(count: int) -> list[Image.Image]:
    """Drawings spread over the packaged collection, RGBA."""
    column = load_emoji(columns=["image"])["image"]
    chosen = [int(i) for i in np.linspace(0, len(column) - 1, count)]
    return [Image.open(io.BytesIO(column[i]["bytes"].as_py())).convert("RGBA") for i in chosen]


def alpha_of(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.getchannel("A")).astype(float) / 255


def test_alpha_of_emoji_is_found_again_and_no_fringe_shows_on_black() -> None:
    """Medians over 200 drawings: measured .0008, .998 and 5.7; all that is not ground, opaque: .010, .980, 122."""
    errors, overlaps, fringes, fringes_without = [], [], [], []
    for truth in emoji(200):
        flat = on(truth, WHITE)
        found = cutout(flat)
        a, b = alpha_of(truth), alpha_of(found)
        errors.append(np.abs(a - b).mean())
        overlaps.append(np.minimum(a, b).sum() / np.maximum(a, b).sum())
        hard = flat.copy()
        hard.putalpha(Image.fromarray(np.where(b > 0, 255, 0).astype(np.uint8)))
        edge = (a > 0) & (a < 1) if ((a > 0) & (a < 1)).any() else a > 0
        dark = np.asarray(on(truth, (0, 0, 0))).astype(int)
        for cut, kept in ((found, fringes), (hard, fringes_without)):
            over = np.asarray(on(cut, (0, 0, 0))).astype(int) - dark
            kept.append(over.max(axis=2).clip(0)[edge].mean())
    assert np.median(errors) < 0.0015
    assert np.median(overlaps) > 0.995
    assert np.median(fringes) < 10 and np.median(fringes_without) > 100
    assert np.mean(np.array(fringes) < fringes_without) > 0.95


def disc(colour: tuple[int, int, int], hole: tuple[int, int, int] | None = None) -> Image.Image:
    """A soft-edged disc on clear ground, with a smaller one of another colour in the middle: 64 x 64."""
    large = Image.new("RGBA", (512, 512), (*colour, 0))
    draw = ImageDraw.Draw(large)
    draw.ellipse((80, 80, 432, 432), fill=(*colour, 255))
    if hole:
        draw.ellipse((200, 200, 312, 312), fill=(*hole, 255))
    return large.resize((64, 64), Image.Resampling.BOX)


@pytest.mark.parametrize("colour", [(200, 30, 40), (0, 0, 0), (250, 220, 60), (90, 200, 255)])
def test_a_plain_shape_comes_back_to_a_few_levels(colour: tuple[int, int, int]) -> None:
    truth = disc(colour)
    found = cutout(on(truth, WHITE))
    # faint pixels within the tolerance count as ground
    assert np.abs(alpha_of(truth) - alpha_of(found)).max() < 0.1
    for ground in ((0, 0, 0), (0, 255, 0)):
        shown = np.asarray(on(found, ground)).astype(int), np.asarray(on(truth, ground)).astype(int)
        assert np.abs(shown[0] - shown[1]).max() < 25


def test_white_that_is_shut_in_stays_opaque_and_corners_do_not_let_out() -> None:
    found = np.asarray(cutout(on(disc((200, 30, 40), WHITE), WHITE)))
    assert found[32, 32].tolist() == [255, 255, 255, 255]
    assert found[0, 0, 3] == found[63, 20, 3] == 0
    diamond = np.full((9, 9, 3), 255, np.uint8)
    for i in range(4):  # a ring whose pixels touch at corners alone
        for y, x in ((4 - i, i), (i, 4 + i), (4 + i, 8 - i), (8 - i, 4 - i)):
            diamond[y, x] = 0
    alpha = np.asarray(cutout(Image.fromarray(diamond), edge=0))[..., 3]
    assert alpha[4, 4] == 255 and alpha[0, 0] == 0


def test_a_renderer_that_interpolates_finds_no_white() -> None:
    """The clear pixels next to the shape have its colour."""
    found = cutout(on(disc((0, 0, 0)), WHITE))
    doubled = np.asarray(
        Image.fromarray(np.asarray(found)[..., :3]).resize((256, 256), Image.Resampling.BILINEAR)
    )
    shown = np.asarray(found.getchannel("A").resize((256, 256), Image.Resampling.BILINEAR)) > 0
    assert doubled[shown].max() < 40


def test_a_light_outline_is_no_mixture() -> None:
    picture = Image.new("RGB", (40, 40), WHITE)
    draw = ImageDraw.Draw(picture)
    draw.rectangle((8, 8, 31, 31), fill=(200, 230, 255))
    draw.rectangle((9, 9, 30, 30), fill=(120, 0, 0))
    found = np.asarray(cutout(picture))
    assert (found[8:32, 8:32, 3] == 255).all() and found[8, 20, :3].tolist() == [200, 230, 255]


def test_thin_lines_stay() -> None:
    picture = Image.new("RGB", (30, 30), WHITE)
    ImageDraw.Draw(picture).line((3, 15, 26, 15), fill=(20, 20, 20))
    found = np.asarray(cutout(picture))
    assert (found[15, 3:27] == (20, 20, 20, 255)).all()
    assert (np.delete(found[..., 3], 15, axis=0) == 0).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3)])
def test_odd_pictures(size: tuple[int, int]) -> None:
    assert alpha_of(cutout(Image.new("RGB", size, (250, 255, 244)))).max() == 0
    full = cutout(Image.new("RGB", size, (9, 8, 7)))
    assert np.asarray(full).reshape(-1, 4).tolist() == [[9, 8, 7, 255]] * (size[0] * size[1])


def test_tolerance_and_mode() -> None:
    grey = Image.new("RGB", (4, 4), (240, 240, 240))
    assert alpha_of(cutout(grey)).min() == 1 and alpha_of(cutout(grey, tolerance=15)).max() == 0
    for wrong in ({"tolerance": 255}, {"tolerance": -1}, {"edge": -1}, {"edge": 17}):
        with pytest.raises(UserError, match="give 0 to 254"):
            cutout(grey, **wrong)
    with pytest.raises(UserError, match="convert it to RGB"):
        cutout(grey.convert("L"))


def test_what_is_reached_is_what_a_walk_reaches() -> None:
    rng = np.random.default_rng(7)
    for share in (0.4, 0.6, 0.75):
        for _ in range(20):
            free = rng.random((rng.integers(1, 14), rng.integers(1, 14))) < share
            height, width = free.shape
            todo = [(y, x) for y, x in np.argwhere(free) if y in (0, height - 1) or x in (0, width - 1)]
            walked = np.zeros_like(free)
            while todo:
                y, x = todo.pop()
                if 0 <= y < height and 0 <= x < width and free[y, x] and not walked[y, x]:
                    walked[y, x] = True
                    todo += [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            assert np.array_equal(_reached(free), walked)


NAMES = [
    "a red apple",
    "",
    'quote " back \\ slash',
    "\0\n\x1b[31m",
    "赤いリンゴ 🍎",
    "\ud800 lone",
    "</script>",
    "x" * 999,
]


def pictures() -> list[tuple[str, Image.Image]]:
    """Wide, tall, opaque, half clear, all clear, one pixel, with a colour profile and a comment."""
    noted = Image.new("RGB", (8, 8), (1, 2, 3))
    noted.info.update({"icc_profile": b"\0" * 200, "comment": "at home"})
    images = [
        *emoji(2),
        Image.new("RGBA", (30, 10), (255, 0, 0, 255)),
        Image.new("RGB", (7, 21), (0, 0, 255)),
        Image.new("RGBA", (8, 8)),
        Image.new("RGB", (1, 1)),
        noted,
        Image.new("RGBA", (256, 256), (9, 9, 9, 128)),
    ]
    return list(zip(NAMES, images, strict=True))


def read_glb(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    magic, version, total, length, kind = struct.unpack_from("<4sIII4s", data)
    assert (magic, version, total, kind, length % 4) == (b"glTF", 2, len(data), b"JSON", 0)
    rest, kind = struct.unpack_from("<I4s", data, 20 + length)
    assert kind == b"BIN\0" and 28 + length + rest == total
    return json.loads(data[20 : 20 + length]), data[28 + length :]


def bytes_of(scene: dict[str, Any], blob: bytes, view: int) -> bytes:
    told = scene["bufferViews"][view]
    return blob[told["byteOffset"] : told["byteOffset"] + told["byteLength"]]


def test_a_glb_holds_names_pixels_and_proportions(tmp_path: Path) -> None:
    cards = pictures()
    write_gltf(cards, tmp_path / "new" / "scene.glb", columns=3, copyright='"me", CC BY 4.0')
    scene, blob = read_glb(tmp_path / "new" / "scene.glb")
    assert (
        scene["asset"]["generator"].startswith("llmvis ") and scene["asset"]["copyright"] == '"me", CC BY 4.0'
    )
    assert [n["name"] for n in scene["nodes"]] == [n.replace("\ud800", "?") for n in NAMES]
    assert {
        (m["primitives"][0]["attributes"]["POSITION"], m["primitives"][0]["indices"]) for m in scene["meshes"]
    } == {(0, 2)}
    for node, image, material, (_, picture) in zip(
        scene["nodes"], scene["images"], scene["materials"], cards, strict=True
    ):
        png = Image.open(io.BytesIO(bytes_of(scene, blob, image["bufferView"])))
        assert (png.mode, png.tobytes()) == (picture.mode, picture.tobytes()) and not png.info
        assert node["scale"] == [picture.width / picture.height, 1, 1]
        assert material["extensions"] == {"KHR_materials_unlit": {}} and material["doubleSided"]
        clear = picture.mode == "RGBA" and alpha_of(picture).min() < 1
        assert material["alphaMode"] == ("BLEND" if clear else "OPAQUE")


def test_cards_stand_side_by_side_in_rows(tmp_path: Path) -> None:
    write_gltf(pictures(), tmp_path / "scene.glb", columns=3)
    nodes = read_glb(tmp_path / "scene.glb")[0]["nodes"]
    rows = [nodes[i : i + 3] for i in (0, 3, 6)]
    assert [{n["translation"][1] for n in row} for row in rows] == [{2.3}, {1.15}, {0}]
    for row in rows:
        spans = [(x - w / 2, x + w / 2) for n in row for x, w in [(n["translation"][0], n["scale"][0])]]
        assert spans[0][0] == pytest.approx(-spans[-1][1])
        gaps = [b[0] - a[1] for a, b in itertools.pairwise(spans)]
        assert gaps == pytest.approx([0.15] * len(gaps))
    write_gltf(pictures(), tmp_path / "row.glb", columns=8)
    assert {n["translation"][1] for n in read_glb(tmp_path / "row.glb")[0]["nodes"]} == {0}
    write_gltf(pictures(), tmp_path / "square.glb")
    assert len({n["translation"][1] for n in read_glb(tmp_path / "square.glb")[0]["nodes"]}) == 3


def test_the_quad_shows_a_picture_upright() -> None:
    """The corner at the top left of a card has the texture's first pixel, whose v is 0."""
    uv = {tuple(p[:2].tolist()): tuple(c.tolist()) for p, c in zip(_QUAD, _CORNERS, strict=True)}
    assert uv == {(-0.5, 1): (0, 0), (0.5, 1): (1, 0), (-0.5, 0): (0, 1), (0.5, 0): (1, 1)}
    for triangle in _QUAD[_TRIANGLES].reshape(2, 3, 3):  # counter-clockwise seen from +z: the front
        assert np.cross(triangle[1] - triangle[0], triangle[2] - triangle[0])[2] > 0


def test_gltf_and_glb_hold_the_same(tmp_path: Path) -> None:
    write_gltf(pictures(), tmp_path / "scene.glb")
    write_gltf(pictures(), tmp_path / "scene.gltf")
    scene, blob = read_glb(tmp_path / "scene.glb")
    text = json.loads((tmp_path / "scene.gltf").read_text("ascii"))
    uri = text["buffers"][0].pop("uri")
    told = base64.b64decode(uri.removeprefix("data:application/octet-stream;base64,"))
    assert blob[: len(told)] == told and len(blob) - len(told) < 4
    assert text == scene


def test_mistakes_are_explained(tmp_path: Path) -> None:
    card = [("a", Image.new("RGB", (2, 2)))]
    for cards, name, columns in (([], "a.glb", None), (card, "a.obj", None), (card, "a.glb", 0)):
        with pytest.raises(UserError, match="at least one picture"):
            write_gltf(cards, tmp_path / name, columns=columns)
    with pytest.raises(UserError, match="convert it"):
        write_gltf([("a", Image.new("L", (2, 2)))], tmp_path / "a.glb")
    assert not list(tmp_path.iterdir())


def validator() -> Path | None:
    """The folder of the npm package gltf-validator, beside the repository or on NODE_PATH."""
    places = [
        ROOT / "node_modules",
        *map(Path, filter(None, os.environ.get("NODE_PATH", "").split(os.pathsep))),
    ]
    return next((p / "gltf-validator" for p in places if (p / "gltf-validator").is_dir()), None)


def validate(*files: Path) -> list[dict[str, Any]]:
    module = validator()
    assert module is not None
    command = ["node", str(ROOT / "tests" / "gltf_validate.mjs"), str(module), *map(str, files)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)


@pytest.mark.skipif(
    shutil.which("node") is None or validator() is None,
    reason="needs node and: npm install --no-save gltf-validator",
)
def test_the_khronos_validator_finds_no_error_and_no_warning(tmp_path: Path) -> None:
    good, text, bad = tmp_path / "scene.glb", tmp_path / "scene.gltf", tmp_path / "bad.gltf"
    write_gltf(pictures(), good, copyright="me")
    write_gltf([(name, cutout(on(image, WHITE))) for name, image in zip(NAMES, emoji(8), strict=True)], text)
    broken = json.loads(text.read_text())
    broken["accessors"][2]["count"] = 7
    broken["asset"]["minVersion"] = "3.0"
    bad.write_text(json.dumps(broken))
    *fine, wrong = validate(good, text, bad)
    for report in fine:
        issues = report["issues"]
        assert (issues["numErrors"], issues["numWarnings"]) == (0, 0), issues["messages"]
        assert report["info"]["totalTriangleCount"] == 16 and report["info"]["materialCount"] == 8
    assert wrong["issues"]["numErrors"] > 0  # the validator is at work
