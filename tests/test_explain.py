"""Heat maps are held to what they claim: hot cells matter to the score, and weights and texts to the map."""

from __future__ import annotations

import io
import itertools
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from llmvis.augment import on_ground
from llmvis.data import load_emoji
from llmvis.explain import (
    Part,
    _eager,
    attention_map,
    grad_cam,
    hottest_region,
    overlay,
    region_of,
    saliency_sheet,
    word_saliency,
)
from llmvis.models.language import LanguageConfig
from llmvis.models.synthesizer import Synthesizer
from llmvis.models.synthesizer_files import new_language
from llmvis.models.tokenizer import ImageTokenizer
from llmvis.models.two_tower import TwoTowerEncoder, load_two_tower
from llmvis.presets import tiny

COUNT, CELL, REMOVED = 24, 16, 0.15
PARTS: tuple[Part, ...] = ("whole", "learned", "class")


@cache
def encoder() -> TwoTowerEncoder:
    return load_two_tower()


@cache
def emoji() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Pictures of the test split on white, uint8 (B, H, W, 3); where something is drawn; names."""
    rows = load_emoji("test", ["image", "caption"]).to_pylist()
    pictures, drawn, names = [], [], []
    for i in np.random.default_rng(0).permutation(len(rows))[:COUNT]:
        picture = Image.open(io.BytesIO(rows[i]["image"]["bytes"])).convert("RGBA")
        preprocess = encoder().info.preprocess
        pictures.append(preprocess(on_ground(picture, (255, 255, 255))))
        ink = Image.merge("RGB", [picture.getchannel("A")] * 3)
        drawn.append(preprocess(ink)[..., 0] > 64)
        names.append(rows[i]["caption"])
    return np.stack(pictures), np.stack(drawn), names


@cache
def heat(part: Part = "whole") -> np.ndarray:
    pictures, _, names = emoji()
    return grad_cam(encoder(), pictures, names, part)


def by_cell(maps: np.ndarray) -> np.ndarray:
    """(B, H, W) → means (B, cells)."""
    count, side, _ = maps.shape
    cells = maps.astype(np.float64).reshape(count, side // CELL, CELL, side // CELL, CELL)
    return cells.mean((2, 4)).reshape(count, -1)


def first(order: np.ndarray) -> np.ndarray:
    """The share `REMOVED` of cells that come highest in `order` (B, cells): bool."""
    chosen = np.zeros(order.shape, bool)
    count = round(REMOVED * order.shape[1])
    np.put_along_axis(chosen, np.argsort(-order, 1, kind="stable")[:, :count], True, 1)
    return chosen


def cosines(pictures: np.ndarray) -> dict[Part, np.ndarray]:
    """Of each picture, or a changed one, with its own name, as a whole and in parts: (B,)."""
    config = encoder().model.config
    each = encoder().encode_images(pictures) * encoder().encode_texts(emoji()[2])
    by_class, learned = each[:, : config.text_dim].sum(1), each[:, config.text_dim :].sum(1)
    share = config.semantic_share
    return {"whole": by_class + learned, "class": by_class / share, "learned": learned / (1 - share)}


@cache
def own() -> dict[Part, np.ndarray]:
    return cosines(emoji()[0])


@cache
def blurred() -> np.ndarray:
    """The pictures without their strokes: white would leave edges that are drawn by nobody."""
    blur = ImageFilter.GaussianBlur(24)
    return np.stack([np.asarray(Image.fromarray(picture).filter(blur)) for picture in emoji()[0]])


def drop(chosen: np.ndarray) -> dict[Part, float]:
    """By how much cosines fall, in the mean, when cells (B, cells) are blurred away."""
    pictures, _, _ = emoji()
    side = pictures.shape[1] // CELL
    mask = chosen.reshape(-1, side, side).repeat(CELL, 1).repeat(CELL, 2)[..., None]
    changed = cosines(np.where(mask, blurred(), pictures))
    return {part: float((own()[part] - changed[part]).mean()) for part in PARTS}


@cache
def chance(inside: bool) -> dict[Part, float]:
    """`drop` of random cells, anywhere or of the drawing: the mean of three draws."""
    random = np.random.default_rng(0)
    drawn = by_cell(emoji()[1]) > 0.1
    drops = [drop(first(random.random(drawn.shape) + inside * drawn)) for _ in range(3)]
    return {part: float(np.mean([d[part] for d in drops])) for part in PARTS}


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over pictures of Pearson's r between two maps."""
    pairs = zip(by_cell(one), by_cell(other), strict=True)
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs]))


def synthesizer() -> Synthesizer:
    """Untrained, 4 × 4 cells, on the packaged language model."""
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(tiny().tokenizer)
    return Synthesizer(tokenizer, *new_language(LanguageConfig.of(tokenizer.config), tokenizer))


# pictures


@pytest.mark.parametrize("part", PARTS)
def test_maps_are_as_large_as_the_pictures_and_within_0_and_1(part: Part) -> None:
    maps = heat(part)
    assert maps.shape == emoji()[0].shape[:3] and maps.dtype == np.float32
    assert maps.min() >= 0 and np.allclose(maps.max((1, 2)), 1, atol=1e-6)


@pytest.mark.parametrize("part", PARTS)
def test_blurring_hot_cells_costs_more_than_blurring_others(part: Part) -> None:
    """Deletion (Petsiuk 2018), against random cells anywhere and random cells of the drawing."""
    hot = drop(first(by_cell(heat(part))))[part]
    assert hot > 2 * chance(inside=False)[part] and hot > 1.4 * chance(inside=True)[part]


def test_heat_lies_on_the_drawing_more_often_than_chance() -> None:
    _, drawn, _ = emoji()
    hottest = first(by_cell(heat()))
    on_it = by_cell(drawn)[hottest].mean()
    assert on_it > drawn.mean() + 0.1


def test_other_weights_give_another_map() -> None:
    """Adebayo 2018: a map that survives random weights shows the picture, not the model."""
    pictures, _, names = emoji()
    for changed in ("learned.image", "trunk"):
        other = load_two_tower()
        torch.manual_seed(0)
        for name, tensor in other.model.named_parameters():
            if name.startswith(changed) and tensor.ndim > 1:
                tensor.data = torch.randn_like(tensor) * tensor.std()
        found = grad_cam(other, pictures[:12], names[:12], "learned")
        assert correlation(heat("learned")[:12], found) < 0.5


def test_another_text_gives_another_map() -> None:
    pictures, _, names = emoji()
    others = grad_cam(encoder(), pictures, names[1:] + names[:1])
    assert correlation(heat(), others) < 0.5
    assert np.allclose(heat()[:2], grad_cam(encoder(), pictures[:2], names[:2]), atol=1e-4)


def test_a_blank_picture_and_frozen_weights_are_no_trouble() -> None:
    frozen = load_two_tower()
    frozen.model.requires_grad_(False)
    for colour in (0, 255):
        blank = np.full((1, 224, 224, 3), colour, np.uint8)
        assert np.isfinite(grad_cam(frozen, blank, [""])).all()
    assert grad_cam(frozen, blank[:0], []).shape == (0, 224, 224)


def test_what_does_not_fit_is_refused() -> None:
    pictures = emoji()[0][:2]
    with pytest.raises(ValueError, match="2 pictures, but 1 texts"):
        grad_cam(encoder(), pictures, ["a dog"])
    with pytest.raises(ValueError, match="uint8"):
        grad_cam(encoder(), pictures.astype(np.float32), ["a dog", "a cat"])


def test_two_things_in_a_picture_are_told_apart() -> None:
    """Side by side: the name of the left one heats the left half more than the name of the right one does."""
    pictures, _, names = emoji()
    known = np.argsort(-own()["whole"])[:9]
    told_apart = []
    for left, right in itertools.pairwise(known):
        both = np.full((224, 224, 3), 255, np.uint8)
        for start, i in ((0, left), (112, right)):
            both[56:168, start : start + 112] = np.asarray(Image.fromarray(pictures[i]).resize((112, 112)))
        maps = grad_cam(encoder(), np.stack([both] * 2), [names[left], names[right]])
        shares = maps[:, :, :112].sum((1, 2)) / maps.sum((1, 2))
        told_apart.append(shares[0] > shares[1])
    assert sum(told_apart) >= 6


# regions


def test_a_region_is_connected_grows_from_the_hottest_and_has_its_share() -> None:
    ridge = np.zeros((8, 8), np.float32)
    ridge[1, :6], ridge[6, :6] = [0.9, 1, 0.9, 0.8, 0.7, 0.6], 0.95
    found = hottest_region(ridge, 4 / 64)
    assert found.sum() == 4 and found[1, :4].all()
    assert hottest_region(ridge, 1).sum() == 6  # the other ridge is not connected, the rest is cold
    assert not hottest_region(np.zeros((4, 4), np.float32), 0.5).any()
    with pytest.raises(ValueError, match="share"):
        hottest_region(ridge, 0)


def test_a_text_s_region_has_the_picture_s_size_and_no_more_than_its_share() -> None:
    pictures, _, names = emoji()
    small = np.asarray(Image.fromarray(pictures[0]).resize((96, 64)))
    found = region_of(encoder(), small, names[0], share=0.2)
    assert found.shape == (64, 96) and found.dtype == bool
    assert 0.1 < found.mean() <= 0.2 + 1e-3


# words


BEFORE, AFTER = "a drawing of the", "on a white background"


@cache
def saliencies() -> list[list[tuple[str, float]]]:
    """Of each name in a sentence, with its picture."""
    pictures, _, names = emoji()
    return [
        word_saliency(encoder(), picture, f"{BEFORE} {name} {AFTER}")
        for picture, name in zip(pictures, names, strict=True)
    ]


def test_words_of_the_name_count_for_more_than_the_words_around_it() -> None:
    more, top = [], []
    for name, found in zip(emoji()[2], saliencies(), strict=True):
        assert " ".join(word for word, _ in found) == f"{BEFORE} {name} {AFTER}"
        values = np.array([value for _, value in found])
        around = np.r_[values[:4], values[-4:]]
        more.append(values[4:-4].mean() > around.mean())
        top.append(values[4:-4].max() > around.max())
    assert np.mean(more) > 0.8 and np.mean(top) > 0.7


def test_word_saliency_agrees_with_leaving_words_out() -> None:
    pictures, _, _ = emoji()
    found = []
    for picture, saliency in zip(pictures[:12], saliencies(), strict=False):
        words = [word for word, _ in saliency]
        texts = [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
        scores = encoder().encode_texts([" ".join(words), *texts]) @ encoder().encode_images(picture[None])[0]
        found.append(np.corrcoef(scores[0] - scores[1:], [value for _, value in saliency])[0, 1])
    assert np.mean(found) > 0.4


def test_a_text_without_words_has_no_saliency_and_foreign_ones_are_explained_in_english() -> None:
    picture = emoji()[0][0]
    assert word_saliency(encoder(), picture, "") == []
    assert [word for word, _ in word_saliency(encoder(), picture, "ein roter Apfel")] == [
        "ein",
        "red",
        "apple",
    ]


# attention


def test_cells_that_are_filled_in_share_their_attention_among_words() -> None:
    model = synthesizer()
    picture = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    _, generated = attention_map(model, "paint an unbelievable apple")
    for source in (None, picture, Image.fromarray(picture)):
        words, maps = attention_map(model, "paint an unbelievable apple", source=source)
        assert words == ["paint", "an", "unbelievable", "apple"]
        assert maps.shape == (4, 4, 4) and maps.dtype == np.float32
        total = maps.sum(0)
        assert (maps > 0).all() and (total < 1).all() and (total > 0.01).all()
    assert not np.allclose(generated, maps)


def test_words_of_a_caption_share_their_attention_among_cells() -> None:
    model = synthesizer()
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    words, maps = attention_map(model, "an unbelievable apple", captioned=picture)
    total = maps.sum((1, 2))
    assert len(words) == 3 and maps.shape == (3, 4, 4)
    assert (maps > 0).all() and (total < 1).all() and (total > 0.05).all()
    with pytest.raises(ValueError, match="not both"):
        attention_map(model, "an apple", captioned=picture, source=picture)


def test_long_and_empty_texts_have_the_words_that_are_read() -> None:
    model = synthesizer()
    words, maps = attention_map(model, "word " * 100)
    assert len(words) == len(maps) == model.words.length - 2  # [CLS] and [SEP]
    words, maps = attention_map(model, "  ")
    assert words == [] and maps.shape == (0, 4, 4)


# nothing changes


def test_a_synthesis_model_is_as_it_was() -> None:
    model = synthesizer()
    before = model.language.transformer.config._attn_implementation
    made = model.generate(["a red apple"])
    attention_map(model, "a red apple")
    assert model.language.transformer.config._attn_implementation == before == "sdpa"
    assert np.array_equal(model.generate(["a red apple"]), made)
    with pytest.raises(IndexError), _eager(model.language.transformer):
        raise IndexError
    assert model.language.transformer.config._attn_implementation == before


def test_an_encoder_is_as_it_was() -> None:
    fresh = load_two_tower()
    pictures, _, names = emoji()
    before = fresh.encode_images(pictures[:2]), fresh.encode_texts(names[:2])
    grad_cam(fresh, pictures[:2], names[:2])
    word_saliency(fresh, pictures[0], names[0])
    assert np.array_equal(fresh.encode_images(pictures[:2]), before[0])
    assert np.array_equal(fresh.encode_texts(names[:2]), before[1])
    assert all(p.grad is None and p.requires_grad for p in fresh.model.parameters())
    assert not any(module._forward_hooks for module in fresh.model.modules())


# to look at


def test_an_overlay_has_the_picture_s_size_and_the_map_s_colours() -> None:
    picture = np.full((30, 50, 3), 128, np.uint8)
    ramp = np.linspace(0, 1, 5, dtype=np.float32)[None].repeat(3, 0)
    shown = np.asarray(overlay(picture, ramp, alpha=1.0))
    assert shown.shape == (30, 50, 3)
    assert tuple(shown[0, 0]) == (68, 1, 84) and tuple(shown[-1, -1]) == (253, 231, 36)  # viridis
    assert np.array_equal(np.asarray(overlay(Image.fromarray(picture), ramp, alpha=0.0)), picture)


def test_a_sheet_shows_the_picture_and_every_map() -> None:
    pictures, _, names = emoji()
    maps = np.stack([heat(part)[0] for part in PARTS])
    sheet = saliency_sheet(pictures[0], maps, PARTS, title=names[0])
    assert sheet.mode == "RGB" and sheet.width > 4 * 160
    with pytest.raises(ValueError, match="captions"):
        saliency_sheet(pictures[0], maps, ["whole"])
