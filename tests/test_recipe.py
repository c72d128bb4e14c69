"""Recipes and the pictures they name: packaged sets, a user's folders, and what is wrong with a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from llmvis.pictures import Pictures, fit, load_collection, load_pairs, on_white
from llmvis.recipe import Collection, Pairs, Recipe, read_recipe
from llmvis.schema import UserError


def painted(folder: Path, names: list[str], colour: tuple[int, int, int]) -> Path:
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        image = Image.new("RGB", (40, 20 + i), (255, 255, 255))
        image.paste(colour, (5, 5, 20, 15))
        image.save(folder / name)
    return folder


def test_the_packaged_recipe_reads() -> None:
    recipe = read_recipe()
    assert {part.name for part in recipe.pairs} == {"colour", "twemoji style"}
    assert all("{caption}" in part.instructions[-1] for part in recipe.pairs)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("collections: [{name: a, images: emoji}]\ntasks: {paint: 1}", "unknown tasks paint"),
        ("tasks: {generate: 1}", "needs collections or pairs"),
        ("collections: [{name: a, images: emoji}]\ntasks: {translate: 1}", "translate needs pairs"),
        ("pairs: [{name: a, source: x, target: y, instructions: [z]}]", "need collections"),
        ("collections: [{name: a, images: emoji, side: 4}]", "unexpected keyword argument 'side'"),
        ("pictures: []", "must hold collections, pairs, tasks, not pictures"),
        ("collections: [{name: a, images: emoji}, {name: a, images: twemoji}]", "one name"),
        ("collections: [{name: ../a, images: emoji}]", "letters, digits"),
        (
            "pairs: [{name: a, source: x, target: y, instructions: paint it}]\ntasks: {translate: 1}",
            "a list of texts",
        ),
        ("collections: [{name: a, images: emoji}]\ntasks: {generate: -1}", "weights are numbers from 0 up"),
        ("collections: [{name: a, images: emoji, weight: much}]", "weights are numbers from 0 up"),
        ("collections: [{name: a, images: emoji}]\ntasks: {generate: 0}", "a weight above 0"),
        ("collections: [{name: a, images: emoji, weight: 0}]", "a weight above 0"),
        ("[1", "recipe.yaml"),
    ],
)
def test_a_wrong_recipe_is_told_what_is_wrong(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        read_recipe(file)


def test_a_user_s_pairs_meet_by_name_and_take_the_captions(tmp_path: Path) -> None:
    names = [f"p{i:02}.png" for i in range(30)]
    source = painted(tmp_path / "line", names, (0, 0, 0))
    target = painted(tmp_path / "colour", [n.replace("png", "jpg") for n in names[3:]], (255, 0, 0))
    (source / "p05.txt").write_text("a five")
    (target / "p08.jpg").write_bytes(b"\xff\xd8\xff broken")
    part = Pairs(name="mine", source=str(source), target=str(target), instructions=("paint it",))
    before, after = load_pairs(part, 32)
    ids = [row.id for row in before.rows]
    assert ids == [row.id for row in after.rows] == [f"p{i:02}" for i in range(3, 30) if i != 8]
    assert {row.caption for row in before.rows} == {"", "a five"}
    assert on_white(before.pixels[0])[15, 8].max() < 40
    assert on_white(after.pixels[0])[15, 8][0] > 200 > on_white(after.pixels[0])[15, 8][1]
    assert sum(after.left_out.values()) == 1
    assert 0 < len(before.where("train")) < 26 + 1
    with pytest.raises(UserError, match="no picture of"):
        load_pairs(Pairs(name="x", source=str(source), target="twemoji", instructions=("y",)), 32)


def test_rows_of_a_parquet_file_are_split_and_paired_by_their_number(tmp_path: Path) -> None:
    data = painted(tmp_path / "x", ["p.png"], (9, 9, 9)).joinpath("p.png").read_bytes()
    for name in ("before", "after"):
        rows = [{"image": {"bytes": data, "path": None}, "caption": f"c{i}"} for i in range(200)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    part = Pairs(
        name="p",
        source=str(tmp_path / "before.parquet"),
        target=str(tmp_path / "after.parquet"),
        instructions=("paint",),
    )
    before, _ = load_pairs(part, 8)
    assert [row.caption for row in before.rows] == [f"c{i}" for i in range(200)]
    assert 160 < len(before.where("train")) < 198 and len(before.where("test"))


def test_held_out_groups_are_the_same_in_every_hand() -> None:
    line, colour = load_pairs(read_recipe().pairs[0], 32)
    noto = {row.id: row.split for row in load_collection(Collection(name="e", images="emoji"), 32).rows}
    both = [(row.split, noto[row.id]) for row in line.rows if row.id in noto]
    assert {pair for pair in both if pair[0] != pair[1]} <= {("unused", "train")}
    assert len(line.where("test")) == 192 == len(colour.where("test"))


def test_a_picture_is_fitted_whole_and_a_box_is_cut(tmp_path: Path) -> None:
    image = Image.new("RGBA", (100, 50), (0, 0, 0, 0))
    image.paste((255, 0, 0, 255), (40, 20, 60, 30))
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    whole, cut = np.asarray(fit(data, 40)), np.asarray(fit(data, 40, box=True))
    assert whole.shape == cut.shape == (40, 40, 4)
    assert 20 < (whole[..., 3] > 128).sum() < 45
    assert (cut[..., 3] > 128).sum() > 500
    assert (on_white(whole)[0, 0] == 255).all()
    assert fit(b"no picture", 40) == "not_an_image"


def test_a_picture_is_fitted_upright_and_sixteen_bits_are_rescaled(tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 30), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 30, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    turned = np.asarray(fit((tmp_path / "turned.jpg").read_bytes(), 40)).astype(int)
    assert (turned[:, [0, 5, 34, 39], 3] == 0).all() and (turned[:, 12:28, 3] == 255).all()
    assert turned[8, 20, 0] > 240 > 10 > turned[8, 20, 2] and turned[32, 20, 2] > 240
    Image.fromarray(np.full((9, 9), 100 * 257, np.uint16)).save(tmp_path / "grey.png")
    grey = np.asarray(fit((tmp_path / "grey.png").read_bytes(), 9))
    assert (grey == (100, 100, 100, 255)).all()


def test_pictures_survive_the_disk(tmp_path: Path) -> None:
    pictures = load_collection(Collection(name="e", images="twemoji"), 8)
    pictures.save(tmp_path / "kept")
    again = Pictures.load(tmp_path / "kept")
    assert again.rows == pictures.rows and (again.pixels == pictures.pixels).all()
    assert len(again.judged(10)) == 10 and again.rows[int(again.judged(10)[0])].split == "validation"


def test_a_recipe_describes_itself_as_json() -> None:
    recipe = Recipe(collections=(Collection(name="a", images="emoji"),))
    assert recipe.describe()["collections"][0]["images"] == "emoji"
