"""The embedded collection, its split, and the cleaning of openclipart."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llmvis.data import EMOJI_LANGUAGES, emoji_path, load_emoji
from llmvis.data.build import code_points, small_picture
from llmvis.data.groups import leak_groups, series_of, split_of, variant_key
from llmvis.data.openclipart import clean_title, file_words, find_openclipart, load_openclipart, read_metadata
from llmvis.data.packages import NOTO, fetch

RDF = """<svg xmlns="http://www.w3.org/2000/svg"><metadata><rdf:RDF><cc:Work>
<dc:title>{title}</dc:title><dc:subject><rdf:Bag><rdf:li>hash</rdf:li><rdf:li>{keyword}</rdf:li></rdf:Bag></dc:subject>
<dc:creator><cc:Agent><dc:title>{author}</dc:title></cc:Agent></dc:creator>
<cc:license rdf:resource="{licence}"/></cc:Work></rdf:RDF></metadata></svg>"""
PUBLIC = "http://web.resource.org/cc/PublicDomain"


def test_collection_is_small_and_complete() -> None:
    table = load_emoji()
    assert emoji_path().stat().st_size < 12e6
    assert 1850 < table.num_rows < 1950
    assert len(set(table["id"].to_pylist())) == table.num_rows
    for column in ("caption", *(f"name_{language}" for language in EMOJI_LANGUAGES)):
        assert all(table[column].to_pylist()), column
    assert {"de", "fr", "es", "zh", "ja"} <= set(EMOJI_LANGUAGES)


def test_pictures_decode_at_the_font_s_size() -> None:
    for row in load_emoji("validation", columns=["image"]).to_pylist():
        picture = Image.open(io.BytesIO(row["image"]["bytes"]))
        assert picture.size == (136, 128)
        assert picture.convert("RGBA").getchannel("A").getextrema() != (0, 0)


def test_hugging_face_would_show_the_pictures() -> None:
    told = json.loads(pq.read_schema(emoji_path()).metadata[b"huggingface"])
    assert told["info"]["features"]["image"] == {"_type": "Image"}


def test_licences_lie_beside_the_data() -> None:
    names = {file.name for file in (emoji_path().parent / "licences").iterdir()}
    assert {
        "NOTICE.md",
        "Apache-2.0.txt",
        "OFL-1.1.txt",
        "emojibase-MIT.txt",
        "Unicode-DFS-2016.txt",
    } <= names


def test_no_skin_tones() -> None:
    tones = {f"1F3F{digit}" for digit in "BCDEF"}
    assert not any(tones & set(code.split("-")) for code in load_emoji()["id"].to_pylist())


def test_split_keeps_groups_and_variants_on_one_side() -> None:
    rows = load_emoji(columns=["caption", "group", "split"]).to_pylist()
    sides: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        sides["group:" + row["group"]].add(row["split"])
        sides["name:" + variant_key(row["caption"])].add(row["split"])
    assert all(len(found) == 1 for found in sides.values())
    assert 180 <= sum(row["split"] == "test" for row in rows) <= 200


def test_every_category_is_held_out_except_flags_of_countries() -> None:
    rows = load_emoji("test", columns=["category", "caption"]).to_pylist()
    assert len({row["category"] for row in rows}) == 9
    assert not any(row["caption"].startswith("flag: ") for row in rows)


def test_groups_join_variants_series_and_near_pixels() -> None:
    names = ["woman cook", "cook", "one-thirty", "six o’clock", "apple", "green apple", "pear"]
    pixels = np.eye(7, dtype=np.float32)
    pixels[5] = pixels[4]
    groups = leak_groups(names, pixels, near=0.97)
    assert groups[0] == groups[1]
    assert groups[2] == groups[3] == "clock-face"
    assert groups[4] == groups[5] != groups[6]
    assert series_of("flag: France") == "country-flag"


def test_split_moves_whole_groups_and_is_fixed() -> None:
    groups = [f"g{i // 2}" for i in range(200)]
    splits = split_of(groups, ["things"] * 200, test=0.2, validation=0.1)
    assert splits == split_of(groups, ["things"] * 200, test=0.2, validation=0.1)
    assert (splits.count("test"), splits.count("validation")) == (40, 20)
    assert splits[0::2] == splits[1::2]


def test_code_points_leave_variation_selectors_out() -> None:
    assert code_points("2764-FE0F-200D-1F525") == (0x2764, 0x200D, 0x1F525)


def test_titles_lose_credits_and_numbers() -> None:
    assert clean_title("Clipart by Nicu Buculei - arrow08_4") == "arrow"
    assert clean_title("home13") == "home"
    assert file_words("food/pancake_bw_ganson_01.png", "Gerald Ganson") == "pancake bw"


def test_metadata_is_read_from_rdf() -> None:
    told = read_metadata(
        RDF.format(title="Dog &amp;amp; cat", keyword="pet_food", author="A", licence=PUBLIC)
    )
    assert told == {"title": "Dog & cat", "keywords": ["pet food"], "author": "A", "licences": [PUBLIC]}


def test_openclipart_drops_links_other_licences_and_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMVIS_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "clips"
    rng = np.random.default_rng(0)

    def add(name: str, pixels: np.ndarray, licence: str = PUBLIC) -> None:
        for part, suffix in (("png", ".png"), ("svg", ".svg")):
            (root / part).mkdir(parents=True, exist_ok=True)
            file = (root / part / name).with_suffix(suffix)
            if part == "png":
                Image.fromarray(pixels).save(file)
            else:
                file.write_text(RDF.format(title=name, keyword="x", author="A", licence=licence))

    pictures = rng.integers(0, 255, (4, 300, 400, 3), np.uint8)
    for i, name in enumerate(("dog", "cat", "cow")):
        add(name, pictures[i])
    add("copy of dog", pictures[0])
    add("not free", pictures[3], licence="http://creativecommons.org/licenses/GPL/2.0/")
    (root / "png" / "link.png").symlink_to("dog.png")
    (root / "svg" / "link.svg").symlink_to("dog.svg")
    found = find_openclipart(tmp_path / "clips")
    assert found is not None
    table = load_openclipart(found)
    assert sorted(table["caption"].to_pylist()) == [
        "cat",
        "copy of dog",
        "cow",
    ]  # the first of two copies stays
    assert Image.open(io.BytesIO(table["image"][0]["bytes"].as_py())).size == (256, 192)


def test_a_folder_without_openclipart_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs png/ and svg/"):
        find_openclipart(tmp_path)


def test_a_package_with_another_hash_is_refused(tmp_path: Path) -> None:
    (tmp_path / NOTO.filename).write_bytes(b"something else")
    with pytest.raises(ValueError, match="delete it and run again"):
        fetch(NOTO, tmp_path)


def test_small_pictures_are_centred_and_unit() -> None:
    out = io.BytesIO()
    Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)).save(out, "PNG")
    flat = small_picture(out.getvalue())
    assert flat.shape == (1728,)
    assert abs(flat.sum()) < 1e-3 and abs(np.linalg.norm(flat) - 1) < 1e-5
