"""The two-tower encoder: a frozen CNN and a frozen language model, joined by small projections.

An embedding has two parts, each of unit norm, times the root of its share of the cosine:

  class-name part  pictures: Σ p(class | picture) · text(class name)  (ConSE, Norouzi 2013)
                   texts:    text(query)
  learned part     pictures: a projection of the trunk's features
                   texts:    a projection of text(query), trained with InfoNCE

The first carries what the trunk knows of photographs by name, with no training; the second
what was learned from drawings and their words. Knows no Ray, and no files but its own folder.

Shape legend: B batch, H W pixels, F features, T text dimensions, L learned, D = T + L.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from llmvis.models.efficientnet import CLASSES, FEATURES, MIDDLE_CHANNELS, EfficientNetLite0
from llmvis.models.files import fit_tensors, open_pretrained, read_tensors
from llmvis.models.glossary import Glossary
from llmvis.models.language_model import language_model_folder
from llmvis.models.protocols import EncoderInfo
from llmvis.models.two_tower_info import (
    WEIGHTS,
    TwoTowerConfig,
    default_folder,
    describe_two_tower,
    read_config,
)
from llmvis.schema import UserError

IMAGE_FEATURES = FEATURES + MIDDLE_CHANNELS
TEXT_BATCH = 64
IMAGE_BATCH, IMAGE_BATCH_GPU = 16, 64
"""Pictures that run through the trunk at once. On a CPU 16 are fastest where freed memory is kept
(`session.KEEP_FREED_MEMORY`); elsewhere a fifth slower than 4, as each batch lies on fresh pages."""


class LearnedPart(nn.Module):
    """The trained projections of both sides, into one space of `learned_dim`.

    The image side is a linear map of standardised root features, plus an MLP if `hidden`; the
    text side starts as the identity, so training starts from the language model's own space.
    """

    def __init__(self, config: TwoTowerConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.feature_mean = nn.Buffer(torch.zeros(IMAGE_FEATURES))
        self.feature_scale = nn.Buffer(torch.ones(IMAGE_FEATURES))
        self.image = nn.Linear(IMAGE_FEATURES, config.learned_dim)
        self.image_mlp: nn.Sequential | None = None
        if config.hidden:
            last = nn.Linear(config.hidden, config.learned_dim)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            first = nn.Linear(IMAGE_FEATURES, config.hidden)
            self.image_mlp = nn.Sequential(first, nn.GELU(), nn.Dropout(dropout), last)
        self.text = nn.Linear(config.text_dim, config.learned_dim)
        nn.init.eye_(self.text.weight)
        nn.init.zeros_(self.text.bias)
        self.dropout = nn.Dropout(dropout)

    def project_images(self, features_BF: Tensor) -> Tensor:
        """Trunk features (not negative), pooled then middle → `(B, L)`, unit norm.

        The square root evens out a few strong channels: +2 points of R@10 (benchmarks/LOG.md).
        """
        x = (features_BF.sqrt() - self.feature_mean) * self.feature_scale
        out = self.image(self.dropout(x))
        if self.image_mlp is not None:
            out = out + self.image_mlp(self.dropout(x))
        return F.normalize(out, dim=1)

    def project_texts(self, texts_BT: Tensor) -> Tensor:
        """Language-model embeddings → `(B, L)`, unit norm."""
        return F.normalize(self.text(texts_BT), dim=1)


class TwoTower(nn.Module):
    """Trunk, class-name texts and learned part. The language model stays outside: it ships elsewhere."""

    def __init__(self, config: TwoTowerConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = EfficientNetLite0()
        self.class_texts = nn.Buffer(torch.zeros(CLASSES, config.text_dim))
        self.learned = LearnedPart(config)

    def image_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`float (B, 3, H, W)` in 0..255 → features `(B, F)` for the learned part and logits `(B, 1000)`."""
        out = self.trunk(images)
        return torch.cat([out.pooled, out.middle.mean((2, 3))], 1), out.logits

    def class_name_part(self, logits: Tensor) -> Tensor:
        """ConSE: class probabilities times class-name embeddings, `(B, T)`, unit norm."""
        return F.normalize((logits / self.config.temperature).softmax(1) @ self.class_texts, dim=1)

    def embed_images(self, images: Tensor) -> Tensor:
        """`float (B, 3, H, W)` in 0..255 → `(B, D)`, unit norm."""
        features, logits = self.image_features(images)
        return self._joined(self.class_name_part(logits), self.learned.project_images(features))

    def embed_texts(self, texts_BT: Tensor) -> Tensor:
        """Unit-norm language-model embeddings `(B, T)` → `(B, D)`, unit norm."""
        return self._joined(texts_BT, self.learned.project_texts(texts_BT))

    def _joined(self, semantic: Tensor, learned: Tensor) -> Tensor:
        share = self.config.semantic_share
        return torch.cat([semantic * share**0.5, learned * (1 - share) ** 0.5], 1)


class TextEncoder:
    """A Hugging Face language model as a sentence encoder: mean of the last hidden states, unit norm.

    The weights are read at the first text: whoever encodes pictures does without them.
    """

    def __init__(self, folder: Path, max_tokens: int = 128, device: str = "cpu") -> None:
        self._folder, self._max_tokens, self._device = folder, max_tokens, device
        self.dim = int(open_pretrained(AutoConfig, folder).hidden_size)
        """T, the width of the language model."""

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        model = open_pretrained(AutoModel, self._folder, use_safetensors=True)
        tokenizer = open_pretrained(AutoTokenizer, self._folder)
        return tokenizer, model.eval().to(self._device)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """B texts → `float32 (B, T)`. Texts of like length run together, so padding is small."""
        tokenizer, model = self._loaded
        out = torch.zeros(len(texts), self.dim, device=self._device)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), TEXT_BATCH):
            rows = order[start : start + TEXT_BATCH]
            tokens = tokenizer(
                [texts[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=self._max_tokens,
                return_tensors="pt",
            ).to(self._device)
            hidden = model(**tokens).last_hidden_state
            mask = tokens["attention_mask"][..., None].to(hidden.dtype)
            out[rows] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
        return out


class TwoTowerEncoder:
    """The `Encoder` of the rest of the product: arrays and strings in, unit-norm arrays out."""

    def __init__(
        self,
        info: EncoderInfo,
        model: TwoTower,
        text_encoder: TextEncoder,
        device: str = "cpu",
        rewrite: Callable[[str], str] | None = None,
    ) -> None:
        self.info = info
        self.model = model.eval().to(device)
        self.model.trunk.channels_last()
        self.text_encoder = text_encoder
        self._device, self._rewrite = device, rewrite

    @torch.inference_mode()
    def encode_images(self, images: np.ndarray) -> np.ndarray:
        """`uint8 (B, H, W, 3)` → `float32 (B, D)`; a few pictures at a time, so B may be large."""
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"expected uint8 (B, H, W, 3), got {images.dtype} {images.shape}")
        out = np.empty((len(images), self.info.dim), np.float32)
        batch = IMAGE_BATCH if self._device == "cpu" else IMAGE_BATCH_GPU
        for start in range(0, len(images), batch):
            out[start : start + batch] = self.model.embed_images(
                self.to_tensor(images[start : start + batch])
            ).cpu()
        return out

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """B texts, longer ones cut after `max_tokens` → `float32 (B, D)`."""
        if self._rewrite is not None:
            texts = [self._rewrite(text) for text in texts]
        if not texts:
            return np.empty((0, self.info.dim), np.float32)
        result: np.ndarray = self.model.embed_texts(self.text_encoder(texts)).cpu().numpy()
        return result

    def to_tensor(self, images: np.ndarray) -> Tensor:
        """`uint8 (B, H, W, 3)` → `float32 (B, 3, H, W)` in channels-last memory: no copy before the cast."""
        with warnings.catch_warnings():
            # Ray hands out read-only arrays; we only read
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensor = torch.from_numpy(images)
        return tensor.to(self._device).permute(0, 3, 1, 2).float()


def load_two_tower(folder: Path | str | None = None, device: str = "cpu") -> TwoTowerEncoder:
    """Load an encoder from its folder (default: the shipped weights).

    Raises `ValueError` if the folder is no two-tower encoder or its tensors do not fit.
    """
    disable_progress_bar()  # type: ignore[no-untyped-call]  # of reading local files, a second's work
    path = default_folder() if folder is None else Path(folder)
    config = read_config(path)
    model = TwoTower(config)
    fit_tensors(model, read_tensors(path / WEIGHTS), path / WEIGHTS)
    text_encoder = TextEncoder(language_model_folder(config.language_model), config.max_tokens, device)
    if text_encoder.dim != config.text_dim:
        raise UserError(
            f"{config.language_model} is {text_encoder.dim} wide, the weights want {config.text_dim}"
        )
    rewrite = (lambda text: Glossary.packaged().to_english(text)) if config.glossary else None
    return TwoTowerEncoder(describe_two_tower(folder), model, text_encoder, device, rewrite)


def save_two_tower(model: TwoTower, folder: Path) -> None:
    """Write `model.safetensors` (float16) and `config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)  # safetensors makes it private to the user
    model.config.save(folder)


def ensemble_two_towers(folders: Sequence[Path], out: Path) -> None:
    """Write several trainings of one config as one model whose learned part is the mean of theirs.

    Means of linear maps are linear; MLPs are laid side by side. It works because the text side
    is fixed, so all of them map pictures into the same space.
    """
    configs = {read_config(folder) for folder in folders}
    if len(configs) != 1:
        raise ValueError("only trainings with equal config.json can be joined")
    parts = [read_tensors(folder / WEIGHTS) for folder in folders]
    tensors = {name: torch.stack([part[name].float() for part in parts]) for name in parts[0]}
    config = configs.pop()
    model = TwoTower(replace(config, hidden=config.hidden * len(parts)))
    joined = {name: tensor.mean(0) for name, tensor in tensors.items()}
    if config.hidden:
        for name in ("learned.image_mlp.0.weight", "learned.image_mlp.0.bias"):
            joined[name] = torch.cat(list(tensors[name]))
        last = "learned.image_mlp.3.weight"
        joined[last] = torch.cat(list(tensors[last]), 1) / len(parts)
    model.load_state_dict(joined)
    save_two_tower(model, out)
