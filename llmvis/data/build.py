"""Rebuild the embedded collection: `python -m llmvis.data.build --work /tmp/llmvis-build`.

Reads the Noto colour emoji font (Debian) and the emojibase names (npm), both pinned by
hash, and writes `llmvis/data/emoji.parquet`: every emoji without its skin-tone variants,
with the font's own 136 x 128 px PNG bytes untouched. Needs `fonttools`, which the
installed package does not. It knows nothing of models: the split is made from names and
pixels alone.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from PIL import Image

from llmvis.data import EMOJI_LANGUAGES, emoji_path
from llmvis.data.groups import leak_groups, split_of
from llmvis.data.packages import EMOJIBASE, NOTO, unpack

NEAR = 0.97  # correlation of two 24 x 24 pictures above which they are the same drawing
TEST, VALIDATION = 0.115, 0.09  # fractions of each category (where groups allow)
_REGIONAL = range(0x1F1E6, 0x1F200)


def glyph_pictures(font_file: Path) -> tuple[dict[tuple[int, ...], str], dict[str, bytes]]:
    """The font's drawings: code points (no variation selectors) → glyph name, and glyph name → PNG bytes."""
    from fontTools.ttLib import TTFont

    font = TTFont(font_file)
    cmap: dict[int, str] = font.getBestCmap()
    pictures = {name: glyph.imageData for name, glyph in font["CBDT"].strikeData[0].items()}
    codes_of: dict[str, tuple[int, ...]] = {name: (code,) for code, name in reversed(cmap.items())}
    sequences: dict[tuple[int, ...], str] = {(code,): name for code, name in cmap.items()}
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for table in lookup.SubTable:
            table = getattr(table, "ExtSubTable", table)
            if table.LookupType != 4:  # ligatures only
                continue
            for head, ligatures in table.ligatures.items():
                for ligature in ligatures:
                    parts = [head, *ligature.Component]
                    if all(part in codes_of for part in parts):
                        codes = tuple(code for part in parts for code in codes_of[part])
                        sequences.setdefault(codes, ligature.LigGlyph)
    return sequences, pictures


def code_points(hexcode: str) -> tuple[int, ...]:
    """'2764-FE0F-200D-1F525' → its code points without the variation selector FE0F."""
    return tuple(code for part in hexcode.split("-") if (code := int(part, 16)) != 0xFE0F)


def small_picture(png: bytes) -> np.ndarray:
    """float32 (1728,): 24 x 24 RGB on white, centred, unit norm; a dot product is a correlation."""
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    small = Image.alpha_composite(white, picture).convert("RGB").resize((24, 24), Image.Resampling.BOX)
    flat = np.asarray(small, np.float32).ravel()
    flat = flat - flat.mean()
    unit: np.ndarray = flat / np.linalg.norm(flat)
    return unit


def rows_of(font_file: Path, emojibase: Path) -> list[dict[str, Any]]:
    """One row for each emoji that the font draws, in Unicode's own order; split not yet set."""
    sequences, pictures = glyph_pictures(font_file)
    meta = json.loads((emojibase / "meta" / "groups.json").read_text())
    names = {
        language: {
            entry["hexcode"]: entry for entry in json.loads((emojibase / language / "data.json").read_text())
        }
        for language in ("en", *EMOJI_LANGUAGES)
    }
    rows = []
    for entry in sorted(names["en"].values(), key=lambda e: e.get("order", 1 << 30)):
        glyph = sequences.get(code_points(entry["hexcode"]))
        png = pictures.get(glyph or "")
        if png is None or "group" not in entry or meta["groups"][str(entry["group"])] == "component":
            continue
        row = {
            "id": entry["hexcode"],
            "image": {"bytes": png, "path": f"{entry['hexcode'].lower()}.png"},
            "emoji": entry["emoji"],
            "caption": entry["label"],
            "keywords": entry.get("tags", []),
            "category": meta["groups"][str(entry["group"])],
            "subcategory": meta["subgroups"][str(entry["subgroup"])],
        }
        for language in EMOJI_LANGUAGES:
            there = names[language].get(entry["hexcode"], {})
            row[f"name_{language}"] = there.get("label")
            row[f"keywords_{language}"] = there.get("tags", [])
        rows.append(row)
    return rows


def schema() -> pa.Schema:
    """Columns of the collection, with the key that makes Hugging Face `datasets` show pictures."""
    fields = [
        ("id", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("emoji", pa.string()),
        ("caption", pa.string()),
        ("keywords", pa.list_(pa.string())),
        *[
            (f"{column}_{language}", kind)
            for language in EMOJI_LANGUAGES
            for column, kind in (("name", pa.string()), ("keywords", pa.list_(pa.string())))
        ],
        ("category", pa.string()),
        ("subcategory", pa.string()),
        ("group", pa.string()),
        ("split", pa.string()),
    ]
    features = {
        name: {"_type": "Image"}
        if name == "image"
        else {"_type": "List", "feature": {"dtype": "string", "_type": "Value"}}
        if pa.types.is_list(kind)
        else {"dtype": "string", "_type": "Value"}
        for name, kind in fields
    }
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": features}})})


@dataclass(frozen=True, kw_only=True)
class Build:
    """Rebuild llmvis/data/emoji.parquet from the Debian font and the npm names.

    Example: python -m llmvis.data.build --work /tmp/llmvis-build
    """

    work: Path
    """Folder for downloads; files already there are used."""
    out: Path = field(default_factory=emoji_path)
    """Where the Parquet file goes."""


def build(config: Build) -> Path:
    """Write the collection and return its path."""
    font = unpack(NOTO, config.work) / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
    rows = rows_of(font, unpack(EMOJIBASE, config.work) / "package")
    pixels = np.stack([small_picture(row["image"]["bytes"]) for row in rows])
    groups = leak_groups([row["caption"] for row in rows], pixels, NEAR)
    splits = split_of(groups, [row["category"] for row in rows], TEST, VALIDATION)
    for row, group, split in zip(rows, groups, splits, strict=True):
        row |= {"group": group, "split": split}
    table = pa.Table.from_pylist(rows, schema=schema())
    pq.write_table(table, config.out, compression="zstd", row_group_size=512)
    return config.out


def main() -> None:
    """Command line."""
    path = build(tyro.cli(Build))
    table = pq.read_table(path)
    counts = table.group_by("split").aggregate([("id", "count")])
    sides = dict(zip(counts["split"].to_pylist(), counts["id_count"].to_pylist(), strict=True))
    groups = len(set(table["group"].to_pylist()))
    print(f"{path}: {table.num_rows} pictures, {path.stat().st_size / 1e6:.1f} MB, {sides}, {groups} groups")


if __name__ == "__main__":
    main()
