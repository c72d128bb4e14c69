"""Quality gates: what is blank, what is the same picture, and who stays, against a slow reference."""

from __future__ import annotations

import math
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from llmvis import gates
from llmvis.data import load_emoji
from llmvis.dataset import judged, no_pictures
from llmvis.gates import (
    GateConfig,
    GateRows,
    count_reasons,
    cross_modal,
    decide,
    gate_lines,
    is_blank,
    load_scorer,
    picture_digest,
    scores,
)
from llmvis.images import decode
from llmvis.index.seen import Seen
from llmvis.ledger import dead_row
from llmvis.schema import DEAD_LETTER, ItemError, Reason, UserError
from tests.catalogue import encoded, gradient16, photo

# one picture


def reopened(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    return Image.open(BytesIO(encoded(image, kind, **options)))


def on_white(*pixels: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", (64, 64), "white")
    for at in pixels:
        image.putpixel(at, (0, 0, 0))
    return image


def test_real_drawings_and_photographs_are_not_blank() -> None:
    drawings = load_emoji(columns=["image"])["image"].to_pylist()
    for drawing in drawings[::40]:
        assert not is_blank(Image.open(BytesIO(drawing["bytes"])))
        assert not is_blank(decode(drawing["bytes"]).image)
    assert not is_blank(photo())
    assert not is_blank(photo().convert("L"))


@pytest.mark.parametrize("colour", ["white", "black", "#c04010"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_one_colour_is_blank_also_with_a_coders_noise(colour: str, kind: str) -> None:
    image = reopened(Image.new("RGB", (64, 48), colour), kind)
    assert is_blank(image)
    noise = np.random.default_rng(0).integers(-1, 2, (48, 64, 3))
    assert is_blank(Image.fromarray((np.asarray(image).astype(int) + noise).clip(0, 255).astype(np.uint8)))


def test_a_speck_is_blank_and_a_small_figure_is_not() -> None:
    spots = [(i, j) for i in range(5) for j in range(5)]
    assert is_blank(on_white(*spots[:20]))  # 0.488 % of the area
    assert not is_blank(on_white(*spots[:21]))  # 0.513 %


def test_two_colours_half_and_half_and_a_faint_gradient_are_not_blank() -> None:
    halves = np.full((8, 8, 3), 255, np.uint8)
    halves[:4] = 0
    assert not is_blank(Image.fromarray(halves))
    faint = np.tile(np.linspace(120, 135, 64).astype(np.uint8), (64, 1))
    assert not is_blank(Image.fromarray(faint))


def test_16_bit_grey_is_judged_by_its_own_range() -> None:
    gradient = reopened(Image.fromarray(gradient16()), "PNG")
    assert gradient.mode.startswith("I")
    assert not is_blank(gradient)
    bright = Image.fromarray((gradient16() // 2 + 20_000).astype(np.uint16))  # convert() would make it white
    assert not is_blank(bright)
    assert is_blank(Image.fromarray(np.full((16, 16), 40_000, np.uint16)))
    with pytest.raises(ValueError, match="floating-point"):
        is_blank(Image.fromarray(np.zeros((4, 4), np.float32)))


def test_transparency_is_white_whatever_colour_lies_beneath() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), np.uint8)
    pixels[..., 3] = 0
    assert is_blank(Image.fromarray(pixels))
    pixels[8:24, 8:24] = (0, 0, 0, 255)
    assert not is_blank(Image.fromarray(pixels))
    pixels[8:24, 8:24] = (255, 255, 255, 255)
    assert is_blank(Image.fromarray(pixels))


@pytest.mark.parametrize(
    "image",
    [*(photo().convert(mode) for mode in ("RGB", "RGBA", "P", "L", "1")), Image.fromarray(gradient16())],
    ids=["RGB", "RGBA", "palette", "grey", "1 bit", "16 bit"],
)
def test_a_picture_saved_again_as_png_is_the_same_picture(image: Image.Image) -> None:
    digests = {picture_digest(reopened(image, "PNG", compress_level=level)) for level in (1, 9)}
    assert digests == {picture_digest(image)}


def test_other_lossless_encodings_give_the_same_digest_and_jpeg_another() -> None:
    image = photo()
    assert picture_digest(reopened(image, "BMP")) == picture_digest(image)
    assert picture_digest(reopened(image, "WEBP", lossless=True)) == picture_digest(image)
    assert picture_digest(reopened(image, "JPEG", quality=95)) != picture_digest(image)


def test_16_bit_pictures_differ_by_a_pixel_and_not_by_the_order_of_bytes() -> None:
    values = gradient16() // 3
    little = Image.fromarray(values).copy()  # not the memory of `values`
    big = Image.frombytes("I;16B", little.size, values.astype(">u2").tobytes())
    assert big.tobytes() != little.tobytes()
    assert picture_digest(big) == picture_digest(little)
    values[-1, -1] -= 1
    assert picture_digest(Image.fromarray(values)) != picture_digest(little)


def test_one_pixel_the_shape_the_mode_or_the_palette_makes_another_picture() -> None:
    image = photo()
    other = image.copy()
    other.putpixel((3, 3), tuple(255 - v for v in image.getpixel((3, 3))))  # type: ignore[union-attr]
    turned = Image.frombytes("RGB", (image.height, image.width), image.tobytes())
    indices = np.arange(16, dtype=np.uint8).reshape(4, 4)
    red, blue = Image.fromarray(indices).convert("P"), Image.fromarray(indices).convert("P")
    red.putpalette([v for i in range(16) for v in (16 * i, 0, 0)])
    blue.putpalette([v for i in range(16) for v in (0, 0, 16 * i)])
    assert red.tobytes() == blue.tobytes()
    pictures = [image, other, turned, image.convert("RGBA"), photo(seed=1), red, blue]
    assert len({picture_digest(p) for p in pictures}) == len(pictures)


# scores


def test_cross_modal_is_the_cosine_row_by_row() -> None:
    pictures = np.array([[3, 4], [1, 0], [0, 0]], np.float16)
    texts = np.array([[4, 3], [-2, 0], [1, 0]], np.float32)
    found = cross_modal(pictures, texts)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [0.96, -1, 0], atol=1e-6)
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(2, 2\)"):
        cross_modal(pictures, texts[:2])


SCORERS = """
import numpy as np

class Brightness:
    name = "brightness"
    def score(self, pictures, texts):
        return np.array([np.asarray(p).mean() for p in pictures])

class Nameless:
    def score(self, pictures, texts): ...

class Lazy(Brightness):
    def score(self, pictures, texts):
        return np.zeros((len(pictures), 1))

class Chatty(Brightness):
    def score(self, pictures, texts):
        return np.array(["good"] * len(pictures))

def score(pictures, texts):
    return [0] * len(pictures)

number = 3
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "users_scores.py").write_text(SCORERS)
    (tmp_path / "users_broken.py").write_text("import a_package_that_is_not_there")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "users_scores", raising=False)
    return "users_scores"


def test_a_users_scorer_is_loaded_by_its_import_path(user_module: str) -> None:
    scorer = load_scorer(f"{user_module}:Brightness")
    found = scores(scorer, [Image.new("RGB", (4, 4), c) for c in ("black", "white")], ["night", "snow"])
    assert found.dtype == np.float32
    assert found.tolist() == [0, 255]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("users_scores", "write module:callable"),
        ("users_scores:", "write module:callable"),
        ("../users_scores:Brightness", "write module:callable"),
        ("users_nowhere:Brightness", "no module 'users_nowhere'"),
        ("users_scores.deeper:Brightness", "no module 'users_scores.deeper'"),
        ("users_scores:Missing", "no callable 'Missing'"),
        ("users_scores:number", "no callable 'number'"),
        ("users_scores:Nameless", "needs `name`"),
        ("users_scores:score", "without arguments .*'pictures'.*: give a class"),
    ],
)
def test_a_name_that_is_no_scorer_is_explained(user_module: str, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_scorer(name)


def test_what_the_users_module_lacks_itself_is_not_hidden(user_module: str) -> None:
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        load_scorer("users_broken:Scorer")


@pytest.mark.parametrize("name", ["Lazy", "Chatty"])
def test_a_scorer_that_does_not_give_one_number_each_is_explained(user_module: str, name: str) -> None:
    with pytest.raises(UserError, match="one number each"):
        scores(load_scorer(f"{user_module}:{name}"), [photo(), photo()], ["a", "b"])


# configuration


@pytest.mark.parametrize(
    "values",
    [
        {"min_score": 1.5},
        {"min_score": math.nan},
        {"near_duplicates": -0.1},
        {"in_index": 97.0},
        {"best": 0},
        {"scorer": "my:Scorer"},
        {"min_user_score": 0.5},
        {"scorer": "my:Scorer", "min_user_score": math.inf},
    ],
    ids=str,
)
def test_a_setting_out_of_its_range_is_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--{list(values)[-1].replace('_', '-')}"):
        GateConfig(**values)


def test_a_gate_whose_column_is_not_given_is_an_error() -> None:
    rows = GateRows(group=["a"], blank=np.zeros(1, bool), digest=["x"])
    assert decide(rows, GateConfig()) == [None]
    with pytest.raises(ValueError, match="score, embedding"):
        decide(rows, GateConfig(best=1, near_duplicates=0.9))
    with pytest.raises(ValueError, match="digest has 2 rows, group has 1"):
        GateRows(group=["a"], digest=["x", "y"])


# who stays


def slow_decide(rows: GateRows, config: GateConfig) -> list[Reason | None]:
    """The same by the definition, one row and one pair at a time."""
    n = len(rows.group)
    reasons: list[Reason | None] = [None] * n

    def cosine(i: int, j: int) -> float:
        a, b = rows.embedding[i].tolist(), rows.embedding[j].tolist()
        norm = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
        return sum(x * y for x, y in zip(a, b, strict=True)) / norm if norm else 0.0

    for i in range(n):
        earlier = [j for j in range(i) if reasons[j] is None]
        if config.blank and rows.blank[i]:
            reasons[i] = Reason.BLANK
        elif (config.min_score is not None and not rows.score[i] >= config.min_score) or (
            config.min_user_score is not None and not rows.user_score[i] >= config.min_user_score
        ):
            reasons[i] = Reason.LOW_SCORE
        elif config.duplicates and any(
            rows.digest[i] == rows.digest[j]
            for j in range(i)
            if reasons[j] not in (Reason.BLANK, Reason.LOW_SCORE)
        ):
            reasons[i] = Reason.DUPLICATE_PICTURE
        elif config.near_duplicates is not None and any(
            cosine(i, j) > config.near_duplicates for j in earlier
        ):
            reasons[i] = Reason.NEAR_DUPLICATE
    for i in range(n):
        if reasons[i] is None and config.in_index is not None and rows.index_cosine[i] > config.in_index:
            reasons[i] = Reason.IN_INDEX
    if config.best is not None:
        value = [-math.inf if math.isnan(s) else float(s) for s in rows.score]
        left = [i for i in range(n) if reasons[i] is None]
        for i in left:
            better = [
                j
                for j in left
                if rows.group[j] == rows.group[i]
                and (value[j] > value[i] or (value[j] == value[i] and j < i))
            ]
            if len(better) >= config.best:
                reasons[i] = Reason.NOT_BEST
    return reasons


def chance_rows(seed: int, n: int) -> GateRows:
    """N rows full of ties: few groups, scores, digests; cosines are exact multiples of 1/4."""
    rng = np.random.default_rng(seed)
    embedding = np.zeros((n, 9), np.float16)
    for row in embedding:
        row[rng.choice(9, 4, replace=False)] = rng.choice([-0.5, 0.5, 0.5], 4)
    embedding[rng.random(n) < 0.03] = 0
    score = rng.integers(-2, 9, n) / np.float32(8)
    score[rng.random(n) < 0.05] = np.nan
    return GateRows(
        group=[str(g) for g in rng.integers(0, max(n // 6, 1), n)],
        blank=rng.random(n) < 0.1,
        score=score,
        user_score=rng.integers(0, 5, n).astype(np.float32),
        digest=[str(d) for d in rng.integers(0, 2 * n, n)],
        embedding=embedding,
        index_cosine=rng.integers(0, 5, n) / np.float32(4),
    )


CONFIGS = {
    "defaults": GateConfig(),
    "all off": GateConfig(blank=False, duplicates=False),
    "near": GateConfig(near_duplicates=0.5),
    "best": GateConfig(best=2),
    "all": GateConfig(
        min_score=0.0,
        scorer="my:Scorer",
        min_user_score=1.0,
        near_duplicates=0.5,
        in_index=0.75,
        best=3,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("seed", range(6))
def test_decisions_are_those_of_the_slow_reference(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "BLOCK", 7)  # many blocks, many chunks of kept rows
    monkeypatch.setattr(gates, "KEPT_BLOCK", 5)
    rows = chance_rows(seed, 90)
    found = decide(rows, CONFIGS[name])
    assert found == slow_decide(rows, CONFIGS[name])
    assert (set(found) == {None}) == (name == "all off")


def test_all_reasons_occur_somewhere_in_these_cases() -> None:
    seen = {
        reason for seed in range(6) for c in CONFIGS.values() for reason in decide(chance_rows(seed, 90), c)
    }
    assert seen == {
        None, Reason.BLANK, Reason.LOW_SCORE, Reason.DUPLICATE_PICTURE,
        Reason.NEAR_DUPLICATE, Reason.IN_INDEX, Reason.NOT_BEST,
    }  # fmt: skip


@pytest.mark.parametrize("n", [0, 1])
def test_no_row_and_one_row(n: int) -> None:
    rows = chance_rows(0, n)
    assert decide(rows, CONFIGS["near"]) == slow_decide(rows, CONFIGS["near"])


def test_the_size_of_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = chance_rows(3, 400)
    found = []
    for block, kept in ((1, 1), (64, 10), (1_024, 8_192)):
        monkeypatch.setattr(gates, "BLOCK", block)
        monkeypatch.setattr(gates, "KEPT_BLOCK", kept)
        found.append(decide(rows, CONFIGS["all"]))
    assert found[0] == found[1] == found[2]


def with_copies(n: int, dim: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """N unit vectors around some centres, the last third of them near copies (cosine about .985) of an earlier one."""
    rng = np.random.default_rng(11)
    first = 2 * n // 3
    rows = rng.standard_normal((200, dim))[rng.integers(0, 200, first)] + rng.standard_normal((first, dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    copied = rng.integers(0, first, n - first)
    noise = rng.standard_normal((n - first, dim))
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    rows = np.concatenate([rows, rows[copied] + 0.175 * noise])
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16), copied


def test_many_rows_are_judged_by_lists_almost_as_by_comparing_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = with_copies(20_000)
    everyone = GateRows(
        group=[""] * len(rows), blank=np.zeros(len(rows), bool), digest=list(map(str, range(len(rows)))),
        embedding=rows,
    )  # fmt: skip
    config = GateConfig(near_duplicates=0.97)
    monkeypatch.setattr(gates, "LISTS_FROM", 10**9)
    exact = np.array([reason is not None for reason in decide(everyone, config)])
    monkeypatch.setattr(gates, "LISTS_FROM", 2_000)
    asked = []
    near = Seen.near
    monkeypatch.setattr(Seen, "near", lambda *given: asked.append(len(given[1])) or near(*given))
    listed = np.array([reason is not None for reason in decide(everyone, config)])
    assert sum(asked) > 15_000, "lists were not used"
    assert exact.sum() > 6_000
    assert (exact & ~listed).sum() <= 0.001 * exact.sum()
    assert (listed & ~exact).sum() <= 0.001 * exact.sum()


def test_few_kept_rows_are_compared_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gates, "_lists", lambda *given: pytest.fail("lists for so few"))
    rows = np.repeat(with_copies(30)[0], 400, axis=0)
    reasons = decide(
        GateRows(group=[""] * len(rows), blank=None, digest=None, embedding=rows),
        GateConfig(blank=False, duplicates=False, near_duplicates=0.97),
    )
    assert len(rows) > gates.LISTS_FROM and reasons.count(None) <= 30


def test_a_near_duplicate_of_one_that_went_stays() -> None:
    angle = np.radians([0, 20, 40])  # each is near the next, the first and the last are not near
    rows = GateRows(
        group=["a"] * 3,
        blank=np.zeros(3, bool),
        digest=list("abc"),
        embedding=np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32),
    )
    assert decide(rows, GateConfig(near_duplicates=0.9)) == [None, Reason.NEAR_DUPLICATE, None]


def test_a_copy_of_one_that_scored_too_low_stays() -> None:
    rows = GateRows(
        group=["a", "b", "b"], blank=np.zeros(3, bool), digest=["x", "x", "x"],
        score=np.array([0.1, 0.3, 0.9], np.float32),
    )  # fmt: skip
    assert decide(rows, GateConfig(min_score=0.2)) == [Reason.LOW_SCORE, None, Reason.DUPLICATE_PICTURE]


def test_counts_and_lines_add_up_with_what_stays() -> None:
    rows = chance_rows(1, 200)
    found = decide(rows, CONFIGS["all"])
    counts = count_reasons(found)
    assert sum(counts.values()) + found.count(None) == 200
    lines = gate_lines(CONFIGS["all"], counts)
    assert [name for name, _, _ in lines] == [
        "blank", "low_score", "duplicate_picture", "near_duplicate", "in_index", "not_best",
    ]  # fmt: skip
    assert {name: count for name, _, count in lines if count} == counts
    assert lines[1][1] == "score ≥ 0 and my:Scorer ≥ 1"
    assert gate_lines(GateConfig(), {}) == [
        ("blank", "more than one colour", 0),
        ("duplicate_picture", "pixels unlike any earlier picture's", 0),
    ]


def test_what_could_not_be_scored_stays_out_of_the_set() -> None:
    letter = dead_row("a", "a.png", "decode", ItemError(Reason.CORRUPT, "no pixels"))
    refused = no_pictures([pa.Table.from_pylist([letter], DEAD_LETTER)])
    assert refused == {"a": (Reason.CORRUPT, "no pixels")}
    assert judged([], GateConfig()) == {}
