"""Denoise, deblur, enlarge: their words, pictures of any size, tiles, weights against controls, the door of a job."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from jobs import translate
from llmvis.config_bulk import TranslateConfig
from llmvis.degrade import blurred, doubled, halved, noisy
from llmvis.edits import parse_edit
from llmvis.enhance import TASKS, Task, check_size, parse_enhancement
from llmvis.evaluation_enhance import evaluate_enhance
from llmvis.ledger import read_data, read_manifest
from llmvis.models.load_restorer import describe_restorer, load_picture_restorer, restorer_folder
from llmvis.models.load_synthesis import fingerprint_of
from llmvis.models.restorer import Restorer, RestorerConfig, load_restorer, save_restorer
from llmvis.plan import PlanError
from llmvis.schema import UserError
from llmvis.sources import open_reader, open_source
from llmvis.sources.variants import VariantSource
from llmvis.storage import LocalStore
from llmvis.translate import ReadSources, Translate

WORDINGS: dict[Task, str] = {
    "denoise": "denoise|Denoise it.|de-noise the picture|please remove the noise|remove noise from the image|less noisy"
    "|reduce the grain|make it less grainy|noise reduction|clean up the noise|get rid of the noise in this photo",
    "deblur": "deblur|deblur the photo|remove the blur|remove blur from the picture|un-blur it|please undo the blur"
    "|Can you get rid of the blur?",
    "enlarge": "super-resolve|super resolution|superresolve it 2x|upscale 2x|upscale it by 2|2x upscale"
    "|upscale the picture to twice the size|enlarge 2x with detail|enlarge it with more detail"
    "|twice as large with fine detail|make it 2x larger with details|upsample by a factor of 2"
    "|double the size with sharp details",
}
CLASSIC = (
    "2x|twice as large|enlarge it|enlarge 2x|make it 2x|scale 2x|double the size|upscale it|upscale 3x"
    "|upscale to 512 px|sharpen|sharper|less blurry|less blurred|blur it|blur by 2 px|add blur"
    "|50 % bigger|resize to 200 %|increase sharpness"
)
NEITHER = (
    "remove the noise from the sky|denoise and draw it as Twemoji|a noisy street|noise|upscale|"
    "draw it with more detail|deblur the background|a blur|super|remove the hat|super-resolve 4x|"
    "enlarge the eyes with detail|denoise: {caption}|denoise, then deblur|colour the drawing||,"
)


@pytest.mark.parametrize(
    ("task", "wording"), [(t, w) for t, told in WORDINGS.items() for w in told.split("|")]
)
def test_an_enhancement_is_known_by_its_words(task: Task, wording: str) -> None:
    assert parse_enhancement(wording) == task
    assert parse_enhancement(f"Please {wording.rstrip('.?').upper()}!") == task


@pytest.mark.parametrize("wording", CLASSIC.split("|"))
def test_what_resamples_or_sharpens_stays_a_classic_edit(wording: str) -> None:
    assert parse_enhancement(wording) is None and parse_edit(wording) is not None


@pytest.mark.parametrize("wording", [*NEITHER.split("|"), "denoise " * 100])
def test_other_words_are_no_enhancement(wording: str) -> None:
    assert parse_enhancement(wording) is None


def test_enlarging_is_refused_in_a_region_and_beyond_the_cap() -> None:
    check_size("denoise", 9000, 9000, region=True)
    check_size("enlarge", 4000, 4000, region=False)
    with pytest.raises(UserError, match="changes the size"):
        check_size("enlarge", 10, 10, region=True)
    with pytest.raises(UserError, match="18000 x 18000 is more than"):
        check_size("enlarge", 9000, 9000, region=False)


def test_spoiling_does_what_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    grey = torch.full((2, 3, 200, 200), 0.5)
    spread = (
        noisy(grey, torch.randn(grey.shape, generator=generator), torch.tensor([5.0, 25.0])).std((1, 2, 3))
        * 255
    )
    assert spread.tolist() == pytest.approx([5, 25], rel=0.02)
    point = torch.zeros(1, 3, 41, 41)
    point[..., 20, 20] = 1
    line = blurred(point, torch.tensor([2.0]))[0, 0, 20]
    expected = np.exp(-0.5 * (np.arange(-6, 7) / 2) ** 2)
    expected /= expected.sum()
    assert line[14:27].numpy() == pytest.approx(expected * expected[6], abs=0.5 / 255 + 1e-6)
    rng = np.random.default_rng(0)
    pixels = rng.integers(90, 166, (20, 28, 3), dtype=np.uint8)  # Pillow clips between its two passes
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    for made, size in ((halved(tensor), (14, 10)), (doubled(tensor), (56, 40))):
        pillow = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(made[0].permute(1, 2, 0).numpy() * 255 - pillow).max() < 1.5
    assert halved(tensor, "area")[0, 0, 0, 0] * 255 == pytest.approx(pixels[:2, :2, 0].mean(), abs=0.5001)


def random_restorer(blocks: int = 2) -> Restorer:
    """Small, untrained, and with a last layer that does something."""
    torch.manual_seed(0)
    model = Restorer(RestorerConfig(channels=8, blocks=blocks)).eval()
    with torch.no_grad():
        for part in (model.tail, *(block.film for block in model.blocks)):  # type: ignore[union-attr]
            part.weight.normal_(std=0.2)
    return model


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("task", TASKS)
def test_an_untrained_network_changes_nothing(task: Task) -> None:
    picture = noise(33, 47)
    made = Restorer(RestorerConfig(channels=8, blocks=2)).eval().restore(picture, task)
    if task == "enlarge":
        picture = np.asarray(Image.fromarray(picture).resize((94, 66), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(made, picture)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (2, 3), (7, 5), (33, 64), (65, 31)])
@pytest.mark.parametrize("task", TASKS)
def test_a_picture_of_any_size_keeps_it_or_doubles_it(size: tuple[int, int], task: Task) -> None:
    made = random_restorer().restore(noise(*size), task)
    times = 2 if task == "enlarge" else 1
    assert made.shape == (times * size[0], times * size[1], 3) and made.dtype == np.uint8


@pytest.mark.parametrize("task", TASKS)
def test_tiles_meet_without_a_seam(task: Task) -> None:
    model, picture = random_restorer(), noise(75, 101)
    whole = model.restore(picture, task).astype(int)
    assert (
        np.abs(whole - picture.repeat(2, 0).repeat(2, 1) if task == "enlarge" else whole - picture).max() > 5
    )
    for tile in (16, 32, 50):
        assert np.abs(model.restore(picture, task, tile=tile) - whole).max() <= 1  # the last bit of a sum


def test_reach_is_how_far_a_pixel_is_felt() -> None:
    model, picture = random_restorer(), noise(96, 96)
    other = picture.copy()
    other[48, 48] = 255 - other[48, 48]
    changed = np.argwhere((model.restore(picture, "denoise") != model.restore(other, "denoise")).any(2))
    assert 4 < np.abs(changed - 48).max() <= model.reach + 1


def test_tasks_are_told_apart() -> None:
    model, picture = random_restorer(), noise(24, 24)
    assert (model.restore(picture, "denoise") != model.restore(picture, "deblur")).any()


def test_a_restorer_is_saved_and_found_again(tmp_path: Path) -> None:
    model = random_restorer()
    save_restorer(model, tmp_path / "restorer")
    again = load_restorer(tmp_path / "restorer")
    picture = noise(20, 20)
    assert np.abs(again.restore(picture, "deblur").astype(int) - model.restore(picture, "deblur")).max() <= 1
    assert restorer_folder(str(tmp_path)) == tmp_path / "restorer"
    assert describe_restorer(str(tmp_path)).name == str((tmp_path / "restorer").resolve())
    told = json.loads((tmp_path / "restorer" / "config.json").read_text())
    (tmp_path / "restorer" / "config.json").write_text(json.dumps({**told, "tasks": ["denoise"]}))
    with pytest.raises(UserError, match="--stage restore"):
        load_restorer(tmp_path / "restorer")
    with pytest.raises(UserError, match="holds no restorer"):
        load_restorer(tmp_path)


def test_a_restorer_beside_a_synthesis_model_leaves_its_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "config.json").write_text("{}")
    before = fingerprint_of(tmp_path)
    save_restorer(random_restorer(), tmp_path / "restorer")
    assert fingerprint_of(tmp_path) == before != fingerprint_of(tmp_path / "restorer")


def test_the_shipped_weights_beat_every_control() -> None:
    result = evaluate_enhance(load_picture_restorer(), most=24)
    margins = {"denoise": 5.0, "deblur": 3.0, "enlarge": 3.0}  # dB; shipped: see weights/synthesis/README.md
    for task, margin in margins.items():
        scores = result["splits"][task]
        for name, control in scores["controls"].items():
            assert scores["psnr"] > control["psnr"] + margin, (task, name)
            assert scores["ssim"] > control["ssim"], (task, name)
    assert result["psnr"] > result["controls"]["classic"]["psnr"] > result["controls"]["degraded"]["psnr"]


def test_words_for_a_region_keep_the_rest_and_never_enlarge(tmp_path: Path) -> None:
    picture = noise(40, 60)
    Image.fromarray(picture).save(tmp_path / "a.png")
    source = VariantSource(open_source(str(tmp_path)), instructions=("deblur", "upscale 2x"), seeds=(0,))
    reader = open_reader(source.describe())
    read = ReadSources(reader=reader, masks=None, side=64, whole=True, max_pixels=10**6, max_bytes=10**6)
    rows, arrays, dead, _ = read(pa.concat_tables(source.listing()))
    assert [row["reason"] for row in dead] == ["unsuitable"] and "changes the size" in dead[0]["detail"]

    def left_half(fitted: np.ndarray) -> np.ndarray:
        return np.arange(64)[None].repeat(64, 0) < 32

    restorer = load_picture_restorer(threads=1)
    done = Translate(translator=None, info=restorer.info, region=left_half, cut=False, restorer=restorer)
    (row,) = done(rows, arrays)[0].to_pylist()
    made = pixels_of(row)
    assert row["model"] == "llmvis/restorer" and made.shape == picture.shape
    np.testing.assert_array_equal(made[:, 32:], picture[:, 32:])
    np.testing.assert_array_equal(made[:, :28], restorer.restore(picture, "deblur")[:, :28])


def rows_of(out: Path) -> list[dict[str, Any]]:
    store = LocalStore(out)
    return [
        row for f in read_manifest(store, "translate")["files"] for row in read_data(store, f).to_pylist()
    ]


def pixels_of(row: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))


def test_a_job_enhances_pictures_in_their_own_size_without_the_synthesis_model(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **more: Any) -> None:
        raise AssertionError("the synthesis model was asked for")

    monkeypatch.setattr(translate, "describe_synthesis", refuse)  # the driver alone could plan with it
    sources = {"a.png": noise(30, 41), "b.png": noise(17, 64)}
    for folder in ("in", "masks"):
        (tmp_path / folder).mkdir()
    for name, picture in sources.items():
        Image.fromarray(picture).save(tmp_path / "in" / name)
    mask = np.zeros((30, 41), np.uint8)
    mask[5:20, 8:30] = 255
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    asked: dict[str, Any] = {
        "images": str(tmp_path / "in"),
        "instruction": ("denoise", "upscale 2x", "mirror"),
    }
    translate.run(TranslateConfig(out=str(tmp_path / "out"), **asked))
    rows = rows_of(tmp_path / "out")
    restorer, info = load_picture_restorer(threads=1), describe_restorer(None)
    assert info.name == "llmvis/restorer" and len(rows) == 6
    for row in rows:
        picture = sources[row["source"]]
        if row["prompt"] == "mirror":
            assert (row["model"], row["model_fingerprint"]) == ("pillow", "")
            continue
        assert (row["model"], row["model_fingerprint"]) == (info.name, info.fingerprint)
        task: Task = "denoise" if row["prompt"] == "denoise" else "enlarge"
        np.testing.assert_array_equal(pixels_of(row), restorer.restore(picture, task))
    manifest = read_manifest(LocalStore(tmp_path / "out"), "translate")
    assert [model["name"] for model in manifest["models"]] == ["llmvis/restorer"]

    asked["mask"] = str(tmp_path / "masks")
    translate.run(TranslateConfig(out=str(tmp_path / "masked"), **asked))
    made = {row["prompt"]: pixels_of(row) for row in rows_of(tmp_path / "masked")}
    assert set(made) == {
        "denoise",
        "mirror",
    }  # of a.png; b.png has no mask, and nothing in a region is enlarged
    np.testing.assert_array_equal(made["denoise"][mask == 0], sources["a.png"][mask == 0])
    np.testing.assert_array_equal(
        made["denoise"][mask > 0], restorer.restore(sources["a.png"], "denoise")[mask > 0]
    )
    reasons = read_manifest(LocalStore(tmp_path / "masked"), "translate")["ledger"]["dead_by_reason"]
    assert reasons == {"missing": 3, "unsuitable": 1}

    monkeypatch.setattr(
        translate, "describe_restorer", lambda model: type(info)(name="x", fingerprint="y", side=1)
    )
    with pytest.raises(PlanError, match="restorer_fingerprint"):  # another restorer is another job
        translate.run(
            TranslateConfig(
                out=str(tmp_path / "out"), images=asked["images"], instruction=asked["instruction"]
            )
        )
