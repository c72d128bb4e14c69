"""Training on Ray Train V2: `TorchTrainer` around the plain-torch alignment stage.

Every worker computes the trunk features of its share of the pictures, then they are shared;
after that a batch is split over the workers and all embeddings are gathered, so the
negatives are those of the whole batch. An epoch ends with a checkpoint; a run that died is
taken up by the same command, and a run that is finished or was begun with other settings
is refused. What training is, `llmvis.training` knows.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from llmvis.align_data import (
    Bank,
    Row,
    class_features,
    class_rows,
    load_rows,
    phrases_of,
    split_index,
    training_rows,
    trunk_features,
)
from llmvis.data.drawings import fetch_openmoji, find_openmoji
from llmvis.data.openclipart import cache_folder, fetch_openclipart, find_openclipart
from llmvis.losses import Gather, alone
from llmvis.models.convert import initial_model
from llmvis.models.language_model import PACKAGED, language_model_files, language_model_folder
from llmvis.models.two_tower import TextEncoder, TwoTower, ensemble_two_towers, save_two_tower
from llmvis.models.two_tower_info import TwoTowerConfig
from llmvis.schema import UserError
from llmvis.training.align import AlignConfig, Aligner

SCRATCH = "scratch"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a stage of the model on Ray.

    align: the two-tower encoder's learned part, contrastive, on the embedded collection and,
    where they are at hand, openclipart and OpenMoji.

    Examples:

      python -m jobs.train --stage align --out runs/align --download

      python -m jobs.train --stage align --out runs/small --align.epochs 5 --workers 2

      python -m jobs.encode --images photos/ --model runs/align/two_tower --out enc/
    """

    stage: Literal["align"]
    """What to train."""
    out: str
    """Folder of the run: run.json, checkpoints, and two_tower/ when it is done. The same command resumes."""
    workers: int = 1
    """Training processes; a batch is split over them. 0 trains in this process, without checkpoints."""
    gpu: bool = False
    """Give every worker a GPU."""
    openclipart: str | None = None
    """Folder of the unpacked Debian packages openclipart-png, -svg; default: $LLMVIS_OPENCLIPART, cache."""
    openmoji: str | None = None
    """Folder of the unpacked npm package openmoji; default: the cache."""
    download: bool = False
    """Fetch openclipart (156 MB) and OpenMoji (4 MB) from Debian and npm if they are not at hand."""
    language_model: str = PACKAGED
    """"packaged" (MiniLM), a folder, or a Hugging Face name of an encoder language model."""
    image_size: int = 224
    """Side of the trunk's input, px."""
    hidden: int = 768
    """Width of the learned part's MLP; 0: linear."""
    semantic_share: float = 0.5
    """Share of the cosine that the class-name part decides."""
    temperature: float = 1.4
    """Of the class probabilities in the class-name part."""
    views: int = 3
    """Views of each picture: the plain one and augmented ones."""
    seeds: int = 1
    """Train so many seeds, in seed-0/, seed-1/, …, and join them into one model, as in the shipped one."""
    max_rows: int | None = None
    """Use only so many pictures (a quick trial)."""
    align: AlignConfig = field(default_factory=AlignConfig)


def train(config: TrainConfig) -> Path:
    """Run or resume training; returns the folder of the trained encoder, `<out>/two_tower`.

    Raises `ValueError` if `out` holds a finished run or one with other settings.
    """
    out = Path(config.out).resolve()
    if config.seeds == 1:
        return _train_seed(config, out)
    if (out / "two_tower").exists():
        raise UserError(f"{out} holds a finished run: take its two_tower/, or give another --out")
    folders = []
    for number in range(config.seeds):
        align = replace(config.align, seed=config.align.seed + number)
        folder = out / f"seed-{number}"
        if not (folder / "two_tower").exists():
            _train_seed(replace(config, seeds=1, out=str(folder), align=align), folder)
        folders.append(folder / "two_tower")
    ensemble_two_towers(folders, out / "two_tower")
    return out / "two_tower"


def _train_seed(config: TrainConfig, out: Path) -> Path:
    settings = _prepare(config, out)
    trainer = ray.train.torch.TorchTrainer(
        _align_worker,
        train_loop_config=settings,
        scaling_config=ray.train.ScalingConfig(num_workers=config.workers, use_gpu=config.gpu),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=str(out),
            failure_config=ray.train.FailureConfig(max_failures=2),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    result = trainer.fit()
    assert result.checkpoint is not None
    with result.checkpoint.as_directory() as folder:
        shutil.copytree(Path(folder) / "two_tower", out / "two_tower", dirs_exist_ok=True)
    shutil.rmtree(out / SCRATCH, ignore_errors=True)  # on another machine if rank 0 was there
    finished = json.loads((out / "run.json").read_text()) | {"finished": True, "metrics": result.metrics}
    (out / "run.json").write_text(json.dumps(finished, indent=1))
    return out / "two_tower"


def _prepare(config: TrainConfig, out: Path) -> dict[str, Any]:
    """Find the data, refuse a run name that is taken, write `run.json`; returns the workers' settings."""
    sources = {
        "openclipart": find_openclipart(config.openclipart),
        "openmoji": find_openmoji(config.openmoji),
    }
    if config.download:
        sources["openclipart"] = sources["openclipart"] or fetch_openclipart()
        sources["openmoji"] = sources["openmoji"] or fetch_openmoji()
    found = {name: folder and str(folder.resolve()) for name, folder in sources.items()}
    settings = asdict(config) | found | {"out": str(out)}
    wanted = {name: value for name, value in settings.items() if name != "download"}
    run_file = out / "run.json"
    if run_file.exists():
        run = json.loads(run_file.read_text())
        if run["finished"]:
            raise UserError(f"{out} holds a finished run: take its two_tower/, or give another --out")
        if run["settings"] != wanted:
            changed = [name for name in wanted if run["settings"].get(name) != wanted[name]]
            raise UserError(
                f"{out} holds a run with another {', '.join(changed)}: give the same or another --out"
            )
    out.mkdir(parents=True, exist_ok=True)
    run_file.write_text(json.dumps({"finished": False, "settings": wanted}, indent=1))
    return settings


def _align_worker(settings: dict[str, Any]) -> None:
    """One worker: features, then epochs until early stopping, reporting after each."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(max(1, torch.get_num_threads() // world))
    config = AlignConfig(**settings["align"])
    folder = language_model_folder(settings["language_model"])
    text_encoder = TextEncoder(folder)
    shape = TwoTowerConfig(
        language_model=settings["language_model"],
        text_dim=text_encoder.dim,
        learned_dim=text_encoder.dim,
        image_size=settings["image_size"],
        hidden=settings["hidden"],
        semantic_share=settings["semantic_share"],
        temperature=settings["temperature"],
    )
    model = initial_model(shape, text_encoder)
    bank = _bank(settings, model, text_encoder, rank, world)
    aligner = Aligner(
        bank, training_rows(bank), shape, config,
        rank=rank, world=world, gather=gather_with_gradient if world > 1 else alone, mean=average,
    )  # fmt: skip
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as state:
            aligner.load(Path(state))
    validation = np.concatenate([bank.where("validation", source) for source in ("emoji", "openclipart")])
    while not aligner.progress.is_over(config):
        metrics = aligner.fit_epoch(validation)
        if rank > 0:
            ray.train.report(metrics)
            continue
        scratch = Path(settings["out"]) / SCRATCH  # Ray copies it to the run's storage
        aligner.save(scratch)
        model.learned.load_state_dict(aligner.best)
        save_two_tower(model, scratch / "two_tower")
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(scratch))


def _bank(
    settings: dict[str, Any], model: TwoTower, text_encoder: TextEncoder, rank: int, world: int
) -> Bank:
    """Rows, features (from the cache of this machine where every worker has them) and text embeddings."""
    sources = (settings[name] for name in ("openclipart", "openmoji"))
    rows = load_rows(*(Path(folder) if folder else None for folder in sources))
    if settings["max_rows"]:
        # every k-th row, so that all splits and sources stay
        rows = rows[:: max(1, len(rows) // settings["max_rows"])]
    cached = cache_folder() / f"features-{_bank_key(rows, settings)}.safetensors"
    if _everywhere(cached.exists(), world):
        tensors = load_file(cached)
        features, logits = tensors["features"], tensors["logits"]
    else:
        mine = rows[rank::world]
        with tqdm(total=len(mine) * settings["views"], desc="trunk features", mininterval=20) as bar:
            features, logits = trunk_features(model, mine, settings["views"], seed=0, progress=bar.update)
        features, logits = _joined(features, 1, len(rows), world), _joined(logits, 0, len(rows), world)
        if ray.train.get_context().get_local_rank() == 0:
            partial = cached.with_suffix(".partial")
            cached.parent.mkdir(parents=True, exist_ok=True)
            save_file({"features": features, "logits": logits}, partial)
            partial.rename(cached)
    classes = class_rows()
    more, scores = class_features(model, features, logits, split_index(rows, "train"))
    step = max(1, len(classes) // settings["max_rows"]) if settings["max_rows"] else 1
    features, logits = torch.cat([features, more[:, ::step]], 1), torch.cat([logits, scores[::step]])
    rows = rows + classes[::step]
    return Bank(rows, features, logits, *_texts(rows, text_encoder, settings["language_model"]))


def _texts(rows: list[Row], text_encoder: TextEncoder, name: str) -> tuple[dict[str, int], Tensor]:
    """Embeddings of all phrases, from this machine's cache or computed (every worker for itself)."""
    phrases = phrases_of(rows)
    digest = hashlib.sha256("\n".join(phrases).encode())
    for file in language_model_files(language_model_folder(name)):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    cached = cache_folder() / f"texts-{digest.hexdigest()[:16]}.safetensors"
    if cached.exists():
        return phrases, load_file(cached)["texts"]
    texts = text_encoder(list(phrases)).half().cpu()
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_suffix(f".{os.getpid()}.partial")
    save_file({"texts": texts}, partial)
    partial.replace(cached)
    return phrases, texts


def _bank_key(rows: list[Row], settings: dict[str, Any]) -> str:
    digest = hashlib.sha256(f"2 {settings['image_size']} {settings['views']}".encode())
    for row in rows:
        digest.update(row.id.encode() + hashlib.sha256(row.image).digest())
    return digest.hexdigest()[:16]


def _everywhere(here: bool, world: int) -> bool:
    if world == 1:
        return here
    flag = torch.tensor(int(here))
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def _joined(mine: Tensor, axis: int, total: int, world: int) -> Tensor:
    """Interleave the workers' shares (row r, r + world, …) along `axis` again."""
    if world == 1:
        return mine
    shares: list[Tensor] = [torch.empty(0)] * world
    dist.all_gather_object(shares, mine)
    shape = list(mine.shape)
    shape[axis] = total
    out = torch.empty(shape, dtype=mine.dtype)
    for rank, share in enumerate(shares):
        out[(slice(None),) * axis + (slice(rank, None, world),)] = share
    return out


class _Gather(torch.autograd.Function):
    """All workers' tensors in rank order; backward sums the gradients that all workers have for mine."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        size = len(total) // dist.get_world_size()
        return total[dist.get_rank() * size : (dist.get_rank() + 1) * size]


gather_with_gradient: Gather = _Gather.apply


def average(gradient: Tensor) -> None:
    """Mean of a gradient over workers, in place; nothing to do for one worker."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
