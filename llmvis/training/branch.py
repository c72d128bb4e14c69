"""The source branch's training: from source, instruction and what the language model expects to the target.

The language model is ready and frozen; its expected latents for every pair are computed once
and kept (fp16). It knows the pairs that it was trained on by heart: with its latents in every
row the branch would learn to believe them, and be wrong on new drawings. Most rows go without,
in chance views of both sides. The loss is the tokeniser's without the codebook: L1 + MSE, and
the L1 of a CNN's features. Knows no Ray and no files but its own folder.

Shape legend: B batch, N pairs, I instructions, D width of a word, Z latents, h w cells, S side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from llmvis.metrics import psnr
from llmvis.models.efficientnet import EfficientNetLite0
from llmvis.models.language import MASKED
from llmvis.models.source_branch import SourceBranch
from llmvis.models.synthesizer import Synthesizer
from llmvis.models.synthesizer_files import save_branch
from llmvis.pictures import on_white
from llmvis.synthesis_data import LanguageData, Loaded
from llmvis.training.common import ALONE, OptimConfig, Optimiser, World, autocast, likeness
from llmvis.training.language import JUDGED, SHOWN
from llmvis.training.views import changed_views, pair_sheet


@dataclass(frozen=True, kw_only=True)
class BranchConfig:
    """Loss weight and steps of the source branch's stage."""

    optim: OptimConfig = field(default_factory=lambda: OptimConfig(steps=2000, learning_rate=6e-4))
    perceptual: float = 0.1
    with_latents: float = 0.3
    """Share of rows that are given the language model's latents."""


class BranchStage:
    """Trains the `SourceBranch` of a synthesiser whose other parts are ready."""

    def __init__(
        self, model: Synthesizer, data: LanguageData, loaded: Loaded, config: BranchConfig, *,
        trunk: EfficientNetLite0 | None, world: World = ALONE,
    ) -> None:  # fmt: skip
        self.config, self.optim, self._world = config, config.optim, world
        self.model, self._loaded, self._device = model, loaded, model.device
        self._digest = data.digest
        torch.manual_seed(config.optim.seed)
        self.branch = SourceBranch(model.tokenizer.config, model.language.width).to(self._device)
        self.branch.start_from(model.tokenizer)
        model.branch = self.branch
        self._trunk = trunk.eval().requires_grad_(False).to(self._device) if trunk is not None else None
        self._steps = Optimiser(self.branch, self.optim, world)
        self._expected = [self._expect(place, data) for place in range(len(data.pairs))]
        self._words = [self._mean_words(place) for place in range(len(data.pairs))]
        self._train = [after.train for _, after in data.pairs]
        weights = np.array([part.weight for part in loaded.recipe.pairs])
        self._share = weights / weights.sum()

    def fingerprint(self) -> dict[str, Any]:
        return {"stage": "branch", "config": asdict(self.config), "data": self._digest}

    @torch.inference_mode()
    def _expect(self, place: int, data: LanguageData) -> np.ndarray:
        """Expected latents of the plain view of every pair: float16 (N, Z, h, w)."""
        before, after = data.pairs[place]
        words = data.recipe.pairs[place].instructions
        rng, model, grid = np.random.default_rng(0), self.model, self.model.tokenizer.config.grid
        model.language.eval()
        out = []
        for at in tqdm(range(0, len(after.rows), 32), desc="expected latents", mininterval=10):
            rows = range(at, min(at + 32, len(after.rows)))
            texts = [
                words[int(rng.integers(len(words)))].replace("{caption}", after.rows[i].caption) for i in rows
            ]
            ids, attend = (t.to(self._device) for t in model.words(texts))
            source = torch.from_numpy(before.codes[0, at : at + 32].astype(np.int64)).to(self._device)
            with autocast(self._device, self.optim.bf16):
                hidden = model.language(
                    ids, attend, torch.full_like(source, MASKED), source
                ).last_hidden_state
                p = model.language.code_logits(hidden).softmax(-1)
            latents = model.tokenizer.quantiser.expected(p.reshape(len(p), grid, grid, *p.shape[2:]))
            out.append(latents.half().cpu().numpy())
        return np.concatenate(out)

    def _mean_words(self, place: int) -> Tensor:
        """Mean word embedding of every pair under every instruction: float (N, I, D)."""
        rows, given = self._loaded.pairs[place][1].rows, self._loaded.recipe.pairs[place].instructions
        texts = [text.replace("{caption}", row.caption) for row in rows for text in given]
        means = self.model.mean_words(*self.model.words(texts))
        return means.reshape(len(rows), len(given), -1)

    def step(self, number: int) -> dict[str, float]:
        """One step on a batch of pairs."""
        rng = np.random.default_rng([self.optim.seed, number])
        self.branch.train()
        sums = torch.zeros(2, device=self._device)
        for _ in range(self.optim.accumulate):
            latents, source, target, words = self._batch(rng)
            with autocast(self._device, self.optim.bf16):
                made = self.branch(latents, source, words).float()
                rebuilt = F.l1_loss(made, target) + F.mse_loss(made, target)
                loss = rebuilt + self.config.perceptual * likeness(self._trunk, made, target)
            (loss / self.optim.accumulate).backward()  # type: ignore[no-untyped-call]
            sums += torch.stack([loss.detach(), rebuilt.detach()]) / self.optim.accumulate
        told = [sums]
        self._world.mean(told)
        return dict(zip(("loss", "l1_mse"), told[0].tolist(), strict=True)) | {
            "norm": self._steps.update(number)
        }

    def _batch(self, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This worker's slice of the next batch: latents, sources, targets and words, on its device."""
        size = self.optim.batch_size
        which, chance = rng.choice(len(self._share), size, p=self._share), rng.random((size, 3))
        views = rng.random((size, 9), np.float32)
        views[:, 5] = 1.0  # the ground stays white
        views[chance[:, 1] < self.config.with_latents, 0] = 0.0  # latents are of the plain view
        chosen = [
            (c, self._train[c][int(u * len(self._train[c]))])
            for c, u in zip(which, chance[:, 0], strict=True)
        ]
        mine = self._world.slice_of(size)
        chosen, chance = chosen[mine], chance[mine]
        latents = torch.from_numpy(np.stack([self._expected[c][i] for c, i in chosen])).float()
        latents[torch.from_numpy(chance[:, 1] >= self.config.with_latents)] = 0.0
        words = [
            self._words[c][i, int(u[2] * self._words[c].shape[1])]
            for (c, i), u in zip(chosen, chance, strict=True)
        ]
        seen = torch.from_numpy(views[mine]).to(self._device)
        sides = [np.stack([self._loaded.pairs[c][side].pixels[i] for c, i in chosen]) for side in (0, 1)]
        source, target = (
            changed_views(torch.from_numpy(rgba).to(self._device).permute(0, 3, 1, 2).float() / 255, seen)
            for rgba in sides
        )
        return latents.to(self._device), source, target, torch.stack(words).to(self._device)

    @torch.inference_mode()
    def evaluate(self) -> tuple[dict[str, float], Image.Image | None]:
        """PSNR on validation pairs, and sources, results and targets below each other."""
        self.branch.eval()
        told, shown = {}, []
        with self._steps.averaged():
            for place, part in enumerate(self._loaded.recipe.pairs):
                before, after = self._loaded.pairs[place]
                rows = after.judged(JUDGED)
                source, real = _pixels(before.pixels[rows]), _pixels(after.pixels[rows])
                latents = torch.from_numpy(self._expected[place][rows]).float().to(self._device)
                words = self._words[place][rows, -1].to(self._device)
                name = part.name.replace(" ", "_")
                for way, known in (("without_latents", 0 * latents), ("", latents)):
                    made = self.branch.decode(known, source.to(self._device), words).cpu()
                    told["_".join(filter(None, ("psnr", name, way)))] = float(
                        psnr(made.numpy(), real.numpy()).mean()
                    )
                shown += list(zip(source, made, real, strict=True))[:SHOWN]
        return told, pair_sheet(shown)

    def tensors(self) -> dict[str, Tensor]:
        return self._steps.tensors("")

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._steps.load(tensors, "")

    def export(self, folder: Path) -> None:
        with self._steps.averaged():
            save_branch(self.branch, folder)


def _pixels(rgba: np.ndarray) -> Tensor:
    """`uint8 (B, S, S, 4)` → on white, `float (B, 3, S, S)` in 0 … 1."""
    return torch.from_numpy(on_white(rgba)).permute(0, 3, 1, 2).float() / 255
