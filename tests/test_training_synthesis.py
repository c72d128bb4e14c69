"""Training of the synthesis stages: data order, masks, resume, workers, and a real run on Ray that is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmvis.cluster.train_synthesis import (
    SynthesisTrainConfig,
    _train_on_ray,
    cpu_share,
    on_cluster,
    train_synthesis,
)
from llmvis.enhance import TASKS
from llmvis.models.language import MASKED
from llmvis.models.restorer import load_restorer
from llmvis.models.synthesizer_files import load_synthesizer
from llmvis.presets import PRESETS, tiny
from llmvis.recipe import PACKAGED_RECIPE, read_recipe
from llmvis.schema import UserError
from llmvis.synthesis_data import LanguageData, fit_recipe, load_recipe
from llmvis.training import stages
from llmvis.training.common import Every, Files, Stage, World, load_state, run_alone, save_state, trim_log
from llmvis.training.stages import STAGES, Place, claim, train_alone
from llmvis.training.views import changed_views

ROWS = 30
EVERY_STAGE = (*STAGES, "restore")
EVERY = Every(log=5, evaluate=20, save=10)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A tiny model, trained by all stages in this process."""
    place = Place(out=tmp_path_factory.mktemp("tiny"), preset=tiny(), recipe=read_recipe(), max_rows=ROWS)
    for stage in STAGES:
        train_alone(stage, place, EVERY)
    return place


def make_stage(name: str, place: Place, **more: Any) -> Stage:
    """A stage on its pictures, which lie there from the place's own training."""
    side = stages.side_of(name, place)
    pictures = fit_recipe(place.recipe, side, place.out / "data", max_rows=place.max_rows)
    return stages.make_stage(name, place, pictures, **more)


def told(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_all_stages_leave_a_model_metrics_and_samples(place: Place) -> None:
    model = load_synthesizer(place.out)
    assert model.branch is not None
    assert model.generate(["a dog"]).shape == (1, 32, 32, 3)
    for stage in STAGES:
        losses = [line["loss"] for line in told(place.files_of(stage))]
        assert len(losses) == 4 and losses[-1] < losses[0]
        assert [line["step"] for line in told(place.files_of(stage), "evaluation")] == [20]
        assert (place.files_of(stage) / "curves.png").stat().st_size > 1000
        assert (place.files_of(stage) / "samples" / "0000020.png").stat().st_size > 1000
    with pytest.raises(UserError, match="is trained"):
        train_alone("language", place, EVERY)


def test_the_restorer_learns_without_the_other_stages(tmp_path: Path) -> None:
    recipe = read_recipe(PACKAGED_RECIPE.with_name("recipe-restore.yaml"))
    place = Place(out=tmp_path, preset=tiny(), recipe=recipe, max_rows=ROWS)
    train_alone("restore", place, EVERY)
    (scores,) = told(place.files_of("restore"), "evaluation")
    for task in TASKS:
        assert scores[f"psnr_{task}"] > scores[f"psnr_{task}_spoilt"] + 0.01
    assert not (tmp_path / "tokenizer").exists()
    trained = load_restorer(tmp_path / "restorer").state_dict()
    again = stages.make_stage("restore", replace(place, start=tmp_path), next((tmp_path / "data").iterdir()))
    assert all(torch.equal(trained[name], t) for name, t in again.model.state_dict().items())  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="is trained"):
        train_alone("restore", place, EVERY)
    with pytest.raises(UserError, match="no restorer"):
        train_alone("restore", replace(place, out=tmp_path / "other", start=tmp_path / "none"), EVERY)


@pytest.mark.parametrize("name", EVERY_STAGE)
def test_a_run_that_stopped_goes_on_as_if_it_had_not(place: Place, name: str, tmp_path: Path) -> None:
    whole, first, second = (make_stage(name, place) for _ in range(3))
    losses = [whole.step(i)["loss"] for i in range(14)]
    for i in range(11):
        first.step(i)
    save_state(first, 11, tmp_path)
    assert load_state(second, tmp_path) == 11
    assert [second.step(i)["loss"] for i in range(11, 14)] == pytest.approx(losses[11:], rel=1e-4)


def test_a_state_of_other_settings_is_refused(place: Place, tmp_path: Path) -> None:
    stage = make_stage("tokenize", place)
    save_state(stage, 3, tmp_path)
    other = replace(place.preset, tokenize=replace(place.preset.tokenize, perceptual=0.5))
    with pytest.raises(UserError, match="another config"):
        load_state(make_stage("tokenize", replace(place, preset=other)), tmp_path)
    with pytest.raises(UserError, match="another max_rows"):
        for rows in (1, 2):
            claim("tokenize", replace(place, out=tmp_path / "claimed", max_rows=rows), "pictures-1")


class Meeting:
    """An all-reduce between threads: everyone's tensors are averaged when all have come."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._brought: dict[int, list[torch.Tensor]] = {}
        self._size = size

    def mean(self, rank: int, tensors: list[torch.Tensor]) -> None:
        self._brought[rank] = [t.clone() for t in tensors]
        self._barrier.wait(60)
        for place, tensor in enumerate(tensors):
            tensor.copy_(torch.stack([self._brought[r][place] for r in range(self._size)]).mean(0))
        self._barrier.wait(60)


def without_dropout(stage: Any) -> Any:
    """Dropout is drawn by each worker for itself."""
    for module in vars(stage).values():
        inner = getattr(module, "language", module)
        if isinstance(inner, torch.nn.Module):
            for part in inner.modules():
                if isinstance(part, torch.nn.Dropout):
                    part.p = 0.0
    return stage


@pytest.mark.parametrize("name", EVERY_STAGE)
def test_two_workers_train_as_one_does(place: Place, name: str) -> None:
    """The same losses with one worker and with two at the same global batch, also once the GAN counts."""
    early = replace(place.preset, tokenize=replace(place.preset.tokenize, gan_start=0.1))
    place = replace(place, preset=early)
    alone = without_dropout(make_stage(name, place))
    meeting = Meeting(2)
    losses: dict[int, list[float]] = {}
    worlds = [World(rank, 2, partial(meeting.mean, rank)) for rank in (0, 1)]
    for world in worlds if name != "tokenize" else []:  # each makes its share of the code words
        with suppress(FileNotFoundError):
            make_stage(name, place, world=world)
    pair = [without_dropout(make_stage(name, place, world=world)) for world in worlds]

    def work(rank: int) -> None:
        losses[rank] = [pair[rank].step(number)["loss"] for number in range(5)]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    whole = [alone.step(number)["loss"] for number in range(5)]
    for thread in threads:
        thread.join()
    assert np.mean([losses[0], losses[1]], axis=0) == pytest.approx(whole, rel=0.01)
    if name == "language":  # told after averaging
        assert losses[0] == losses[1]


def test_what_is_masked_is_asked_for_and_words_are_dropped_now_and_then(place: Place) -> None:
    stage: Any = make_stage("language", place)
    data: LanguageData = stage._data
    batch = data.batch(np.random.default_rng(0), 400, 0.1)
    assert batch.target.shape == batch.source.shape == batch.hide.shape == (400, 16, 2)
    translated = (batch.source != MASKED).all((1, 2))
    assert 0.4 < translated.mean() < 0.6
    assert batch.hide[~batch.ask_words].any((1, 2)).all() and not batch.hide[batch.ask_words].any()
    assert 0.05 < batch.ask_words.mean() < 0.16 and not (translated & batch.ask_words).any()
    empty = np.array([text == "" for text in batch.texts])
    assert 0.05 < empty[~batch.ask_words].mean() < 0.16
    again = data.batch(np.random.default_rng(0), 400, 0.1)
    assert again.texts == batch.texts and (again.target == batch.target).all()
    held = {row.caption for part in data.collections for row in part.rows if row.split != "train"}
    train = {row.caption for part in data.collections for row in part.rows if row.split == "train"}
    assert not {text.split(", ")[0] for text in batch.texts} & (held - train)


def test_both_sides_of_a_pair_are_seen_in_the_same_view(place: Place) -> None:
    loaded = load_recipe(place.recipe, 32, place.out / "data", max_rows=ROWS)
    source, target = loaded.pairs[0]
    assert [row.id for row in source.rows] == [row.id for row in target.rows]
    from llmvis.synthesis_data import _chance

    chance = torch.from_numpy(np.stack([_chance(row.id, 1) for row in source.rows]))
    moved = [
        changed_views(torch.from_numpy(np.array(side.pixels)).permute(0, 3, 1, 2).float() / 255, chance)
        for side in (source, target)
    ]
    plain = [torch.from_numpy(np.array(side.pixels[..., 3])).float() / 255 for side in (source, target)]
    same = [(1 - m.min(1).values) for m in moved]
    assert not torch.allclose(same[0], plain[0], atol=0.2)
    drawn = [float(m.sum()) for m in same]
    assert drawn[1] >= drawn[0] > 0


def test_views_are_functions_of_their_chance() -> None:
    rgba = torch.rand(2, 4, 16, 16)
    chance = torch.rand(2, 9)
    chance[0, 0] = 0.1  # as it is
    view = changed_views(rgba, chance)
    on_white = rgba[:, :3] * rgba[:, 3:] + 1 - rgba[:, 3:]
    assert torch.allclose(view[0], on_white[0], atol=1e-5)
    assert torch.equal(view, changed_views(rgba, chance)) and view.shape == (2, 3, 16, 16)
    assert view.min() >= 0 and view.max() <= 1 + 1e-6


def test_presets_change_by_name() -> None:
    for make in PRESETS.values():
        changed = make().changed(steps=7, batch_size=4, seed=3)
        trained = (changed.tokenize, changed.language, changed.branch, changed.restore)
        for optim in (stage.optim for stage in trained):
            assert (optim.steps, optim.batch_size, optim.seed) == (7, 4, 3)
        assert make().changed(steps=None, batch_size=None, seed=None) == make()


def test_files_keep_the_last_two_states_and_lines_up_to_a_step(place: Place, tmp_path: Path) -> None:
    stage, files = make_stage("branch", place), Files(tmp_path)
    for step in (1, 2, 3):
        files.keep(stage, step)
        files.tell(step, {"loss": 1.0})
    assert [folder.name for folder in files.states()] == ["step-0000002", "step-0000003"]
    trim_log(tmp_path / "metrics.jsonl", 2)
    assert [line["step"] for line in told(tmp_path)] == [1, 2]


def test_a_killed_process_goes_on_to_the_same_end(place: Place, tmp_path: Path) -> None:
    """`run_alone`, stopped by an error in step 13: the rest is the unbroken run's."""

    class StoppedError(Exception):
        pass

    stage: Any = make_stage("branch", place)
    step = stage.step

    def fails_at_13(number: int) -> dict[str, float]:
        if number == 13:
            raise StoppedError
        result: dict[str, float] = step(number)
        return result

    stage.step = fails_at_13
    with pytest.raises(StoppedError):
        run_alone(stage, tmp_path, EVERY)
    run_alone(make_stage("branch", place), tmp_path, EVERY)
    unbroken = [line["loss"] for line in told(place.files_of("branch"))]
    assert [line["loss"] for line in told(tmp_path)] == pytest.approx(unbroken, rel=1e-4)


def command(out: Path, *more: str) -> list[str]:
    stages = ["--stage", "tokenize", "--preset", "tiny", "--max-rows", str(ROWS), "--out", str(out)]
    often = ["--log-every", "5", "--save-every", "10", "--threads", "1"]
    return [sys.executable, "-m", "jobs.train", *stages, *often, *more]


def test_a_run_on_ray_with_two_workers_outlives_a_killed_worker_and_a_killed_driver(
    place: Place, tmp_path: Path
) -> None:
    """60 steps on 2 workers: a worker is killed after step 10, the driver after step 30; the end is as unbroken."""
    out = tmp_path / "run"
    config = SynthesisTrainConfig(
        stage="tokenize",
        preset="tiny",
        out=str(out),
        workers=2,
        steps=60,
        max_rows=ROWS,
        log_every=5,
        save_every=10,
    )
    args = command(out, "--workers", "2", "--steps", "60")
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(args, stdout=log, stderr=log, start_new_session=True)
    metrics = out / "train-tokenize" / "metrics.jsonl"
    try:
        wait_for(lambda: reached(metrics, 15), first)
        victims = workers_of(first.pid)
        assert len(victims) >= 2
        os.kill(victims[0], signal.SIGKILL)
        wait_for(lambda: reached(metrics, 35), first)
        os.killpg(first.pid, signal.SIGKILL)
        assert first.wait() == -signal.SIGKILL
        assert not (out / "tokenizer").exists()
    finally:
        end_session(first)
    done = subprocess.run(args, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"model: {out}" in done.stdout
    whole = replace(
        place, out=tmp_path / "whole", preset=tiny().changed(steps=60, batch_size=None, seed=None)
    )
    train_alone("tokenize", whole, EVERY)
    mine = {line["step"]: line["loss"] for line in told(out / "train-tokenize")}
    theirs = {line["step"]: line["loss"] for line in told(whole.files_of("tokenize"))}
    assert mine.keys() == theirs.keys()
    assert mine[60] == pytest.approx(theirs[60], rel=0.1)  # rank 0's half of the batch against the whole
    assert list((out / "train-tokenize" / "tensorboard").glob("events*"))

    with pytest.raises(UserError, match="trained already"):
        train_synthesis(config)
    shutil.rmtree(out / "tokenizer")
    with pytest.raises(UserError, match="another preset"):
        train_synthesis(replace(config, seed=9))


def test_a_worker_s_mistake_ends_the_run_at_once_and_in_words(
    place: Place, tmp_path: Path, ray_cluster: None
) -> None:
    """Weights that explode in the first step: a worker raises `UserError`, once, and the driver has its words."""
    preset = place.preset
    wild = replace(preset.tokenize, optim=replace(preset.tokenize.optim, learning_rate=1e30, warmup=1))
    exploding = replace(place, out=tmp_path, preset=replace(preset, tokenize=wild))
    config = SynthesisTrainConfig(stage="tokenize", out=str(tmp_path), log_every=1)
    with pytest.raises(UserError, match=r"step \d+: gradients are not finite"):
        _train_on_ray("tokenize", exploding, config)
    assert len(list((tmp_path / "train-tokenize" / "tensorboard").glob("events*"))) == 1  # one for each try


def test_a_worker_s_share_of_the_node_s_cpus(ray_cluster: None) -> None:
    import ray

    @ray.remote(num_cpus=1)
    def share(workers: int) -> int:
        return cpu_share(workers)

    assert ray.get([share.remote(1), share.remote(2), share.remote(9)]) == [2, 1, 1]


def test_pictures_go_to_the_cluster_in_portions_and_come_back_in_order(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmvis.cluster.train_synthesis.HELD_BYTES", 40)
    taken: list[int] = []

    def encoded() -> Any:
        for i in range(20):
            taken.append(i)
            yield bytes([i]) * 10

    def shade(data: bytes) -> Any:
        return "odd" if data[0] % 2 else np.full((1, 1, 4), data[0], np.uint8)

    made = on_cluster(shade, encoded())
    first = next(made)
    assert taken == [0, 1, 2, 3] and first[0, 0, 0] == 0  # four of ten bytes are all that it holds
    rest = list(made)
    assert [x if isinstance(x, str) else int(x[0, 0, 0]) for x in rest] == [
        "odd" if i % 2 else i for i in range(1, 20)
    ]


def reached(metrics: Path, step: int) -> bool:
    return metrics.exists() and any(
        json.loads(line)["step"] >= step for line in metrics.read_text().splitlines()
    )


def wait_for(condition: Any, process: subprocess.Popen[bytes], seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < until, "the run did not get there"
        time.sleep(0.05)


def workers_of(driver: int) -> list[int]:
    import psutil

    family = psutil.Process(driver).children(recursive=True)
    return sorted(p.pid for p in family if "RayTrainWorker" in " ".join(p.cmdline()))


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Ends what a killed driver left behind: its Ray processes are in its session."""
    import psutil

    for other in psutil.process_iter():
        try:
            if os.getsid(other.pid) == process.pid:
                other.kill()
        except (psutil.Error, ProcessLookupError):
            continue
    process.wait()
