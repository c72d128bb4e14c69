"""Rebuild the further styles: `python -m llmvis.data.build_styles --work /tmp/llmvis-build`.

Reads OpenMoji, Twemoji and Fluent Emoji (npm), pinned by hash, and writes
`llmvis/data/styles.parquet`. The drawings that are SVG are rasterised with `resvg_py`, which
the installed package does not need; every picture is lossless WebP. Skin tones, the parts
that only make up others, OpenMoji's flags of countries and regions, and empty drawings are
left out. Groups
and sides of the split are the embedded collection's. It knows nothing of models; another
release of the renderer or of libwebp may write other bytes.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from PIL import Image

from llmvis.data import load_emoji
from llmvis.data.build import NEAR, code_points, small_picture
from llmvis.data.drawings import OPENMOJI
from llmvis.data.groups import series_of, variant_key
from llmvis.data.packages import FLUENT_FLAT, TWEMOJI, unpack
from llmvis.data.styles import COLUMNS, LICENCES, STYLES, styles_path
from llmvis.schema import UserError

OPENMOJI_SIZE, FLUENT_SIZE = 128, 64  # px; Twemoji comes as 64 px bitmaps
_LEFT_OUT = ("country-flag", "subdivision-flag", "brand")  # subgroups; a brand is its owner's
_PARTS = "component"  # skin tones and hair as emoji of their own
_FLUENT_ALIASES = {(0x1F449,): "backhand-index-pointing-right"}  # the set names no code points of aliases


@dataclass(frozen=True)
class Told:
    """What is told of an emoji, whoever draws it."""

    id: str
    caption: str
    keywords: list[str]
    group: str
    split: str


def webp(picture: Image.Image) -> bytes | None:
    """Lossless; the colour of pixels that are wholly transparent is not kept. None if all are.

    Quality is effort here: 100 takes 15 to 40 times the time of 90 and saves 1 to 3 % of the bytes.
    """
    if picture.getchannel("A").getbbox() is None:
        return None
    out = io.BytesIO()
    picture.save(out, "WEBP", lossless=True, quality=90, method=6)
    return out.getvalue()


def render(svg: str, size: int) -> Image.Image:
    """A square SVG as RGBA, transparent where nothing is drawn."""
    try:
        import resvg_py
    except ImportError as error:
        raise UserError("drawing SVG needs resvg_py: pip install resvg_py") from error
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def openmoji_entries(folder: Path) -> list[dict[str, Any]]:
    """OpenMoji's own list without skin tones, parts, and flags of countries and regions."""
    entries: list[dict[str, Any]] = json.loads((folder / "data" / "openmoji.json").read_text())
    return [
        entry
        for entry in entries
        if not entry["skintone"] and entry["group"] != _PARTS and entry["subgroups"] not in _LEFT_OUT
    ]


def openmoji_pictures(folder: Path, codes: Iterable[str], kind: str) -> dict[str, bytes]:
    """Id → picture, of `black` or `color`. The id is OpenMoji's, which writes FE0F as emojibase does."""
    files = {code: folder / kind / "svg" / f"{code}.svg" for code in codes}
    drawn = {code: webp(render(file.read_text(), OPENMOJI_SIZE)) for code, file in files.items()}
    return {code: picture for code, picture in drawn.items() if picture}


def twemoji_pictures(folder: Path, id_of: dict[tuple[int, ...], str]) -> dict[str, bytes]:
    """Id → picture, for the ids that are known; skin tones are not in the list's first level."""
    pictures = {}
    for entry in json.loads((folder / "emoji.json").read_text()):
        code = id_of.get(code_points(entry["unified"]))
        if code is not None and entry["has_img_twitter"]:
            file = folder / "img" / "twitter" / "64" / entry["image"]
            pictures[code] = webp(Image.open(file).convert("RGBA"))
    return {code: picture for code, picture in pictures.items() if picture}


def fluent_pictures(folder: Path, codes: Iterable[str]) -> dict[str, bytes]:
    """Id → picture, for the ids that the set names. It draws no couples, families or flags of countries."""
    icons = json.loads((folder / "icons.json").read_text())
    told: dict[str, str] = json.loads((folder / "chars.json").read_text())
    name_of = _FLUENT_ALIASES | {code_points(code): name for code, name in told.items()}
    named = {code: name_of[code_points(code)] for code in codes if code_points(code) in name_of}
    drawn = {code: webp(render(fluent_svg(icons, name), FLUENT_SIZE)) for code, name in named.items()}
    return {code: picture for code, picture in drawn.items() if picture}


def fluent_svg(icons: dict[str, Any], name: str) -> str:
    """One icon of an Iconify set as SVG, in a square; an alias may be its parent mirrored."""
    alias = icons.get("aliases", {}).get(name)
    icon = icons["icons"][alias["parent"] if alias else name]
    width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
    body = icon["body"]
    if alias and alias.get("hFlip"):
        body = f'<g transform="translate({width} 0) scale(-1 1)">{body}</g>'
    side = max(width, height)
    box = f"{(width - side) / 2:g} {(height - side) / 2:g} {side:g} {side:g}"
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{body}</svg>'


def name_words(name: str) -> list[str]:
    """'Roasted coffee beans' → roasted, coffee, bean: to compare names."""
    return [word for found in re.findall(r"\w+", name.lower()) if (word := found.removesuffix("s"))]


def _keys(name: str) -> list[str]:
    series = series_of(name)
    key = "".join(name_words(variant_key(name.lower())))  # 'wheel chair' is 'wheelchair'
    return [f"name:{key}", *([f"series:{series}"] if series else [])]


def tell_extras(
    extras: list[dict[str, Any]], collection: list[Told], pictures: list[dict[str, bytes]]
) -> Iterator[Told]:
    """Group and side of drawings that the collection has not: they train, or nobody uses them.

    Unused is what could leak a held-out emoji: a name that is its name, holds all its words
    or is of its series, or nearly its pixels in one of the `pictures` (id → bytes).
    """
    first: dict[str, Told] = {}
    for emoji in collection:
        for key in _keys(emoji.caption):
            first.setdefault(key, emoji)
        first.setdefault(_keys(emoji.group)[0], emoji)
    held = [emoji for emoji in collection if emoji.split != "train"]
    held_words = [(set(name_words(emoji.caption)), emoji) for emoji in held]
    near: dict[str, Told] = {}
    for drawn in pictures:
        there = [emoji for emoji in held if emoji.id in drawn]
        codes = [entry["hexcode"] for entry in extras if entry["hexcode"] in drawn]
        known = np.stack([small_picture(drawn[emoji.id]) for emoji in there])
        mine = np.stack([small_picture(drawn[code]) for code in codes])
        for i, j in np.argwhere(mine @ known.T > NEAR):
            near.setdefault(codes[i], there[j])
    for entry in extras:
        name = entry["annotation"].strip()
        words = set(name_words(name))
        linked = [first[key] for key in _keys(name) if key in first]
        linked += [emoji for these, emoji in held_words if these <= words]
        linked += [emoji for code, emoji in near.items() if code == entry["hexcode"]]
        same = next((emoji for emoji in linked if emoji.split != "train"), linked[0] if linked else None)
        tags = [word.strip() for word in f"{entry['tags']},{entry['openmoji_tags']}".split(",")]
        yield Told(
            id=entry["hexcode"],
            caption=name,
            keywords=list(dict.fromkeys(filter(None, tags))),
            group=same.group if same else name,
            split="unused" if same and same.split != "train" else "train",
        )


def twins(drawn: dict[str, bytes], told: dict[str, Told]) -> set[str]:
    """Ids that train although this style draws them as it draws a held-out one (faces, birds)."""
    held = [code for code in drawn if told[code].split in ("validation", "test")]
    train = [code for code in drawn if told[code].split == "train"]
    known, mine = (np.stack([small_picture(drawn[code]) for code in codes]) for codes in (held, train))
    return {code for code, close in zip(train, (mine @ known.T > NEAR).any(1), strict=True) if close}


def schema() -> pa.Schema:
    """Columns of the file, with licences and the key that makes Hugging Face `datasets` show pictures."""
    special = {
        "image": pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        "keywords": pa.list_(pa.string()),
    }
    text = {"dtype": "string", "_type": "Value"}
    features: dict[str, Any] = {name: {"_type": "Image"} if name == "image" else text for name in COLUMNS}
    features["keywords"] = {"_type": "List", "feature": text}
    told = {"huggingface": json.dumps({"info": {"features": features}}), "licences": json.dumps(LICENCES)}
    return pa.schema([(name, special.get(name, pa.string())) for name in COLUMNS], metadata=told)


@dataclass(frozen=True, kw_only=True)
class Build:
    """Rebuild llmvis/data/styles.parquet from three npm packages.

    Example: python -m llmvis.data.build_styles --work /tmp/llmvis-build
    """

    work: Path
    """Folder for downloads; files already there are used."""
    out: Path = field(default_factory=styles_path)
    """Where the Parquet file goes."""


def build(config: Build) -> Path:
    """Write the styles and return the file's path."""
    openmoji = unpack(OPENMOJI, config.work) / "package"
    entries = openmoji_entries(openmoji)
    codes = [entry["hexcode"] for entry in entries]
    line, colour = (openmoji_pictures(openmoji, codes, kind) for kind in ("black", "color"))

    rows = load_emoji(columns=["id", "caption", "keywords", "group", "split"]).to_pylist()
    told = {row["id"]: Told(**row) for row in rows}
    extras = [entry for entry in entries if entry["hexcode"] not in told]
    told |= {extra.id: extra for extra in tell_extras(extras, list(told.values()), [line, colour])}

    id_of = {code_points(code): code for code in told}
    twemoji = twemoji_pictures(unpack(TWEMOJI, config.work) / "package", id_of)
    fluent = fluent_pictures(unpack(FLUENT_FLAT, config.work) / "package", [row["id"] for row in rows])

    # The pictures are compressed already. A row group holds one style only.
    with pq.ParquetWriter(config.out, schema(), compression="zstd", use_dictionary=["style"]) as file:
        for style, drawn in zip(STYLES, (line, colour, twemoji, fluent), strict=True):
            unused = {code: {"split": "unused"} for code in twins(drawn, told)}
            pictures = [
                vars(told[code])
                | unused.get(code, {})
                | {"style": style, "image": {"bytes": drawn[code], "path": f"{code.lower()}.webp"}}
                for code in sorted(drawn)
            ]
            file.write_table(pa.Table.from_pylist(pictures, schema=schema()))
    return config.out


def main() -> None:
    """Command line."""
    path = build(tyro.cli(Build))
    table = pq.read_table(path, columns=["style", "split"])
    counts = table.group_by(["style", "split"]).aggregate([([], "count_all")]).to_pylist()
    print(f"{path}: {table.num_rows} pictures, {path.stat().st_size / 1e6:.1f} MB")
    for row in sorted(counts, key=lambda row: (STYLES.index(row["style"]), row["split"])):
        print(f"  {row['style']:14} {row['split']:10} {row['count_all']:5}")


if __name__ == "__main__":
    main()
