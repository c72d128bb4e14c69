"""What the synthesis training refuses before and while it works, and what it keeps of a model begun from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llmvis.cluster.train_synthesis import SynthesisTrainConfig, train_synthesis
from llmvis.models.tokenizer_files import encoder_digest, load_tokenizer
from llmvis.presets import tiny
from llmvis.recipe import Collection, Pairs, Recipe, read_recipe
from llmvis.schema import UserError
from llmvis.synthesis_data import code_all, counted, fit_recipe, load_recipe
from llmvis.training.common import Every, OptimConfig, Optimiser, World, save_state, trim_log
from llmvis.training.stages import STAGES, Place, check, make_stage, prepare, stages_of, train_alone

EVERY = Every(log=1, evaluate=2, save=1)
SHORT = tiny().changed(steps=2, batch_size=4, seed=None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokeniser and a language model of two steps each."""
    place = Place(out=tmp_path_factory.mktemp("model"), preset=SHORT, recipe=read_recipe(), max_rows=20)
    for stage in STAGES[:2]:
        train_alone(stage, place, EVERY)
    return place.out


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(out=tmp_path / "out", preset=SHORT, recipe=read_recipe(), max_rows=20)


def painted(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (20, 20), (i * 5, 90, 200)).save(folder / f"{i:02}.png")
    return folder


def of_folder(folder: Path) -> Recipe:
    return Recipe(collections=(Collection(name="mine", images=str(folder), style="plain"),))


def digest(folder: Path) -> str:
    return encoder_digest(load_tokenizer(folder / "tokenizer"))


def test_code_words_of_a_model_begun_from_stay_unless_told_otherwise(model: Path, place: Place) -> None:
    for stage in STAGES[:2]:
        train_alone(stage, replace(place, start=model), EVERY)
    assert digest(place.out) == digest(model)
    decoders = [load_tokenizer(folder / "tokenizer").decoder.last_weight for folder in (place.out, model)]
    assert not torch.equal(*decoders)
    other = replace(place, out=place.out.with_name("other"), start=model, train_encoder=True)
    train_alone("tokenize", other, EVERY)
    assert digest(other.out) != digest(model)
    check(["language"], other)
    with pytest.raises(UserError, match="other code words than the language model of"):
        check(["language"], replace(other, train_encoder=False))
    with pytest.raises(UserError, match="--train-encoder goes with --start"):
        check(["tokenize"], replace(place, out=place.out.with_name("new"), train_encoder=True))


def test_a_language_model_beside_start_is_refused_unless_it_is_the_same(model: Path, place: Place) -> None:
    begun = replace(place, start=model)
    check(["tokenize", "language"], begun, "packaged")
    with pytest.raises(UserError, match="language model of its own, begun from 'packaged'"):
        check(["tokenize", "language"], begun, "bert-base-uncased")
    config = SynthesisTrainConfig(
        stage="all", out=str(place.out), start=str(model), language_model="other", workers=0
    )
    with pytest.raises(UserError, match="leave --language-model out"):
        train_synthesis(config)
    assert not place.out.exists()


def test_stages_may_differ_in_steps_and_one_stage_may_not(place: Place, tmp_path: Path) -> None:
    prepare("tokenize", place)
    longer = replace(place, preset=SHORT.changed(steps=5, batch_size=None, seed=None))
    with pytest.raises(
        UserError, match=r"train-tokenize holds a run with another preset.tokenize.optim.steps:"
    ):
        prepare("tokenize", longer)
    train_alone("tokenize", place, EVERY)
    train_alone("language", longer, EVERY)
    lines = (place.files_of("language") / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 5


@pytest.mark.parametrize("stage", ["language", "branch"])
def test_a_first_command_that_fails_locks_nothing(
    stage: str, model: Path, place: Place, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="has no tokenizer/"):
        train_alone(stage, place, EVERY)
    assert not place.out.exists()
    nothing = replace(place, recipe=of_folder(tmp_path / "nowhere"), start=model)
    with pytest.raises(UserError, match=r"does not exist|needs? pairs|with pairs"):
        train_alone(stage, nothing, EVERY)
    assert not list(place.out.rglob("*.json")) and not place.part_of("tokenize").exists()
    train_alone("tokenize", place, EVERY)


def test_a_branch_on_a_language_model_of_another_tokeniser_is_refused(model: Path, place: Place) -> None:
    place = replace(place, preset=SHORT.changed(steps=None, batch_size=None, seed=5))
    train_alone("tokenize", place, EVERY)
    with pytest.raises(UserError, match="has no language/"):
        check(["branch"], place)
    shutil.copytree(model / "language", place.part_of("language"))
    with pytest.raises(UserError, match="code words of another tokenizer/"):
        check(["branch"], place)
    check(["branch"], replace(place, out=model))


def test_a_recipe_without_pairs_is_trained_without_a_branch(tmp_path: Path, place: Place) -> None:
    recipe = of_folder(painted(tmp_path / "mine", 9))
    assert stages_of("all", recipe) == ("tokenize", "language")
    assert stages_of("all", read_recipe()) == STAGES and stages_of("branch", recipe) == ("branch",)
    with pytest.raises(UserError, match="give a recipe with pairs"):
        check(["branch"], replace(place, recipe=recipe))


def test_what_was_fitted_follows_the_files(tmp_path: Path) -> None:
    mine, data = painted(tmp_path / "mine", 12), tmp_path / "data"
    recipe = of_folder(mine)
    first = load_recipe(recipe, 64, data)
    assert load_recipe(recipe, 64, data).key == first.key
    tokenizer = load_tokenizer(Path(__file__).parents[1] / "llmvis/weights/synthesis/tokenizer")
    before = code_all(first, tokenizer, 1, data).collections[0].codes

    Image.new("RGB", (20, 20), (255, 0, 0)).save(mine / "00.png")
    painted_over = load_recipe(recipe, 64, data)
    assert painted_over.key != first.key and painted_over.collections[0].pixels[0, 0, 0, 0] == 255
    after = code_all(painted_over, tokenizer, 1, data).collections[0].codes
    assert (after[:, 0] != before[:, 0]).any() and (after[:, 1:] == before[:, 1:]).all()

    (mine / "03.txt").write_text("a caption")
    assert load_recipe(recipe, 64, data).collections[0].rows[3].caption == "a caption"
    painted(mine, 14)
    assert len(load_recipe(recipe, 64, data).collections[0].rows) == 14


def test_a_run_whose_pictures_changed_is_refused(tmp_path: Path, place: Place) -> None:
    mine = painted(tmp_path / "mine", 12)
    own = replace(place, recipe=of_folder(mine), max_rows=None)
    prepare("tokenize", own)
    painted(mine, 13)
    with pytest.raises(UserError, match="another pictures"):
        prepare("tokenize", own)


def test_what_was_left_out_is_told(tmp_path: Path, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    mine = painted(tmp_path / "mine", 12)
    (mine / "05.png").write_bytes((mine / "05.png").read_bytes()[:-30])
    (mine / "06.png").write_bytes(b"")
    (mine / "gone.png").symlink_to(tmp_path / "outside.png")
    recipe = of_folder(mine)
    said = counted(load_recipe(recipe, 32, tmp_path / "data"))
    assert said == ["mine: 10 pictures; left out: 1 empty, 1 link, 1 truncated"]
    prepare("tokenize", replace(place, recipe=recipe))
    assert said[0] in capsys.readouterr().out


def test_max_rows_is_a_maximum(tmp_path: Path) -> None:
    pairs = (Pairs(name="p", source="openmoji-line", target="openmoji", instructions=("colour",)),)
    recipe = Recipe(collections=(Collection(name="e", images="emoji"),), pairs=pairs)
    loaded = load_recipe(recipe, 16, tmp_path, max_rows=700)
    assert len(loaded.collections[0].rows) == 700  # of 1,898
    assert [len(side.rows) for side in loaded.pairs[0]] == [700, 700]
    splits = {row.split for row in loaded.collections[0].rows}
    assert splits == {"train", "validation", "test"}


def test_encoded_pictures_are_read_one_after_the_other(tmp_path: Path) -> None:
    """No more than one is read ahead of the one that is fitted."""
    mine, seen = painted(tmp_path / "mine", 12), list[int]()

    def watched(function: Any, encoded: Any) -> Iterator[Any]:
        for number, data in enumerate(encoded):
            (
                mine / f"{2 * number + 1:02}.png"
            ).unlink()  # the next one: it would not be missed, were it read already
            seen.append(number)
            yield function(data)

    recipe = of_folder(mine)
    loaded = load_recipe(recipe, 32, tmp_path / "data", watched)
    assert len(seen) == 6 == len(loaded.collections[0].rows)
    assert loaded.collections[0].left_out == {"missing": 6}


def test_a_part_without_a_picture_to_train_on_is_refused(tmp_path: Path) -> None:
    mine = painted(tmp_path / "mine", 60)
    rows = load_recipe(of_folder(mine), 8, tmp_path / "data").collections[0].rows
    for row in rows:
        if row.split == "train":
            (mine / row.id).unlink()
    with pytest.raises(UserError, match="mine: none of its"):
        load_recipe(of_folder(mine), 8, tmp_path / "data")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_leave_the_weights_alone(bad: float) -> None:
    layer = torch.nn.Linear(3, 2)
    steps = Optimiser(layer, OptimConfig(), World())
    layer(torch.ones(1, 3)).sum().backward()
    steps.update(0)
    before = {name: t.clone() for name, t in steps.tensors("").items()}
    layer(torch.tensor([[1.0, bad, 1.0]])).sum().backward()
    with pytest.raises(UserError, match=r"step 8: gradients are not finite, first in weight"):
        steps.update(7)
    assert all(torch.equal(before[name], t) for name, t in steps.tensors("").items())


def test_a_line_that_was_cut_off_is_dropped_on_resume(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 1}\n{"step": 2, "loss": 1}\n{"step": 3, "lo')
    trim_log(file, 10)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]
    file.write_text('{"st')
    trim_log(file, 10)
    assert file.read_text() == ""


def test_everyone_may_read_what_the_umask_lets_them(model: Path, place: Place, tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        pictures = fit_recipe(place.recipe, 32, place.out / "data", max_rows=20)
        stage = make_stage("tokenize", place, pictures)
        save_state(stage, 1, tmp_path / "state")
        place.finish("tokenize", stage)
    finally:
        os.umask(old)
    files = [*(tmp_path / "state").iterdir(), *place.part_of("tokenize").iterdir()]
    assert len(files) == 4 and {file.stat().st_mode & 0o777 for file in files} == {0o644}


@pytest.mark.parametrize(
    "wrong",
    [
        {"save_every": 0}, {"log_every": 0}, {"evaluate_every": -1}, {"steps": -5}, {"batch_size": 0},
        {"max_rows": 0}, {"workers": -1}, {"freeze_layers": -1}, {"seed": -1}, {"min_workers": 0},
        {"workers": 2, "min_workers": 3},
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--{list(wrong)[-1].replace('_', '-')}"):
        SynthesisTrainConfig(stage="all", out="x", **wrong)


def test_the_command_without_ray_checks_its_numbers_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llmvis.training", "--out", str(tmp_path / "x"), "--steps", "-5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "at least 1" in done.stderr and not (tmp_path / "x").exists()


def test_pictures_without_captions_are_asked_for_by_style_alone(tmp_path: Path) -> None:
    mine = painted(tmp_path / "mine", 12)
    recipe = replace(
        of_folder(mine),
        pairs=(Pairs(name="p", source=str(mine), target=str(mine), instructions=("paint it: {caption}",)),),
        tasks={"generate": 1, "translate": 1, "caption": 1},
    )
    loaded = load_recipe(recipe, 64, tmp_path / "data")
    tokenizer = load_tokenizer(Path(__file__).parents[1] / "llmvis/weights/synthesis/tokenizer")
    batch = code_all(loaded, tokenizer, 1, tmp_path / "data").batch(np.random.default_rng(0), 200, 0.1)
    assert set(batch.texts) == {"", "plain", "paint it"} and not batch.ask_words.any()
