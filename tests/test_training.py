"""The alignment stage: deterministic order, exact resume, equal gradients, and a real Ray Train run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from llmvis.align_data import Bank, Row, class_features, class_rows, sample_text, texts_of, training_rows
from llmvis.augment import view_of
from llmvis.models.efficientnet import CLASSES
from llmvis.models.preprocess import SquarePreprocess
from llmvis.models.two_tower import IMAGE_FEATURES, load_two_tower
from llmvis.models.two_tower_info import TwoTowerConfig
from llmvis.training.align import AlignConfig, Aligner

MODEL = TwoTowerConfig(text_dim=16, learned_dim=16, hidden=0)
CONFIG = AlignConfig(epochs=4, batch_size=32, dropout=0.2, learning_rate=3e-3)


def small_bank(rows: int = 120, views: int = 2) -> Bank:
    """Random features that are a noisy function of random texts, so there is something to learn."""
    rng = np.random.default_rng(0)
    captions = [f"thing {i}" for i in range(rows)]
    table = [
        Row(f"t/{i}", b"", caption, (f"kind {i % 7}",), "emoji", "validation" if i % 6 == 0 else "train")
        for i, caption in enumerate(captions)
    ]
    phrases = {text: i for i, text in enumerate(sorted({t for row in table for t in texts_of(row)}))}
    texts = F.normalize(torch.from_numpy(rng.normal(size=(len(phrases), 16))).float(), dim=1)
    mixing = torch.from_numpy(rng.normal(size=(16, IMAGE_FEATURES))).float()
    signal = texts[[phrases[caption] for caption in captions]] @ mixing
    noise = torch.from_numpy(rng.normal(size=(views, rows, IMAGE_FEATURES))).float()
    features = (signal + 0.1 * noise).relu().half()
    return Bank(table, features, torch.zeros(rows, CLASSES).half(), phrases, texts.half())


def aligner(config: AlignConfig = CONFIG, rank: int = 0, world: int = 1) -> Aligner:
    bank = small_bank()
    return Aligner(bank, bank.where("train"), MODEL, config, rank=rank, world=world)


def test_training_lowers_the_loss_and_raises_recall() -> None:
    run = aligner()
    validation = small_bank().where("validation")
    before = run.validate(validation)["r_at_1"]
    while not run.progress.is_over(CONFIG):
        after = run.fit_epoch(validation)
    assert run.progress.losses[-1] < 0.7 * run.progress.losses[0]
    assert after["r_at_1"] > before


def test_order_of_the_data_is_a_function_of_seed_and_epoch() -> None:
    first, again = list(aligner().batches(1)), list(aligner().batches(1))
    assert all(
        torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert not torch.equal(first[0][0], next(aligner().batches(2))[0])
    assert not torch.equal(first[0][0], next(aligner(replace(CONFIG, seed=1)).batches(1))[0])


def test_workers_slices_make_up_the_batch_of_one_worker() -> None:
    whole = next(aligner().batches(0))
    halves = [next(aligner(rank=rank, world=2).batches(0)) for rank in range(2)]
    assert torch.equal(torch.cat([halves[0][0], halves[1][0]]), whole[0])
    assert torch.equal(torch.cat([halves[0][1], halves[1][1]]), whole[1])


def test_a_resumed_run_is_the_run_that_was_not_interrupted(tmp_path: Path) -> None:
    validation = small_bank().where("validation")
    straight = aligner()
    for _ in range(3):
        straight.fit_epoch(validation)
    broken = aligner()
    for _ in range(2):
        broken.fit_epoch(validation)
    broken.save(tmp_path)
    resumed = aligner()
    resumed.load(tmp_path)
    resumed.fit_epoch(validation)
    assert resumed.progress == straight.progress
    for name, tensor in straight.learned.state_dict().items():
        assert torch.equal(tensor, resumed.learned.state_dict()[name]), name


def test_a_checkpoint_of_another_config_is_refused(tmp_path: Path) -> None:
    aligner().save(tmp_path)
    with pytest.raises(ValueError, match="use a new run name"):
        aligner(replace(CONFIG, learning_rate=1.0)).load(tmp_path)


def test_a_batch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="batch-size"):
        aligner(replace(CONFIG, batch_size=1000))


def test_early_stopping_waits_for_patience() -> None:
    run = aligner(replace(CONFIG, epochs=100, patience=2))
    run.progress.history = [1.0, 5.0, 4.0]
    assert not run.progress.is_over(run.config)
    run.progress.history.append(5.0)  # equal is no better
    assert run.progress.is_over(run.config)


def test_purge_drops_what_looks_or_reads_like_a_held_out_row() -> None:
    bank = small_bank()
    everything = bank.where("train")
    held = int(bank.where("validation")[0])
    twin, namesake = int(everything[0]), int(everything[1])
    bank.features[0, twin] = bank.features[0, held]
    bank.texts[bank.phrases[bank.rows[namesake].caption]] = bank.texts[bank.phrases[bank.rows[held].caption]]
    kept = training_rows(bank, near_picture=0.95, near_caption=0.99)
    assert set(everything) - set(kept) == {twin, namesake}


def test_class_rows_stand_for_what_the_trunk_knows() -> None:
    """The features made for a class are ones that the trunk's classifier takes for that class."""
    model = load_two_tower().model
    features = torch.rand(2, 50, IMAGE_FEATURES).half()
    made, logits = class_features(model, features, torch.zeros(50, CLASSES).half(), np.arange(50))
    rows = class_rows()
    assert made.shape == (2, len(rows), IMAGE_FEATURES) == (2, 1000, IMAGE_FEATURES)
    assert made.min() >= 0 and torch.isfinite(made).all()
    assert (logits.argmax(1) == torch.arange(1000)).float().mean() > 0.98
    assert rows[207].caption.lower() == "golden retriever" and rows[0].keywords


def test_texts_are_sampled_from_all_of_a_picture_s_words() -> None:
    row = Row("x", b"", "red apple", ("fruit", "food"), "emoji", "train")
    rng = np.random.default_rng(0)
    drawn = [sample_text(row, rng) for _ in range(2000)]
    assert set(drawn) == {"red apple", "red apple, fruit, food", "fruit, food", "fruit", "food"}
    assert 0.45 < drawn.count("red apple") / 2000 < 0.55
    assert sample_text(Row("y", b"", "plain", (), "emoji", "train"), rng) == "plain"


def test_views_are_fixed_and_differ() -> None:
    from llmvis.data import load_emoji

    data = load_emoji("test")["image"][0].as_py()["bytes"]
    preprocess = SquarePreprocess(size=64)
    views = [view_of(data, preprocess, number, seed=3) for number in range(3)]
    assert all(np.array_equal(view_of(data, preprocess, n, seed=3), view) for n, view in enumerate(views))
    assert not np.array_equal(views[1], views[2])


@pytest.fixture
def nothing_at_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.delenv("LLMVIS_OPENCLIPART", raising=False)
    monkeypatch.setenv("LLMVIS_CACHE", str(tmp_path / "cache"))
    return tmp_path


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).norm())


def test_two_workers_on_ray_train_what_one_trains(ray_cluster: None, nothing_at_hand: Path) -> None:
    """A real run with 2 workers gives the weights of 1 (in process): gradients go through the gather."""
    from llmvis.cluster.train import TrainConfig, train

    align = AlignConfig(epochs=2, batch_size=16, dropout=0.0, patience=9, train_text=True)
    quick = TrainConfig(stage="align", out="", max_rows=60, views=1, image_size=64, hidden=0, align=align)
    outs = [str(nothing_at_hand / f"run{workers}") for workers in (0, 2)]
    folders = [train(replace(quick, out=out, workers=w)) for out, w in zip(outs, (0, 2), strict=True)]
    one, two = (load_file(folder / "model.safetensors") for folder in folders)
    # norms, not elements: Adam blows rounding up where a gradient is all but zero
    for name, tensor in one.items():
        assert _distance(tensor, two[name]) < 0.02 * float(tensor.float().norm()) + 1e-3, name
    start, text = torch.eye(384), "learned.text.weight"
    assert _distance(one[text], start) > 0.1
    assert _distance(one[text], two[text]) < 0.1 * _distance(one[text], start)
    encoder = load_two_tower(folders[1])
    assert encoder.encode_texts(["a dog"]).shape == (1, 768)

    run_file = Path(outs[1]) / "run.json"
    run = json.loads(run_file.read_text())
    assert run["finished"] and run["metrics"]["epoch"] == 2.0
    with pytest.raises(ValueError, match="holds a finished run"):
        train(replace(quick, out=outs[1], workers=2))
    run_file.write_text(json.dumps(run | {"finished": False}))  # as if the driver had died at the end
    with pytest.raises(ValueError, match="another temperature"):
        train(replace(quick, out=outs[1], workers=2, temperature=9.0))
    before = (folders[1] / "model.safetensors").read_bytes()
    train(replace(quick, out=outs[1], workers=2))  # taken up at its end: nothing changes
    assert (folders[1] / "model.safetensors").read_bytes() == before
