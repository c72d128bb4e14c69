"""Tokeniser, language model and synthesiser: shapes, inverses, what is kept, and same bytes in any company."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llmvis.data import load_emoji
from llmvis.models.discriminator import PatchDiscriminator
from llmvis.models.language import MASKED, LanguageConfig
from llmvis.models.sampling import Sampling, fill_codes, fill_words, stream
from llmvis.models.source_branch import SourceBranch
from llmvis.models.synthesizer import Synthesizer
from llmvis.models.synthesizer_files import load_synthesizer, new_language, save_branch, save_language
from llmvis.models.tokenizer import ImageTokenizer, Quantiser, TokenizerConfig
from llmvis.models.tokenizer_files import load_tokenizer, save_tokenizer
from llmvis.presets import tiny
from llmvis.schema import UserError

QUICK = Sampling(steps=3, guidance=1.0)


@pytest.fixture(scope="module")
def model() -> Synthesizer:
    """Untrained, with the packaged language model."""
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(tiny().tokenizer).eval()
    config = LanguageConfig.of(tokenizer.config, words=12)
    return Synthesizer(tokenizer, *new_language(config, tokenizer))


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    rows = load_emoji("test", columns=["image"])["image"].to_pylist()[:3]
    from llmvis.pictures import fit, on_white

    return np.stack([on_white(np.asarray(fit(row["bytes"], 32))) for row in rows])


def test_every_code_word_is_its_own_nearest_entry() -> None:
    quantiser = Quantiser(2, (4, 3))
    every = torch.stack(torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij"), -1)[None]
    latents = quantiser.latents(every)
    assert latents.shape == (1, 4, 12, 12) and latents.abs().max() == 1
    rounded, codes, commitment = quantiser(torch.atanh(latents * 0.999))
    assert torch.equal(codes, every)
    assert torch.allclose(rounded, latents) and commitment < 1e-5


def test_gradients_pass_the_rounding_and_commitment_pulls_to_the_levels() -> None:
    quantiser = Quantiser(1, (5, 5))
    z = torch.full((1, 2, 1, 1), 0.2, requires_grad=True)
    rounded, _, commitment = quantiser(z)
    rounded.sum().backward(retain_graph=True)
    assert z.grad is not None and torch.allclose(z.grad, 1 - torch.tanh(z.detach()) ** 2)
    z.grad = None
    commitment.backward()
    assert (z.grad > 0).all()  # tanh(.2) lies above its level, 0


def test_expected_latents_of_a_certain_code_are_its_own() -> None:
    quantiser = Quantiser(3, (4, 3))
    codes = torch.randint(0, 12, (2, 5, 5, 3))
    sure = torch.nn.functional.one_hot(codes, 12).float()
    assert torch.allclose(quantiser.expected(sure), quantiser.latents(codes))
    even = torch.full((1, 2, 2, 3, 12), 1 / 12)
    assert quantiser.expected(even).abs().max() < 1e-6  # levels lie evenly about 0


def test_shapes_of_tokeniser_and_discriminator() -> None:
    config = TokenizerConfig(image_size=32, channels=(16, 24, 32), groups=2, levels=(5, 5))
    assert (config.grid, config.cells, config.codebook) == (4, 16, 25)
    tokenizer = ImageTokenizer(config)
    images = torch.rand(2, 3, 32, 32)
    made, codes, commitment = tokenizer(images)
    assert made.shape == images.shape and codes.shape == (2, 4, 4, 2) and commitment.ndim == 0
    assert codes.min() >= 0 and codes.max() < 25
    decoded = tokenizer.decode(codes)
    assert decoded.shape == images.shape and decoded.min() >= 0 and decoded.max() <= 1
    assert torch.equal(tokenizer.encode(images), codes)
    assert PatchDiscriminator(8)(images).shape[:2] == (2, 1)


def test_an_untrained_branch_changes_nothing() -> None:
    tokenizer = ImageTokenizer(tiny().tokenizer).eval()
    branch = SourceBranch(tokenizer.config, 12).eval()
    branch.start_from(tokenizer)
    latents, source, words = torch.rand(1, 4, 4, 4), torch.rand(1, 3, 32, 32), torch.rand(1, 12)
    made = branch.decode(latents, source, words)
    assert torch.allclose(made, tokenizer.decode_latents(latents), atol=1e-6)


def test_source_and_words_come_through_a_branch_that_lets_them() -> None:
    tokenizer = ImageTokenizer(tiny().tokenizer).eval()
    branch = SourceBranch(tokenizer.config, 12).eval()
    for module in (*branch.join, *branch.change):
        torch.nn.init.normal_(module.weight, std=0.1)
    latents, source, words = torch.rand(1, 4, 4, 4), torch.rand(1, 3, 32, 32), torch.rand(1, 12)
    made = branch.decode(latents, source, words)
    assert not torch.allclose(made, branch.decode(latents, 1 - source, words), atol=1e-3)
    assert not torch.allclose(made, branch.decode(latents, source, -words), atol=1e-3)


def test_words_change_what_is_predicted_and_padding_does_not(model: Synthesizer) -> None:
    words, attend = model.words(["a red apple", "the sea"])
    target = torch.full((2, 16, 2), MASKED)
    with torch.inference_mode():
        both = model.language.code_logits(model.language(words, attend, target).last_hidden_state)
        assert both.shape == (2, 16, 2, 25)
        assert not torch.allclose(both[0], both[1], atol=1e-3)
        other = words.clone()
        other[0, ~attend[0]] = 2000  # words behind the end
        padded = model.language.code_logits(model.language(other, attend, target).last_hidden_state)
    assert torch.allclose(padded[0], both[0], atol=1e-4)


def test_known_code_words_stay_and_all_masked_ones_are_filled(model: Synthesizer) -> None:
    words, attend = (t[0] for t in model.words(["a dog"]))
    empty = tuple(t[0] for t in model.words([""]))
    target = torch.full((16, 2), MASKED)
    target[:4] = torch.arange(8).reshape(4, 2)
    for how in (QUICK, replace(QUICK, steps=40), replace(QUICK, guidance=0.0, steps=1)):
        filled = fill_codes(model.language, words, attend, empty, target, None, how, stream("x", 0))
        assert torch.equal(filled[:4], target[:4])
        assert (filled != MASKED).all() and filled.max() < 25
    assert (target[4:] == MASKED).all()  # what was given is not written to


def test_all_masked_words_are_filled_and_the_others_stay(model: Synthesizer) -> None:
    words = model.words(["a dog"])[0][0]
    words[2:6] = model.language.mask_word
    filled = fill_words(model.language, words, torch.zeros(16, 2, dtype=torch.int64), steps=3)
    assert (filled != model.language.mask_word).all()
    keep = [0, 1, *range(6, 12)]
    assert torch.equal(filled[keep], words[keep])


def test_streams_depend_on_key_and_seed_alone() -> None:
    one, same = stream("a", 1).random(4), stream("a", 1).random(4)
    assert (one == same).all()
    assert (one != stream("a", 2).random(4)).any() and (one != stream("b", 1).random(4)).any()


def test_the_same_request_gives_the_same_bytes_in_any_company(
    model: Synthesizer, pictures: np.ndarray
) -> None:
    prompts, seeds = ["a cat", "rain", "a cat"], [0, 0, 1]
    together = model.generate(prompts, seeds=seeds, how=QUICK)
    assert together.shape == (3, 32, 32, 3) and together.dtype == np.uint8
    for i in (2, 0, 1):
        assert (model.generate([prompts[i]], seeds=[seeds[i]], how=QUICK)[0] == together[i]).all()
    assert (together[0] != together[2]).any()
    for how in (QUICK, replace(QUICK, steps=1)):
        whole = model.translate(pictures, ["colour it"] * 3, how=how)
        turned = model.translate(pictures[::-1], ["colour it"] * 3, how=how)
        assert (whole == turned[::-1]).all()


def test_inpainting_keeps_every_pixel_outside_the_mask(model: Synthesizer, pictures: np.ndarray) -> None:
    masks = np.zeros((3, 64, 64), bool)
    masks[0, 10:30, 20:40] = masks[1] = True
    made = model.inpaint(pictures, masks, ["a hat"] * 3, how=QUICK)
    inside = masks[0][::2, ::2]
    assert (made[0][~inside] == pictures[0][~inside]).all()
    assert (made[0][inside] != pictures[0][inside]).any()
    assert (made[2] == pictures[2]).all()


def test_a_mask_is_fitted_as_its_picture_is_and_a_thin_line_in_it_counts(model: Synthesizer) -> None:
    """A picture of 2:1 lies in the middle band of the square; a line of one pixel is under a third of one there."""
    picture = np.random.default_rng(0).integers(0, 256, (1, 50, 100, 3), dtype=np.uint8)
    mask = np.zeros((1, 50, 100), bool)
    mask[0, :, 70] = True
    plain = model.inpaint(picture, np.zeros_like(mask), ["a hat"], how=QUICK)[0]
    made = model.inpaint(picture, mask, ["a hat"], how=QUICK)[0]
    changed = (made != plain).any(2)
    column = 70 * 32 // 100
    assert changed[8:24, column].mean() > 0.9
    changed[8:24, column] = False
    assert not changed.any()
    small = model.inpaint(picture, mask[:, ::2, ::2], ["a hat"], how=QUICK)[0]  # of another resolution
    assert (small != plain).any(2)[8:24, column].mean() > 0.9
    tall = [Image.fromarray(picture[0]).transpose(Image.Transpose.ROTATE_90), Image.fromarray(picture[0])]
    made = model.inpaint(tall, [np.ones((100, 50), bool), np.ones((50, 100), bool)], [""] * 2, how=QUICK)
    assert (made[0][:, [0, 7, 24, 31]] == 255).all() and (made[1][[0, 7, 24, 31]] == 255).all()
    with pytest.raises(ValueError, match="does not fit a picture of"):
        model.inpaint(picture, np.zeros((1, 64, 64), bool), ["a hat"], how=QUICK)


def test_pictures_of_any_size_and_kind_are_taken(model: Synthesizer) -> None:
    some = [
        Image.new("RGBA", (50, 20), (255, 0, 0, 0)),
        Image.new("L", (7, 90), 9),
        Image.new("RGB", (32, 32)),
    ]
    assert model.encode(some).shape == (3, 4, 4, 2)
    assert model.decode(model.encode(some)).shape == (3, 32, 32, 3)
    assert len(model.caption(some, steps=2)) == 3
    with pytest.raises(ValueError, match="uint8"):
        model.encode(np.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="one each"):
        model.translate(some, ["a"])


def test_nothing_asked_gives_nothing(model: Synthesizer) -> None:
    assert model.generate([]).shape == (0, 32, 32, 3)
    assert model.caption([]) == []


def test_a_saved_model_is_the_model(model: Synthesizer, pictures: np.ndarray, tmp_path: Path) -> None:
    save_tokenizer(model.tokenizer, tmp_path / "tokenizer")
    save_language(model.language, tmp_path / "language", model.tokenizer)
    read = load_synthesizer(tmp_path)
    assert read.branch is None and len(read.fingerprint) == 64
    assert (read.encode(pictures) == model.encode(pictures)).float().mean() > 0.95  # fp16 weights
    names = {name for name, _ in read.language.named_parameters()}
    assert names == {name for name, _ in model.language.named_parameters()}
    for name, value in read.language.named_parameters():
        assert torch.allclose(value, model.language.get_parameter(name), atol=2e-3), name
    assert (tmp_path / "language" / "model.safetensors").stat().st_size < 25e6  # without the words' table

    branch = SourceBranch(model.tokenizer.config, model.language.width)
    branch.start_from(model.tokenizer)
    save_branch(branch, tmp_path / "branch")
    again = load_synthesizer(tmp_path)
    assert again.branch is not None and again.fingerprint != read.fingerprint


def test_a_folder_that_is_no_model_is_refused_with_words(model: Synthesizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no image tokeniser"):
        load_synthesizer(tmp_path)
    save_tokenizer(model.tokenizer, tmp_path / "tokenizer")
    with pytest.raises(UserError, match="holds no language model"):
        load_synthesizer(tmp_path)
    (tmp_path / "tokenizer" / "config.json").write_text('{"model_type": "other"}')
    with pytest.raises(UserError, match="not of an image tokeniser"):
        load_tokenizer(tmp_path / "tokenizer")
    other = ImageTokenizer(replace(tiny().tokenizer, groups=1))
    save_tokenizer(other, tmp_path / "tokenizer")
    save_language(model.language, tmp_path / "language", model.tokenizer)
    with pytest.raises(UserError, match="other code words"):
        load_synthesizer(tmp_path)


def test_a_picture_that_begins_from_another_keeps_its_share_of_code_words(model: Synthesizer) -> None:
    begin = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    codes = model.encode(begin)
    whole = model.generate(["a", "b"], how=QUICK, begin=begin, share=1.0)
    np.testing.assert_array_equal(whole, model.decode(codes))
    none = model.generate(["a", "b"], how=QUICK, begin=begin, share=0.0)
    np.testing.assert_array_equal(none, model.generate(["a", "b"], how=QUICK))
    half = model.generate(["a", "b"], how=QUICK, begin=begin, share=0.5)
    alone = model.generate(["b"], how=QUICK, begin=begin[1:], share=0.5)
    np.testing.assert_array_equal(half[1:], alone)
    assert not np.array_equal(half, whole) and not np.array_equal(half, none)


def test_guidance_leads_away_from_negative_words(model: Synthesizer) -> None:
    how = replace(QUICK, guidance=4.0)
    plain = model.generate(["a house"], how=how)
    assert not np.array_equal(plain, model.generate(["a house"], negatives=["a tree"], how=how))
    np.testing.assert_array_equal(plain, model.generate(["a house"], negatives=[""], how=how))
