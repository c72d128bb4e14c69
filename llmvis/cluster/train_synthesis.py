"""The synthesis stages on Ray Train V2: pictures by Ray Data, gradients averaged, states kept by Ray.

Every worker does its slice of each batch (`training.common`), so losses do not depend on how
many there are, and a run that lost a worker goes on from the last state with as many as it
gets. A run whose driver died goes on by the same command. What training is, `llmvis.training`
knows; nothing here is needed to train in one process.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import ray.data
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from PIL import Image
from ray.train import CheckpointUploadMode, ControllerError, UserCallback
from tensorboardX import SummaryWriter

from llmvis.config import at_least
from llmvis.pictures import Fitted
from llmvis.presets import PRESETS, Preset
from llmvis.recipe import PACKAGED_RECIPE, read_recipe
from llmvis.schema import UserError
from llmvis.training.common import (
    Every,
    Files,
    OptimConfig,
    Told,
    World,
    fit,
    flat_mean,
    load_state,
    save_state,
    trim_log,
)
from llmvis.training.stages import Place, check, make_stage, prepare, stages_of, train_alone

AT_ONCE = 64  # pictures in a task
HELD_ITEMS, HELD_BYTES = 4096, 128 * 2**20
"""Encoded pictures that are with Ray at a time, at most, and their bytes, about."""


@dataclass(frozen=True, kw_only=True)
class SynthesisTrainConfig:
    """Train a synthesis model on Ray, stage by stage; the same command goes on where a run stopped.

    tokenize: pictures to code words and back. language: fill in what is masked.
    branch: keep fine lines of the source in translation. all: these, one after the other.
    restore: a network of its own that takes noise and blur out, and enlarges with detail.

    Examples:

      python -m jobs.train --stage all --preset tiny --out runs/tiny --max-rows 60

      python -m jobs.train --stage all --preset small --out runs/small

      python -m jobs.train --stage language --recipe mine.yaml --start runs/small --out runs/mine --workers 4 --gpu
    """

    stage: Literal["tokenize", "language", "branch", "restore", "all"]
    """What to train."""
    out: str
    """Folder of the model: tokenizer/, language/, branch/, restorer/, and train-<stage>/ with metrics and samples."""
    preset: Literal["tiny", "small", "base"] = "small"
    """Size of the model and length of its training."""
    recipe: str = str(PACKAGED_RECIPE)
    """YAML of collections, pairs and tasks to train on; default: the packaged emoji in four hands."""
    start: str | None = None
    """Folder of a model to begin from: its tokeniser where out has none, and its language model. Stage tokenize
    then trains the decoder alone, so that code words stay what that language model knows."""
    train_encoder: bool = False
    """With --start: train the tokeniser's encoder too. Code words change, and the language model must learn them."""
    language_model: str | None = None
    """"packaged" (MiniLM), a folder, or a Hugging Face name of a masked language model; default: the preset's.
    Not with --start, whose model has one."""
    freeze_layers: int = 0
    """Layers of the language model, from the bottom, that stay as they are."""
    workers: int = 1
    """Training processes; a batch is split over them. 0 trains in this process, without Ray."""
    threads: int | None = None
    """CPU threads of each worker, as on a machine that has other work; default: its share of its node's CPUs."""
    min_workers: int | None = None
    """Train with as few as this, and with up to --workers as the cluster has room (elastic)."""
    gpu: bool = False
    """Give every worker a GPU."""
    steps: int | None = None
    """Steps of each stage, for another length than the preset's."""
    batch_size: int | None = None
    """Rows of a batch over all workers, for another than the preset's."""
    seed: int | None = None
    """Of everything random; default: the preset's, 0."""
    max_rows: int | None = None
    """Use only so many pictures of each part (a quick trial)."""
    log_every: int = 20
    """Steps between lines of metrics."""
    evaluate_every: int = 500
    """Steps between evaluations on validation pictures, with a sheet of samples."""
    save_every: int = 250
    """Steps between saved states."""

    def __post_init__(self) -> None:
        at_least(self, 1, "threads", "min_workers", "steps", "batch_size", "max_rows")
        at_least(self, 1, "log_every", "evaluate_every", "save_every")
        at_least(self, 0, "workers", "freeze_layers", "seed")
        if self.min_workers is not None and self.min_workers > self.workers:
            raise UserError(f"--min-workers {self.min_workers} is more than --workers {self.workers}")

    @property
    def every(self) -> Every:
        """How often, for the loop."""
        return Every(log=self.log_every, evaluate=self.evaluate_every, save=self.save_every)

    def place(self) -> Place:
        """What is trained, where."""
        preset = PRESETS[self.preset]().changed(steps=self.steps, batch_size=self.batch_size, seed=self.seed)
        preset = replace(preset, language=replace(preset.language, freeze_layers=self.freeze_layers))
        if self.language_model is not None:
            preset = replace(preset, language_model=self.language_model)
        start = Path(self.start).resolve() if self.start else None
        return Place(
            out=Path(self.out).resolve(),
            preset=preset,
            recipe=read_recipe(self.recipe),
            start=start,
            train_encoder=self.train_encoder,
            max_rows=self.max_rows,
        )


def train_synthesis(config: SynthesisTrainConfig) -> Path:
    """Run or resume the stages asked for; returns the model's folder.

    Raises `UserError` where `out` holds another run, or the stage is done, or its parts are missing.
    """
    place = config.place()
    names = stages_of(config.stage, place.recipe)
    _check_batch(names, place.preset, config)
    check(names, place, config.language_model)
    for name in names:
        if place.is_done(name):
            continue
        if config.workers == 0:
            if config.threads:
                torch.set_num_threads(config.threads)
            train_alone(name, place, config.every, "cuda" if config.gpu else "cpu")
        else:
            _train_on_ray(name, place, config)
    return place.out


def _check_batch(names: tuple[str, ...], preset: Preset, config: SynthesisTrainConfig) -> None:
    for name in names:
        optim: OptimConfig = getattr(preset, name).optim
        for workers in range(config.min_workers or config.workers or 1, (config.workers or 1) + 1):
            if optim.batch_size % workers:
                raise UserError(
                    f"a batch of {optim.batch_size} can't be split over {workers} workers: set --batch-size"
                )


def _train_on_ray(name: str, place: Place, config: SynthesisTrainConfig) -> None:
    pictures = prepare(name, place, on_cluster)
    many: Any = (config.min_workers, config.workers) if config.min_workers else config.workers
    callbacks: list[Any] = [_Mistakes()]  # Ray's types know those of Ray Tune
    trainer = ray.train.torch.TorchTrainer(
        _worker,
        train_loop_config={
            "stage": name,
            "place": place,
            "pictures": pictures,
            "every": config.every,
            "threads": config.threads,
        },
        scaling_config=ray.train.ScalingConfig(num_workers=many, use_gpu=config.gpu),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=str(place.files_of(name)),
            failure_config=ray.train.FailureConfig(max_failures=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            callbacks=callbacks,
        ),
    )
    try:
        trainer.fit()
    except ControllerError as error:
        if isinstance(error.controller_failure, UserError):
            raise UserError(str(error.controller_failure)) from error
        raise
    shutil.rmtree(place.files_of(name) / "ray", ignore_errors=True)


class _Mistakes(UserCallback):
    """Ends a run at a worker's `UserError`: the same would come again, whatever Ray's retries are for."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, UserError):
                raise UserError(str(error))


def _worker(settings: dict[str, Any]) -> None:
    """One worker of one stage, from the last state to the end."""
    place, name, every = settings["place"], settings["stage"], settings["every"]
    context = ray.train.get_context()
    size, rank = context.get_world_size(), context.get_world_rank()
    torch.set_num_threads(settings["threads"] or cpu_share(context.get_local_world_size()))
    world = World(rank, size, flat_mean(dist.all_reduce, size)) if size > 1 else World()
    device = str(ray.train.torch.get_device())
    wait = dist.barrier if size > 1 else _go_on
    stage = make_stage(name, place, settings["pictures"], world=world, device=device, wait=wait)
    begin, checkpoint = 0, ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            begin = load_state(stage, Path(folder))
    hooks = _Rank0(Files(place.files_of(name)), begin) if rank == 0 else None

    def tell(step: int, told: Told) -> None:
        if hooks:
            hooks.tell(step, told, "train")

    def show(step: int, told: Told, picture: Image.Image | None) -> None:
        if hooks:
            hooks.show(step, told, picture)

    def keep(step: int, told: Told) -> None:
        if rank > 0:
            ray.train.report(told)
            return
        folder = Path(tempfile.mkdtemp(prefix="llmvis-state-"))
        save_state(stage, step, folder)
        ray.train.report(
            told,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )

    fit(stage, begin, every, tell=tell, show=show, keep=keep)
    if rank == 0:
        place.finish(name, stage)


def cpu_share(workers: int) -> int:
    """CPUs of this node for each of its workers. Ray itself counts one for a worker, and gives it one thread."""
    node = ray.get_runtime_context().get_node_id()
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    cpus = next(n["Resources"].get("CPU", 1) for n in nodes if n["NodeID"] == node)
    return max(1, int(cpus) // workers)


def _go_on() -> None:
    """A single worker waits for nobody."""


class _Rank0:
    """Metrics to files, console and TensorBoard; the first worker's."""

    def __init__(self, files: Files, begin: int) -> None:
        trim_log(files.out / "metrics.jsonl", begin)
        self._files, self._board = files, SummaryWriter(str(files.out / "tensorboard"))

    def tell(self, step: int, told: Told, kind: str) -> None:
        self._files.tell(step, told, kind)
        for key, value in told.items():
            self._board.add_scalar(f"{kind}/{key}", value, step)

    def show(self, step: int, told: Told, picture: Image.Image | None) -> None:
        self._files.show(step, told, picture)
        for key, value in told.items():
            self._board.add_scalar(f"evaluation/{key}", value, step)
        if picture is not None:
            self._board.add_image("samples", np.asarray(picture), step, dataformats="HWC")
        self._board.flush()


def on_cluster(function: Callable[[bytes], Fitted], encoded: Iterable[bytes]) -> Iterator[Fitted]:
    """`map` by Ray Data tasks, in order; a `MapRows` for `fit_recipe`. Takes pictures as it needs them."""
    items, held = list[dict[str, bytes]](), 0
    for data in encoded:
        items.append({"data": data})
        held += len(data)
        if len(items) == HELD_ITEMS or held >= HELD_BYTES:
            yield from _in_tasks(function, items)
            items, held = [], 0
    if items:
        yield from _in_tasks(function, items)


def _in_tasks(function: Callable[[bytes], Fitted], items: list[dict[str, bytes]]) -> Iterator[Fitted]:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    blocks = max(1, len(items) // AT_ONCE)
    fit_row: Any = _fit_row  # Ray's types know functions of one argument only
    rows: ray.data.Dataset = ray.data.from_items(items, override_num_blocks=blocks)
    rows = rows.map(fit_row, fn_kwargs={"function": function}, num_cpus=0.5)
    for row in rows.iter_rows():
        yield row["error"] or np.frombuffer(row["pixels"], np.uint8).reshape(row["side"], row["side"], 4)


def _fit_row(row: dict[str, Any], function: Callable[[bytes], Fitted]) -> dict[str, Any]:
    made = function(row["data"])
    if isinstance(made, str):
        return {"error": made, "pixels": b"", "side": 0}
    return {"error": "", "pixels": made.tobytes(), "side": made.shape[0]}
