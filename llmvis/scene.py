"""Elements of a scene: a drawing cut out of its white ground, and pictures as cards in a glTF file.

`cutout` is for drawings on (near) white, as the synthesis model makes them; what is not white
belongs to the drawing, and so does white that is shut in. `write_gltf` writes a scene that any
glTF 2.0 viewer shows. What it does not know: photographs' backgrounds, hair, shadows as such,
shapes other than a flat card, models, torch, Ray.

Shape legend: H height, W width in pixels.
"""

from __future__ import annotations

import base64
import io
import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llmvis import __version__
from llmvis.schema import UserError
from llmvis.storage import LocalStore, local_path

_MIXTURE_SLACK = 24  # levels that a mixture may miss: neighbours differ in shade, compression adds noise
_NEIGHBOURS = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]


def cutout(image: Image.Image, *, tolerance: int = 12, edge: int = 2) -> Image.Image:
    """A drawing without its ground: RGB on near-white → RGBA of the same size.

    The ground is what is near white and connected to the border (by edges of pixels, not by
    corners). A pixel c within `edge` of it is taken for a mixture a f + (1 - a) white, f the
    nearest colour further in; a is the least-squares answer, (w - c)·(w - f) / |w - f|²
    (Porter and Duff 1984 solved for alpha with both colours known). A pixel that is no such
    mixture, such as a light outline, stays opaque. Colours of mixed and of clear pixels are those
    further in, so no white shows on any other ground, nor when a renderer interpolates.

    Args:
        image: RGB; drawn on white.
        tolerance: how far below 255 a channel of the ground may be, 0 to 254.
        edge: width of the soft edge in pixels, 0 (a hard one) to 16.

    Returns:
        RGBA, alpha 0 to 255. All clear where there is nothing but ground.

    Raises:
        UserError: for another mode, or a number out of range.
    """
    if image.mode != "RGB":
        raise UserError(f"a picture of mode {image.mode} cannot be cut out: convert it to RGB, on white")
    if not (0 <= tolerance < 255 and 0 <= edge <= 16):
        raise UserError(f"tolerance {tolerance}, edge {edge}: give 0 to 254, and 0 to 16")
    colour = np.asarray(image).astype(np.float32)
    ground = _reached(colour.min(axis=2) >= 255 - tolerance)
    if ground.all():
        return Image.new("RGBA", image.size, (255, 255, 255, 0))
    depth = _depth(ground, edge)
    inner, known = _spread(colour, depth > edge, ~ground, edge + 1)
    thin = _ridge(depth) & ~known  # what has no inside near by is its own
    inner, _ = _spread(np.where(known[..., None], inner, colour), known | thin, ~ground)
    alpha = np.where(ground, 0, 1).astype(np.float32)
    mixed = (depth > 0) & (depth <= edge)
    alpha[mixed], unmixed = _unblend(colour[mixed], inner[mixed])
    solid = colour.copy()
    solid[mixed] = unmixed
    solid, known = _spread(solid, ~ground, ground, 4)
    solid[~known] = solid[~ground].mean(axis=0)  # far from any edge: for small copies of a texture
    return Image.fromarray(np.dstack([solid, alpha * 255]).round().clip(0, 255).astype(np.uint8))


def _reached(passable: np.ndarray) -> np.ndarray:
    """What of a bool (H, W) is connected to the border through its own True pixels, by edges.

    Whole runs of a row or a column at a time, so the number of rounds is that of bends in the
    longest way, not of its pixels.
    """
    inside = np.zeros_like(passable)
    inside[[0, -1]], inside[:, [0, -1]] = passable[[0, -1]], passable[:, [0, -1]]
    while True:
        before = np.count_nonzero(inside)
        for across in (False, True):
            free, seen = (passable.T, inside.T) if across else (passable, inside)
            walls = np.ones((free.shape[0], 1), bool)  # a run ends with its row
            run = np.cumsum(np.hstack([walls, ~free])).reshape(free.shape[0], -1)[:, 1:]
            hit = np.zeros(run[-1, -1] + 1, bool)
            hit[run[seen]] = True
            grown = free & hit[run]
            inside = grown.T if across else grown
        if np.count_nonzero(inside) == before:
            return inside


def _around(array: np.ndarray, fill: float) -> np.ndarray:
    """The eight neighbours of each pixel: (H, W, …) → (8, H, W, …), `fill` beyond the border."""
    height, width = array.shape[:2]
    padded = np.pad(array, [(1, 1), (1, 1)] + [(0, 0)] * (array.ndim - 2), constant_values=fill)
    return np.stack([padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width] for dy, dx in _NEIGHBOURS])


def _depth(ground: np.ndarray, most: int) -> np.ndarray:
    """Steps of a king from the ground, 0 on it, `most` + 1 for all that is further: uint8 (H, W)."""
    depth = np.where(ground, 0, most + 1).astype(np.uint8)
    for step in range(1, most + 1):
        depth[(depth > step) & (_around(depth, most + 1) == step - 1).any(axis=0)] = step
    return depth


def _ridge(depth: np.ndarray) -> np.ndarray:
    """Pixels of which no neighbour is deeper: the middle of what is too thin to have an inside."""
    ridge: np.ndarray = (depth > 0) & (depth >= _around(depth, 0).max(axis=0))
    return ridge


def _spread(
    colour: np.ndarray, known: np.ndarray, wanted: np.ndarray, steps: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Known colours carried on to wanted pixels, ring by ring, each the mean of its known neighbours.

    Returns colours (H, W, 3), 0 where none came, and where one is known, bool (H, W).
    """
    # a margin of unknown pixels, so that every pixel has eight neighbours
    out = np.pad(np.where(known[..., None], colour, 0), [(1, 1), (1, 1), (0, 0)])
    has, wanted = np.pad(known, 1), np.pad(wanted, 1)
    for _ in range(has.size if steps is None else steps):
        new = np.zeros_like(has)
        new[1:-1, 1:-1] = _around(has[1:-1, 1:-1], 0).any(axis=0)
        ys, xs = np.nonzero(new & wanted & ~has)
        if not len(ys):
            break
        near = [(ys + dy, xs + dx) for dy, dx in _NEIGHBOURS]
        out[ys, xs] = (
            np.sum([out[at] for at in near], axis=0) / np.sum([has[at] for at in near], axis=0)[:, None]
        )
        has[ys, xs] = True
    out, known = out[1:-1, 1:-1], has[1:-1, 1:-1]
    return out, known


def _unblend(mixed: np.ndarray, inner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Alpha (N,) and colours (N, 3) of pixels (N, 3) seen as `inner` (N, 3) over white."""
    from_white, full = 255 - mixed, 255 - inner
    alpha = (from_white * full).sum(1) / np.maximum((full * full).sum(1), 1)
    off = np.abs(from_white - alpha[:, None] * full).max(axis=1)
    mixture = (off < _MIXTURE_SLACK) & (alpha < 1)
    return np.where(mixture, alpha, 1), np.where(mixture[:, None], inner, mixed)


_QUAD = np.array([(-0.5, 0, 0), (0.5, 0, 0), (0.5, 1, 0), (-0.5, 1, 0)], "<f4")  # stands on y = 0, faces +z
_CORNERS = np.array([(0, 1), (1, 1), (1, 0), (0, 0)], "<f4")  # glTF counts v downwards
_TRIANGLES = np.array([0, 1, 2, 0, 2, 3], "<u2")
_GAP = 0.15  # between cards, in heights of a card
_FLOAT, _SHORT, _VERTICES, _INDICES = 5126, 5123, 34962, 34963  # numbers of the glTF specification
_LINEAR, _MIPMAPS, _CLAMP = 9729, 9987, 33071


def write_gltf(
    pictures: Sequence[tuple[str, Image.Image]],
    path: str | Path,
    *,
    columns: int | None = None,
    copyright: str | None = None,
) -> None:
    """A glTF 2.0 scene of upright cards, one for each picture, published whole.

    A card is 1 unit high and as wide as its picture's proportions want; y is up, cards face +z.
    They stand in rows from left to right around x = 0, the first row on top, the last on y = 0.
    All share one quad; each has a material without lighting (`KHR_materials_unlit`), seen from
    both sides, blended where the picture has any transparency.

    Args:
        pictures: captions, which become the names of nodes, and RGB or RGBA pictures.
        path: `.glb` for one binary file; `.gltf` for JSON that holds the same bytes as base64.
        columns: cards in a row; by default as many as make a square of cards.
        copyright: for the asset's `copyright`: who made the pictures, and their licence.

    Raises:
        UserError: for no pictures, another mode, another ending, fewer than one column, or more
            than the 4 GiB that a `.glb` can hold.
    """
    path = local_path(path)
    if not pictures or path.suffix not in (".glb", ".gltf") or (columns is not None and columns < 1):
        raise UserError(f"{path.name}: give at least one picture and column, and a name in .glb or .gltf")
    scene, blob = _scene(pictures, columns or math.isqrt(len(pictures) - 1) + 1)
    scene["asset"] = {"version": "2.0", "generator": f"llmvis {__version__}"}
    if copyright:
        scene["asset"]["copyright"] = _text(copyright)
    if path.suffix == ".gltf":
        uri = "data:application/octet-stream;base64," + base64.b64encode(blob).decode()
        scene["buffers"] = [{"byteLength": len(blob), "uri": uri}]
        data = json.dumps(scene, indent=1).encode()
    else:
        scene["buffers"] = [{"byteLength": len(blob)}]
        data = _glb(json.dumps(scene, separators=(",", ":")).encode(), blob)
    LocalStore(path.parent).write(path.name, data)


def _text(foreign: str) -> str:
    """Text without lone surrogates, which JSON can escape and no reader can take."""
    return foreign.encode("utf-8", "replace").decode()


def _glb(head: bytes, blob: bytes) -> bytes:
    """Header, JSON chunk padded with spaces, binary chunk padded with zeros (glTF 2.0, section 4.4)."""
    head, blob = head + b" " * (-len(head) % 4), blob + b"\0" * (-len(blob) % 4)
    total = 12 + 8 + len(head) + 8 + len(blob)
    if total >= 2**32:
        raise UserError(f"the pictures take {total / 2**30:.1f} GiB, a .glb holds 4: write several files")
    chunks = (
        struct.pack("<II", len(head), 0x4E4F534A) + head + struct.pack("<II", len(blob), 0x004E4942) + blob
    )
    return struct.pack("<III", 0x46546C67, 2, total) + chunks


def _scene(pictures: Sequence[tuple[str, Image.Image]], columns: int) -> tuple[dict[str, Any], bytes]:
    """Everything but `asset` and `buffers`, and the bytes of the one buffer."""
    parts = [_QUAD.tobytes(), _CORNERS.tobytes(), _TRIANGLES.tobytes(), *(_png(p) for _, p in pictures)]
    views: list[dict[str, Any]] = []
    blob = bytearray()
    for part in parts:
        blob += bytes(-len(blob) % 4)
        views.append({"buffer": 0, "byteOffset": len(blob), "byteLength": len(part)})
        blob += part
    for view, target in zip(views, (_VERTICES, _VERTICES, _INDICES), strict=False):
        view["target"] = target
    numbers = range(len(pictures))
    materials, meshes = [], []
    for i, (_, picture) in enumerate(pictures):
        clear = picture.mode == "RGBA" and np.asarray(picture.getchannel("A")).min() < 255
        surface = {"baseColorTexture": {"index": i}, "metallicFactor": 0, "roughnessFactor": 1}
        materials.append(
            {
                "pbrMetallicRoughness": surface,  # for viewers that do not know the extension
                "extensions": {"KHR_materials_unlit": {}},
                "alphaMode": "BLEND" if clear else "OPAQUE",
                "doubleSided": True,
            }
        )
        card = {"attributes": {"POSITION": 0, "TEXCOORD_0": 1}, "indices": 2, "material": i}
        meshes.append({"primitives": [card]})
    scene = {
        "extensionsUsed": ["KHR_materials_unlit"],
        "scene": 0,
        "scenes": [{"nodes": list(numbers)}],
        "nodes": _cards(pictures, columns),
        "meshes": meshes,
        "materials": materials,
        "textures": [{"sampler": 0, "source": i} for i in numbers],
        "samplers": [{"magFilter": _LINEAR, "minFilter": _MIPMAPS, "wrapS": _CLAMP, "wrapT": _CLAMP}],
        "images": [{"bufferView": 3 + i, "mimeType": "image/png"} for i in numbers],
        "accessors": [
            {"bufferView": 0, "componentType": _FLOAT, "count": 4, "type": "VEC3"}
            | {"min": _QUAD.min(axis=0).tolist(), "max": _QUAD.max(axis=0).tolist()},
            {"bufferView": 1, "componentType": _FLOAT, "count": 4, "type": "VEC2"},
            {"bufferView": 2, "componentType": _SHORT, "count": 6, "type": "SCALAR"},
        ],
        "bufferViews": views,
    }
    return scene, bytes(blob)


def _cards(pictures: Sequence[tuple[str, Image.Image]], columns: int) -> list[dict[str, Any]]:
    """A node for each card: its name, place and width."""
    nodes: list[dict[str, Any]] = []
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    for number, row in enumerate(rows):
        widths = [picture.width / picture.height for _, picture in row]
        left = -(sum(widths) + _GAP * (len(row) - 1)) / 2
        height = (len(rows) - 1 - number) * (1 + _GAP)
        for (name, _), width in zip(row, widths, strict=True):
            place = [left + width / 2, height, 0]
            left += width + _GAP
            nodes.append(
                {"name": _text(name), "mesh": len(nodes), "translation": place, "scale": [width, 1, 1]}
            )
    return nodes


def _png(picture: Image.Image) -> bytes:
    if picture.mode not in ("RGB", "RGBA"):
        raise UserError(f"a picture of mode {picture.mode} is no texture: convert it to RGB or RGBA")
    plain = picture.copy()
    plain.info.clear()  # no colour profile, no text
    out = io.BytesIO()
    plain.save(out, "PNG")
    return out.getvalue()
