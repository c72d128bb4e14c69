"""The further styles: pictures, split, pairs, licences, and how their rows are told."""

from __future__ import annotations

import io
import json
import tomllib
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter

from llmvis.data import load_emoji
from llmvis.data.build_styles import Told, fluent_svg, name_words, tell_extras, webp
from llmvis.data.groups import variant_key
from llmvis.data.styles import COLUMNS, LICENCES, NOTO, STYLES, load_pairs, load_style, styles_path

SIZE = {"openmoji-line": 128, "openmoji": 128, "twemoji": 64, "fluent-flat": 64}
COUNTS = {
    "openmoji-line": {"train": 1684, "validation": 143, "test": 192, "unused": 89},
    "openmoji": {"train": 1672, "validation": 143, "test": 192, "unused": 102},
    "twemoji": {"train": 1561, "validation": 143, "test": 192, "unused": 9},
    "fluent-flat": {"train": 1255, "validation": 143, "test": 192, "unused": 5},
}


def opened(image: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(image["bytes"])).convert("RGBA")


def on_white(image: dict[str, Any], size: int) -> np.ndarray:
    """float32 (size, size, 3) in [0, 1]."""
    picture = opened(image).resize((size, size), Image.Resampling.BOX)
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB"), np.float32) / 255


def copying(pairs: pa.Table) -> float:
    """Mean PSNR in dB of the source as the answer; a copy that is exact counts as 40 dB."""
    errors = [
        float(np.mean((on_white(source, 64) - on_white(target, 64)) ** 2))
        for source, target in zip(pairs["source"].to_pylist(), pairs["target"].to_pylist(), strict=True)
    ]
    return float(np.mean(-10 * np.log10(np.maximum(errors, 1e-4))))


@pytest.mark.parametrize("style", STYLES)
def test_every_picture_decodes_and_shows_something(style: str) -> None:
    for row in load_style(style, columns=["id", "image"]).to_pylist():
        picture = opened(row["image"])
        assert picture.size == (SIZE[style], SIZE[style])
        assert picture.getchannel("A").getbbox(), row["id"]
        assert row["image"]["path"] == f"{row['id'].lower()}.webp"


def test_file_is_small_and_tells_its_licences_and_pictures() -> None:
    assert styles_path().stat().st_size < 12e6
    told = pq.read_schema(styles_path()).metadata
    assert json.loads(told[b"licences"]) == LICENCES
    assert set(LICENCES) == set(STYLES)
    assert json.loads(told[b"huggingface"])["info"]["features"]["image"] == {"_type": "Image"}


@pytest.mark.parametrize("style", STYLES)
def test_counts_ids_and_order(style: str) -> None:
    table = load_style(style)
    ids = table["id"].to_pylist()
    assert Counter(table["split"].to_pylist()) == COUNTS[style]
    assert ids == sorted(set(ids))
    assert set(table["style"].to_pylist()) == {style}
    assert all(table["caption"].to_pylist())


def test_what_the_collection_has_is_told_as_the_collection_tells_it() -> None:
    columns = ["id", "caption", "keywords", "group", "split"]
    known = {row["id"]: row for row in load_emoji(columns=columns).to_pylist()}
    bare = {code.replace("-FE0F", "") for code in known}
    for style in STYLES:
        for row in load_style(style, columns=columns).to_pylist():
            if row["id"] in known:
                told = known[row["id"]]
                assert row == told or (told["split"] == "train" and row == told | {"split": "unused"})
            else:  # not the same emoji with another spelling of its code points
                assert row["id"].replace("-FE0F", "") not in bare
                assert row["split"] in ("train", "unused")


def test_neither_a_group_nor_a_name_is_on_two_sides() -> None:
    sides: dict[str, set[str]] = defaultdict(set)
    for style in (NOTO, *STYLES):
        for row in load_style(style, columns=["caption", "group", "split"]).to_pylist():
            if row["split"] != "unused":
                sides["group:" + row["group"]].add(row["split"])
                sides["name:" + variant_key(row["caption"].lower())].add(row["split"])
    assert [key for key, found in sides.items() if len(found) > 1] == []


def test_skin_tones_and_openmoji_s_country_flags_are_left_out() -> None:
    tones = {f"1F3F{digit}" for digit in "BCDEF"}
    for style in STYLES:
        rows = load_style(style, columns=["id", "caption"]).to_pylist()
        assert not any(tones & set(row["id"].split("-")) for row in rows)
        flags = sum(row["caption"].startswith("flag: ") for row in rows)
        assert flags > 250 if style == "twemoji" else flags == 0


def test_line_and_colour_lie_on_each_other() -> None:
    pairs = load_pairs("openmoji-line", "openmoji")
    assert pairs.num_rows == 2108
    inside = []
    for source, target in zip(pairs["source"].to_pylist(), pairs["target"].to_pylist(), strict=True):
        line = np.asarray(opened(source).getchannel("A")) > 127
        colour = opened(target).getchannel("A").filter(ImageFilter.MaxFilter(5))
        inside.append((line & (np.asarray(colour) > 16)).sum() / line.sum())
    assert np.mean(np.array(inside) > 0.99) > 0.99


def test_copying_the_line_is_a_baseline_between_15_and_17_db() -> None:
    assert 15 < copying(load_pairs("openmoji-line", "openmoji", "test")) < 17


def test_pairs_join_by_id_in_order() -> None:
    pairs = load_pairs(NOTO, "twemoji")
    assert pairs.num_rows == 1898
    assert pairs.column_names == ["id", "caption", "keywords", "group", "split", "source", "target"]
    assert pairs["id"].to_pylist() == sorted(pairs["id"].to_pylist())
    for row in pairs.slice(0, 50).to_pylist():
        assert row["source"]["path"] == f"{row['id'].lower()}.png"
        assert row["target"]["path"] == f"{row['id'].lower()}.webp"
    assert pairs.equals(load_pairs(NOTO, "twemoji"))
    turned = load_pairs("twemoji", NOTO, "test")
    assert turned.num_rows == 192 and set(turned["split"].to_pylist()) == {"test"}
    assert load_pairs(NOTO, "fluent-flat").num_rows == 1595
    assert load_pairs(NOTO, "openmoji", "unused").num_rows == 0


def test_columns_are_chosen_and_wrong_names_refused() -> None:
    assert load_style("twemoji", "test", ["caption"]).column_names == ["caption"]
    assert load_style(NOTO).column_names == list(COLUMNS)
    assert load_style(NOTO, columns=["style", "id"]).column_names == ["style", "id"]
    with pytest.raises(ValueError, match="no style 'crayon': choose from noto"):
        load_style("crayon")
    with pytest.raises(ValueError, match="no column 'emoji'"):
        load_style("twemoji", columns=["emoji"])


def test_licences_lie_beside_the_data_and_are_packaged() -> None:
    folder = styles_path().parent / "licences"
    for name, words in {
        "openmoji-CC-BY-SA-4.0.txt": "Attribution-ShareAlike 4.0 International Public",
        "CC-BY-4.0.txt": "Attribution 4.0 International Public License",
        "fluentui-emoji-MIT.txt": "Copyright (c) Microsoft Corporation",
        "NOTICE-styles.md": "designed by OpenMoji",
    }.items():
        assert words in (folder / name).read_text(), name
    notice = (folder / "NOTICE-styles.md").read_text()
    assert all(f"`{style}`" in notice for style in STYLES)
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert "llmvis/data/licences/*" in project["project"]["license-files"]
    packaged = project["tool"]["setuptools"]["package-data"]["llmvis"]
    assert {"data/*.parquet", "data/licences/*"} <= set(packaged)


def test_extras_that_resemble_a_held_out_emoji_are_unused() -> None:
    rng = np.random.default_rng(0)

    def drawing() -> bytes:
        picture = webp(Image.fromarray(rng.integers(0, 255, (32, 32, 4), np.uint8)))
        assert picture is not None
        return picture

    collection = [
        Told("1", "axe", [], "axe", "test"),
        Told("2", "volcano", [], "volcano", "validation"),
        Told("3", "right arrow", [], "arrow", "train"),
        Told("4", "manual wheelchair", [], "manual wheelchair", "test"),
        Told("5", "woman astronaut", [], "astronaut", "test"),
    ]
    pictures = {str(code): drawing() for code in range(1, 13)}
    pictures["12"] = pictures["2"]
    names = ["axes", "warning volcano", "arrow turn right", "man astronaut", "tea pot", "mole", "ashes"]
    extras = [
        {"hexcode": str(6 + i), "annotation": name, "tags": "a, b", "openmoji_tags": "b,c"}
        for i, name in enumerate(names)
    ]
    told = list(tell_extras(extras, collection, [pictures]))
    assert [(emoji.caption, emoji.group, emoji.split) for emoji in told] == [
        ("axes", "axe", "unused"),
        ("warning volcano", "volcano", "unused"),
        ("arrow turn right", "arrow", "train"),
        ("man astronaut", "astronaut", "unused"),
        ("tea pot", "tea pot", "train"),
        ("mole", "mole", "train"),
        ("ashes", "volcano", "unused"),  # the same pixels
    ]
    assert told[0].keywords == ["a", "b", "c"]
    assert name_words("Roasted coffee beans") == ["roasted", "coffee", "bean"]


def test_an_alias_is_its_parent_mirrored_in_a_square() -> None:
    icons = {
        "width": 32,
        "height": 32,
        "icons": {"left": {"body": "<path/>"}, "tall": {"body": "<g/>", "height": 33}},
        "aliases": {"right": {"parent": "left", "hFlip": True}},
    }
    assert 'viewBox="0 0 32 32"><g transform="translate(32 0) scale(-1 1)"><path/></g>' in fluent_svg(
        icons, "right"
    )
    assert 'viewBox="-0.5 0 33 33"' in fluent_svg(icons, "tall")


def test_an_empty_drawing_is_none() -> None:
    assert webp(Image.new("RGBA", (8, 8))) is None
