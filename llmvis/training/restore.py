"""The restorer's training: real pictures are spoilt, and the network learns to undo it. Loss: L1.

A chance crop of a training picture on white, turned and mirrored, is spoilt anew in every step in one of
three ways of equal share: Gaussian noise, Gaussian blur, or half the size and back. How strongly is drawn
too and not told to the network. What is to be learnt is in the pictures: they must be as sharp as they
are large, so leave out collections whose pictures were enlarged to get here. Knows no Ray and no
files but its own folder.

Shape legend: B batch, S side of a picture, C of a crop, in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from llmvis.degrade import blurred, doubled, halved, noisy
from llmvis.enhance import TASKS
from llmvis.metrics import psnr
from llmvis.models.restorer import Restorer, save_restorer
from llmvis.pictures import Pictures, on_white
from llmvis.training.common import ALONE, OptimConfig, Optimiser, World, autocast
from llmvis.training.tokenize import Draw
from llmvis.training.views import pair_sheet

NOISE, BLUR = (5.0, 50.0), (0.6, 2.0)
"""Strengths: standard deviations, in levels of 0 … 255 and in px."""
JUDGED, SHOWN = 24, 8  # validation pictures of each collection, pictures of each task on a sheet


@dataclass(frozen=True, kw_only=True)
class RestoreConfig:
    """Sizes and steps of the restorer's stage; `side` of the pictures and `crop` of what is seen of one, px, even."""

    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(steps=3000, batch_size=24, learning_rate=1e-3, weight_decay=1e-4)
    )
    side: int = 128
    crop: int = 64


class RestoreStage:
    """Trains a `Restorer` on pictures of several collections, each with its weight."""

    def __init__(
        self, model: Restorer, collections: Sequence[tuple[Pictures, float]], config: RestoreConfig, *,
        world: World = ALONE, device: str = "cpu",
    ) -> None:  # fmt: skip
        self.config, self.optim, self._world, self._device = config, config.optim, world, device
        self.model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._steps = Optimiser(self.model, self.optim, world)
        self._draw = Draw(collections)
        held = np.concatenate([on_white(p.pixels[p.judged(JUDGED)]) for p, _ in collections])
        self._held = _floats(held, device)

    def fingerprint(self) -> dict[str, Any]:
        return {
            "stage": "restore",
            "model": asdict(self.model.config),
            "config": asdict(self.config),
            "data": self._draw.digest,
        }

    def step(self, number: int) -> dict[str, float]:
        """One step on a batch of crops, all tasks mixed."""
        rng = np.random.default_rng([self.optim.seed, number])
        self.model.train()
        total = torch.zeros(1, device=self._device)
        for _ in range(self.optim.accumulate):
            real, spoilt, tasks = self._batch(rng)
            with autocast(self._device, self.optim.bf16):
                made = self.model(spoilt, tasks)
            loss = F.l1_loss(made.float(), real)
            (loss / self.optim.accumulate).backward()  # type: ignore[no-untyped-call]
            total += loss.detach() / self.optim.accumulate
        told = [total]
        self._world.mean(told)
        return {"loss": float(told[0]), "norm": self._steps.update(number)}

    def _batch(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """This worker's slice of the next batch: real and spoilt crops float (B, 3, C, C) in 0 … 1, and their tasks."""
        size, crop = self.optim.batch_size, self.config.crop
        pixels, chance = self._draw(rng, size)
        normal = rng.standard_normal((size, 3, crop, crop), np.float32)
        mine = self._world.slice_of(size)
        crops = np.stack([_crop(p, u, crop) for p, u in zip(pixels[mine], chance[mine], strict=True)])
        real = _floats(on_white(crops), self._device)
        tasks = torch.from_numpy((chance[mine, 0] * len(TASKS)).astype(np.int64)).to(self._device)
        strengths = torch.from_numpy(chance[mine, 1:3]).to(self._device)
        return real, _spoilt(real, tasks, strengths, torch.from_numpy(normal[mine]).to(self._device)), tasks

    @torch.inference_mode()
    def evaluate(self) -> tuple[dict[str, float], Image.Image | None]:
        """PSNR on validation pictures, spoilt by the same chance each time, and spoilt ones, results and real ones."""
        self.model.eval()
        told, shown = dict[str, float](), list[tuple[Tensor, ...]]()
        chance = torch.Generator().manual_seed(0)
        normal = torch.randn(self._held.shape, generator=chance).to(self._device)
        strengths = torch.rand((len(self._held), 2), generator=chance).to(self._device)
        with self._steps.averaged():
            for place, task in enumerate(TASKS):
                tasks = torch.full((len(self._held),), place, device=self._device)
                spoilt = _spoilt(self._held, tasks, strengths, normal)
                parts = [slice(at, at + 8) for at in range(0, len(spoilt), 8)]
                made = torch.cat([self.model(spoilt[part], tasks[part]) for part in parts]).clamp(0, 1)
                for name, x in ((task, made), (f"{task}_spoilt", spoilt)):
                    told[f"psnr_{name}"] = float(psnr(x.cpu().numpy(), self._held.cpu().numpy()).mean())
                step = max(1, len(made) // SHOWN)
                shown += list(zip(spoilt, made, self._held, strict=True))[::step][:SHOWN]
        return told, pair_sheet(shown, SHOWN)

    def tensors(self) -> dict[str, Tensor]:
        return self._steps.tensors("")

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._steps.load(tensors, "")

    def export(self, folder: Path) -> None:
        with self._steps.averaged():
            save_restorer(self.model, folder)


def _crop(picture: np.ndarray, chance: np.ndarray, side: int) -> np.ndarray:
    """A chance square of `uint8 (S, S, 4)`, turned by quarters and mirrored."""
    room = picture.shape[0] - side + 1
    top, left = int(chance[3] * room), int(chance[4] * room)
    turned = np.rot90(picture[top : top + side, left : left + side], int(chance[5] * 4))
    return turned[:, ::-1] if chance[6] < 0.5 else turned


def _spoilt(real: Tensor, tasks: Tensor, strengths: Tensor, normal: Tensor) -> Tensor:
    """Each picture spoilt as its task says; strengths, float (B, 2) in 0 … 1: how much, and which way of halving."""
    out = torch.empty_like(real)
    for place, task in enumerate(TASKS):
        rows = (tasks == place).nonzero()[:, 0]
        if not len(rows):
            continue
        some, share = real[rows], strengths[rows, 0]
        if task == "denoise":
            out[rows] = noisy(some, normal[rows], NOISE[0] + share * (NOISE[1] - NOISE[0]))
        elif task == "deblur":
            out[rows] = blurred(some, BLUR[0] + share * (BLUR[1] - BLUR[0]))
        else:
            by_area = (strengths[rows, 1] < 0.5)[:, None, None, None]
            out[rows] = doubled(torch.where(by_area, halved(some, "area"), halved(some)))
    return out


def _floats(pictures: np.ndarray, device: str) -> Tensor:
    """`uint8 (B, S, S, 3)` → float (B, 3, S, S) in 0 … 1."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float() / 255
