"""The tokeniser's training: reconstruction, perceptual features, and a GAN with a patch discriminator.

Loss of encoder, codebook and decoder (VQGAN, Esser 2021):
  L1 + MSE (X′, X)  +  commitment MSE (Z, Z*)  +  L1 of a CNN's features  +  λ · hinge GAN
with λ = |∇ reconstruction| / |∇ GAN| at the decoder's last layer, from `gan_start` on. The
discriminator sees real and made pictures under the same random changes (DiffAugment, Zhao
2020). Knows no Ray and no files but its own folder.

Shape legend: B batch, N pictures, S side in pixels.
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

from llmvis.metrics import psnr
from llmvis.models.discriminator import PatchDiscriminator
from llmvis.models.efficientnet import EfficientNetLite0
from llmvis.models.tokenizer import ImageTokenizer
from llmvis.models.tokenizer_files import save_tokenizer
from llmvis.pictures import Pictures, on_white
from llmvis.training.common import ALONE, OptimConfig, Optimiser, World, autocast, likeness
from llmvis.training.views import changed_views, pair_sheet

JUDGED, SHOWN = 40, 24  # validation pictures of each collection, pictures on a sheet


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig:
    """Loss weights and steps of the tokeniser stage."""

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(steps=4000, learning_rate=6e-4))
    commitment: float = 0.1
    perceptual: float = 0.2
    gan: float = 0.2
    gan_start: float = 0.6
    """Share of the steps after which the discriminator's word counts."""
    freeze_encoder: bool = False
    """Train the decoder alone: code words, and a language model that knows them, stay good."""


class TokenizeStage:
    """Trains an `ImageTokenizer` on pictures of several collections.

    Args:
        collections: each with its weight: how often its pictures are drawn.
        trunk: the CNN whose features are matched; None leaves that loss out.
    """

    def __init__(
        self,
        model: ImageTokenizer,
        collections: Sequence[tuple[Pictures, float]],
        config: TokenizeConfig,
        *,
        trunk: EfficientNetLite0 | None,
        world: World = ALONE,
        device: str = "cpu",
    ) -> None:
        self.config, self.optim, self._world, self._device = config, config.optim, world, device
        model.encoder.requires_grad_(not config.freeze_encoder)
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.discriminator = PatchDiscriminator().to(device)
        self._trunk = trunk.eval().requires_grad_(False).to(device) if trunk is not None else None
        self._generator_steps = Optimiser(self.model, self.optim, world)
        self._judge_steps = Optimiser(self.discriminator, self.optim, world, betas=(0.5, 0.9))
        self._draw = Draw(collections)
        self._held = np.concatenate([p.pixels[p.judged(JUDGED)] for p, _ in collections])

    def fingerprint(self) -> dict[str, Any]:
        return {
            "stage": "tokenize",
            "model": asdict(self.model.config),
            "config": asdict(self.config),
            "data": self._draw.digest,
        }

    def step(self, number: int) -> dict[str, float]:
        """One step of the tokeniser and, once the GAN counts, one of the discriminator."""
        rng = np.random.default_rng([self.optim.seed, number])
        self.model.train()
        told: dict[str, float] = {}
        judged = number >= self.config.gan_start * self.optim.steps
        pairs = []
        for _ in range(self.optim.accumulate):
            real = self._batch(rng)
            with autocast(self._device, self.optim.bf16):
                made, _, commitment = self.model(real)
                rebuilt = F.l1_loss(made.float(), real) + F.mse_loss(made.float(), real)
                alike = likeness(self._trunk, made, real)
                loss = rebuilt + self.config.perceptual * alike + self.config.commitment * commitment
                if judged:
                    change = _change(rng, real.shape)
                    gan = -self.discriminator(change(made * 2 - 1)).float().mean()
            if judged:
                weight = self._gan_weight(rebuilt + self.config.perceptual * alike, gan)
                loss = loss + self.config.gan * weight * gan
                told |= {"gan": float(gan.detach()), "gan_weight": float(weight)}
                pairs.append((real, made.detach().float(), change))
            (loss / self.optim.accumulate).backward()
            told |= {
                "loss": float(loss.detach()),
                "l1_mse": float(rebuilt.detach()),
                "likeness": float(alike.detach()),
                "commitment": float(commitment.detach()),
            }
        for p in self.discriminator.parameters():
            p.grad = None
        told["norm"] = self._generator_steps.update(number)
        if pairs:
            told |= self._judge(pairs, number)
        return told

    def _batch(self, rng: np.random.Generator) -> Tensor:
        """This worker's slice of the next batch, `float (B, 3, S, S)` in 0 … 1, in chance views."""
        mine = self._world.slice_of(self.optim.batch_size)
        pixels, views = self._draw(rng, self.optim.batch_size)
        rgba = torch.from_numpy(pixels[mine]).to(self._device).permute(0, 3, 1, 2).float() / 255
        return changed_views(rgba, torch.from_numpy(views[mine]).to(self._device)).contiguous(
            memory_format=torch.channels_last
        )

    def _gan_weight(self, rebuilt: Tensor, gan: Tensor) -> Tensor:
        last = self.model.decoder.last_weight
        norms = [
            torch.autograd.grad(loss, last, retain_graph=True)[0].float().clone() for loss in (rebuilt, gan)
        ]
        self._world.mean(norms)
        weight: Tensor = norms[0].norm() / (norms[1].norm() + 1e-6)
        return weight.clamp(0, 1e3).detach()

    def _judge(self, pairs: list[tuple[Tensor, Tensor, Any]], number: int) -> dict[str, float]:
        """One step of the discriminator: hinge loss (Lim & Ye 2017)."""
        for real, made, change in pairs:
            with autocast(self._device, self.optim.bf16):
                on_real, on_made = (
                    self.discriminator(change(image * 2 - 1)).float() for image in (real, made)
                )
                loss = (F.relu(1 - on_real).mean() + F.relu(1 + on_made).mean()) / 2
            (loss / len(pairs)).backward()  # type: ignore[no-untyped-call]
        self._judge_steps.update(number)
        return {
            "judge": float(loss.detach()),
            "judge_real": float(on_real.detach().mean()),
            "judge_made": float(on_made.detach().mean()),
        }

    @torch.inference_mode()
    def evaluate(self) -> tuple[dict[str, float], Image.Image | None]:
        """PSNR and use of the codebooks on validation pictures; originals above their reconstructions."""
        self.model.eval()
        scores, used, shown = [], [], []
        with self._generator_steps.averaged():
            for at in range(0, len(self._held), 32):
                real = (
                    torch.from_numpy(on_white(self._held[at : at + 32]))
                    .to(self._device)
                    .permute(0, 3, 1, 2)
                    .float()
                    / 255
                )
                codes = self.model.encode(real)
                made = self.model.decode(codes)
                scores.append(psnr(made.cpu().numpy(), real.cpu().numpy()))
                used.append(codes.flatten(0, 2).cpu())
                shown += [(real[i], made[i]) for i in range(len(real))]
        step = max(1, len(shown) // SHOWN)
        return {"psnr": float(np.concatenate(scores).mean())} | code_use(
            torch.cat(used), self.model.config.codebook
        ), pair_sheet(shown[::step][:SHOWN])

    def tensors(self) -> dict[str, Tensor]:
        # spectral norm's own vectors are buffers of the discriminator
        judge = {f"judge_buffer.{name}": b for name, b in self.discriminator.named_buffers()}
        return self._generator_steps.tensors("model.") | self._judge_steps.tensors("judge.") | judge

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._generator_steps.load(tensors, "model.")
        self._judge_steps.load(tensors, "judge.")
        with torch.no_grad():
            for name, buffer in self.discriminator.named_buffers():
                buffer.copy_(tensors[f"judge_buffer.{name}"])

    def export(self, folder: Path) -> None:
        with self._generator_steps.averaged():
            save_tokenizer(self.model, folder)


class Draw:
    """Draws batches from several collections by weight: pixels and the numbers of a chance view."""

    def __init__(self, collections: Sequence[tuple[Pictures, float]]) -> None:
        self._pixels = [pictures.pixels for pictures, _ in collections]
        self._train = [pictures.where("train") for pictures, _ in collections]
        weights = np.array([weight for _, weight in collections], np.float64)
        self._share = weights / weights.sum()
        self.digest = [
            [len(rows), int(p[rows[:8]].astype(np.int64).sum())]
            for p, rows in zip(self._pixels, self._train, strict=True)
        ]

    def __call__(self, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
        which = rng.choice(len(self._share), size, p=self._share)
        rows = [
            self._train[c][int(u * len(self._train[c]))] for c, u in zip(which, rng.random(size), strict=True)
        ]
        return np.stack([self._pixels[c][i] for c, i in zip(which, rows, strict=True)]), rng.random(
            (size, 9), np.float32
        )


def _change(rng: np.random.Generator, shape: torch.Size) -> Any:
    """One shift and one change of brightness for a whole batch: what DiffAugment needs on small data."""
    dx, dy = (int(v) for v in rng.integers(-shape[-1] // 8, shape[-1] // 8 + 1, 2))
    light = float(rng.uniform(-0.2, 0.2))
    return lambda images: torch.roll(images, (dy, dx), (2, 3)) + light


def code_use(codes_NG: Tensor, size: int) -> dict[str, float]:
    """How much of the codebooks is in use: share of entries seen, and perplexity over their number."""
    shares, perplexities = [], []
    for group in range(codes_NG.shape[1]):
        counts = torch.bincount(codes_NG[:, group], minlength=size).double()
        p = counts / counts.sum()
        shares.append(float((counts > 0).double().mean()))
        perplexities.append(float(torch.exp(-(p * (p + 1e-12).log()).sum())))
    return {"codes_used": float(np.mean(shares)), "code_perplexity": float(np.mean(perplexities))}
