"""The language model's training: cross-entropy on what is masked, all tasks mixed in each batch.

Text → image, image → image, inpainting and captions differ in what is masked alone
(`synthesis_data`). Words are dropped now and then, so that guidance has something to pull
away from. Knows no Ray and no files but its own folder.

Shape legend: B batch, K cells, G groups, C codebook entries, W words.
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

from llmvis.metrics import psnr
from llmvis.models.language import MASKED
from llmvis.models.sampling import Sampling
from llmvis.models.synthesizer import Synthesizer
from llmvis.models.synthesizer_files import save_language
from llmvis.pictures import on_white
from llmvis.synthesis_data import Batch, LanguageData, Loaded, instructed
from llmvis.training.common import ALONE, OptimConfig, Optimiser, World, autocast
from llmvis.training.views import pair_sheet

JUDGED, SHOWN = 48, 12


@dataclass(frozen=True, kw_only=True)
class LanguageTrainConfig:
    """Steps and masks of the language stage."""

    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(steps=4000, learning_rate=4e-4, weight_decay=0.05, ema=0.998)
    )
    views: int = 3
    """Views of each picture that are tokenised beforehand."""
    drop_words: float = 0.1
    """Share of rows without words."""
    word_weight: float = 0.3
    """Of a caption's loss: its words are fewer and told apart by more."""
    freeze_layers: int = 0
    """Layers of the transformer, from the bottom, that stay as they are."""


class LanguageStage:
    """Trains the language model of a `Synthesizer` whose tokeniser is ready.

    Args:
        data: coded pictures to draw batches from.
        loaded: the same as pixels, for judging on validation rows.
    """

    def __init__(
        self, model: Synthesizer, data: LanguageData, loaded: Loaded, config: LanguageTrainConfig, *,
        world: World = ALONE,
    ) -> None:  # fmt: skip
        self.config, self.optim, self._world = config, config.optim, world
        self.model, self._data, self._loaded, self._device = model, data, loaded, model.device
        _freeze(model.language.transformer, config.freeze_layers)
        self._steps = Optimiser(model.language, self.optim, world)

    def fingerprint(self) -> dict[str, Any]:
        return {
            "stage": "language",
            "model": asdict(self.model.language.config),
            "config": asdict(self.config),
            "data": self._data.digest,
        }

    def step(self, number: int) -> dict[str, float]:
        """One step on a batch of all tasks."""
        rng = np.random.default_rng([self.optim.seed, number])
        torch.manual_seed(self.optim.seed * 1_000_003 + number * 1009 + self._world.rank)  # dropout
        self.model.language.train()
        sums = torch.zeros(3, device=self._device)
        for _ in range(self.optim.accumulate):
            batch = self._data.batch(rng, self.optim.batch_size, self.config.drop_words)
            parts = self._losses(batch, rng)
            (parts[0] / self.optim.accumulate).backward()  # type: ignore[no-untyped-call]
            sums += torch.stack([p.detach() for p in parts]) / self.optim.accumulate
        told = [sums]
        self._world.mean(told)
        loss, code, words = told[0].tolist()
        return {"loss": loss, "code_loss": code, "word_loss": words, "norm": self._steps.update(number)}

    def _losses(self, batch: Batch, rng: np.random.Generator) -> list[Tensor]:
        """Loss of this worker's rows, and its parts: each row's mean over what is masked, then over rows."""
        mine = self._world.slice_of(len(batch.texts))
        words, attend = self.model.words(batch.texts)
        hidden_words = torch.from_numpy(_hidden_words(batch, words.shape[1], rng))
        words, attend, hidden_words = (t[mine].to(self._device) for t in (words, attend, hidden_words))
        attend = attend | torch.from_numpy(batch.ask_words[mine]).to(self._device)[:, None]
        target, source, hide = (
            torch.from_numpy(x[mine]).to(self._device) for x in (batch.target, batch.source, batch.hide)
        )
        given = words.masked_fill(hidden_words, self.model.language.mask_word)
        with autocast(self._device, self.optim.bf16):
            hidden = self.model.language(
                given, attend, target.masked_fill(hide, MASKED), source
            ).last_hidden_state
            logits = self.model.language.code_logits(hidden)
            said = self.model.language.word_logits(hidden[:, : words.shape[1]][hidden_words])
        entropy = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none").view_as(target)
        code_rows = (entropy * hide).sum((1, 2)) / hide.sum((1, 2)).clamp(min=1)
        word_entropy = torch.zeros(words.shape, device=self._device)
        word_entropy[hidden_words] = F.cross_entropy(said, words[hidden_words], reduction="none")
        word_rows = word_entropy.sum(1) / hidden_words.sum(1).clamp(min=1)
        code, word = code_rows.mean(), word_rows.mean()
        return [code + self.config.word_weight * word, code, word]

    @torch.inference_mode()
    def evaluate(self) -> tuple[dict[str, float], Image.Image | None]:
        """Translation PSNR of validation pairs, and a sheet: translations, then pictures from words."""
        self.model.language.eval()
        told, shown = {}, []
        with self._steps.averaged():
            for part, (before, after) in zip(self._loaded.recipe.pairs, self._loaded.pairs, strict=True):
                rows = after.judged(JUDGED)
                texts = [instructed(part.instructions[-1], after.rows[i].caption) for i in rows]
                source, real = on_white(before.pixels[rows]), on_white(after.pixels[rows])
                made = self.model.translate(source, texts)
                told[f"psnr_{part.name.replace(' ', '_')}"] = float(psnr(made / 255, real / 255).mean())
                shown += list(zip(source, made, real, strict=True))[:SHOWN]
            if self._loaded.collections:
                first, style = self._loaded.collections[0], self._loaded.recipe.collections[0].style
                rows = first.judged(SHOWN)
                texts = [f"{first.rows[i].caption}, {style}".strip(", ") for i in rows]
                made = self.model.generate(texts, how=Sampling(steps=8))
                shown += list(zip(on_white(first.pixels[rows]), made, made, strict=True))
        pairs = [
            tuple(torch.from_numpy(np.ascontiguousarray(x)).permute(2, 0, 1) / 255 for x in row)
            for row in shown
        ]
        return told, pair_sheet(pairs)

    def tensors(self) -> dict[str, Tensor]:
        return self._steps.tensors("")

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self._steps.load(tensors, "")

    def export(self, folder: Path) -> None:
        with self._steps.averaged():
            save_language(self.model.language, folder, self.model.tokenizer)


def _hidden_words(batch: Batch, length: int, rng: np.random.Generator) -> np.ndarray:
    """Which words of the caption rows are asked for: a chance part, the first ([CLS]) never. bool (B, W)."""
    share = np.cos(np.pi / 2 * rng.random((len(batch.texts), 1)))
    hidden: np.ndarray = (rng.random((len(batch.texts), length)) < np.maximum(share, 0.1)) & batch.ask_words[
        :, None
    ]
    hidden[:, 0] = False
    return hidden


def _freeze(transformer: Any, layers: int) -> None:
    """Freezes the embeddings and the first `layers` layers, if any are asked for."""
    if not layers:
        return
    encoder = getattr(transformer, "encoder", transformer)
    found = getattr(encoder, "layer", None) or getattr(encoder, "layers", None)
    for part in [transformer.get_input_embeddings(), *list(found or [])[:layers]]:
        part.requires_grad_(False)
