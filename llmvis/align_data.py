"""Training pairs of the alignment stage: which pictures, which words, what is purged, features.

Rows come from the embedded collection, from openclipart and, where it is at hand, from
OpenMoji's drawings of the same names; and one without a picture for each class that the
trunk knows, so that the learned part keeps what the trunk learned of photographs. Training
drops every row that is near a held-out one, in looks (cosine of centred trunk features >
0.70) or in words (cosine of captions > 0.80). The trunk is frozen, so each augmented view
goes through it once and what is trained sees features. Knows no Ray.

Shape legend: V views, N rows, F features, T text dimensions.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmvis.augment import view_of
from llmvis.data import load_emoji
from llmvis.data.drawings import load_drawings
from llmvis.data.openclipart import load_openclipart
from llmvis.models.convert import class_words
from llmvis.models.efficientnet import FEATURES
from llmvis.models.two_tower import IMAGE_BATCH, IMAGE_FEATURES, TwoTower

NEAR_PICTURE, NEAR_CAPTION = 0.70, 0.80
HELD_OUT = ("validation", "test", "authors")
CLASS = "class"  # source of the rows that stand for what the trunk knows
CLASS_STRENGTH, CLASS_REPEATS = 1.5, 2


@dataclass(frozen=True)
class Row:
    """One picture with its words. `texts` are what a query for it may be, in order of trust."""

    id: str
    image: bytes
    caption: str
    keywords: tuple[str, ...]
    source: str  # emoji, openclipart, openmoji or class
    split: str  # train, validation, test, authors or unused


@dataclass
class Bank:
    """Everything the training loop reads. `features` and `texts` are float16."""

    rows: list[Row]
    features: torch.Tensor  # (V, N, F)
    logits: torch.Tensor  # (N, 1000), of view 0
    phrases: dict[str, int]  # text → row of `texts`
    texts: torch.Tensor  # (number of phrases, T)

    def where(self, split: str, source: str | None = None) -> np.ndarray:
        """Indices of the rows of a split (and of one source)."""
        return split_index(self.rows, split, source)

    def captions(self, index: np.ndarray) -> torch.Tensor:
        """float32 (len(index), T)."""
        return self.texts[[self.phrases[self.rows[i].caption] for i in index]].float()


def split_index(rows: Sequence[Row], split: str, source: str | None = None) -> np.ndarray:
    """Indices of the rows of a split (and of one source)."""
    return np.array([i for i, r in enumerate(rows) if r.split == split and source in (None, r.source)], int)


def load_rows(openclipart: Path | None, openmoji: Path | None) -> list[Row]:
    """All rows in a fixed order: emoji, openclipart, OpenMoji. A missing source is left out."""
    tables = [("emoji", load_emoji(columns=["id", "image", "caption", "keywords", "split"]))]
    if openclipart is not None:
        tables.append(("openclipart", load_openclipart(openclipart)))
    if openmoji is not None:
        tables.append(("openmoji", load_drawings(openmoji)))
    rows = []
    for source, table in tables:
        for row in table.select(["id", "image", "caption", "keywords", "split"]).to_pylist():
            keywords = tuple(word for word in row["keywords"] if word)
            data = row["image"]["bytes"]
            rows.append(Row(f"{source}/{row['id']}", data, row["caption"], keywords, source, row["split"]))
    return rows


def texts_of(row: Row) -> list[str]:
    """Caption; caption with keywords; keywords together; each keyword: what training samples from."""
    if not row.keywords:
        return [row.caption]
    joined = [", ".join([row.caption, *row.keywords[:6]]), ", ".join(row.keywords[:8])]
    return [row.caption, *joined, *row.keywords]


def sample_text(row: Row, rng: np.random.Generator) -> str:
    """Half the time the caption, else caption with keywords (.2), one keyword (.2), keywords (.1)."""
    texts = texts_of(row)
    u = rng.random()
    if len(texts) == 1 or u < 0.5:
        return texts[0]
    if u < 0.7:
        return texts[1]
    return texts[2] if u >= 0.9 else texts[3 + int(rng.integers(len(texts) - 3))]


@torch.inference_mode()
def trunk_features(
    model: TwoTower,
    rows: Sequence[Row],
    views: int,
    seed: int,
    progress: Callable[[int], Any] = lambda done: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of every view, float16 (V, N, F), and the logits of view 0, float16 (N, 1000)."""
    model.eval().trunk.channels_last()
    features = torch.empty(views, len(rows), IMAGE_FEATURES, dtype=torch.float16)
    logits = torch.empty(len(rows), model.class_texts.shape[0], dtype=torch.float16)
    preprocess = model.config.preprocess
    for view in range(views):
        for start in range(0, len(rows), IMAGE_BATCH):
            part = rows[start : start + IMAGE_BATCH]
            # a picture's augmentation depends on its id, not on its place in the table
            pictures = np.stack([view_of(r.image, preprocess, view, _seed(r.id, seed)) for r in part])
            x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
            found, scores = model.image_features(x)
            features[view, start : start + len(part)] = found.half()
            if view == 0:
                logits[start : start + len(part)] = scores.half()
            progress(len(part))
    return features, logits


def class_rows() -> list[Row]:
    """One row without a picture for each class of the trunk: name, other names, a description."""
    rows = []
    for i, (name, others, description) in enumerate(class_words()):
        words = [*others, *([description] if description else [])]
        rows.append(Row(f"class/{i}", b"", name, tuple(words), CLASS, "train"))
    return rows


def class_features(
    model: TwoTower, features_VNF: torch.Tensor, logits_NK: torch.Tensor, index: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features a photograph of each class might have, `(V, 1000, F)`, and their logits.

    The classifier's weights of a class point where its photographs lie (neural collapse,
    Papyan 2020): the mean picture plus 1.5 typical deviations in that direction, not below
    zero. Middle features are the mean picture's. Views after the first have noise.
    """
    classifier = model.trunk.classifier
    plain = features_VNF[0, index].float()
    mean, pooled = plain.mean(0), plain[:, :FEATURES]
    deviation = (pooled - mean[:FEATURES]).norm(dim=1).mean()
    towards = torch.nn.functional.normalize(classifier.weight - classifier.weight.mean(0), dim=1)
    centre = mean[:FEATURES] + CLASS_STRENGTH * deviation * towards.detach()
    generator = torch.Generator().manual_seed(0)
    out = mean.repeat(len(features_VNF), len(centre), 1)
    for view in range(len(features_VNF)):
        noise = 0.1 * pooled.std(0) * torch.randn(centre.shape, generator=generator) if view else 0.0
        out[view, :, :FEATURES] = (centre + noise).clamp(min=0)
    with torch.inference_mode():
        logits = classifier(out[0, :, :FEATURES])
    return out.half(), logits.to(logits_NK.dtype)


def phrases_of(rows: Sequence[Row]) -> dict[str, int]:
    """Every text that training or evaluation may use → its place in the table of embeddings."""
    return {text: i for i, text in enumerate(sorted({text for row in rows for text in texts_of(row)}))}


def training_rows(
    bank: Bank, near_picture: float = NEAR_PICTURE, near_caption: float = NEAR_CAPTION
) -> np.ndarray:
    """Indices of the training rows that are near no held-out row, by looks or by caption.

    Class rows come CLASS_REPEATS times, whatever their names: they are no pictures.
    """
    classes = bank.where("train", CLASS)
    train = np.setdiff1d(bank.where("train"), classes)
    held = np.concatenate([bank.where(split) for split in HELD_OUT])
    pooled = bank.features[0].float()
    centred = torch.nn.functional.normalize(pooled - pooled[train].mean(0), dim=1)
    looks = _nearest(centred[train], centred[held])
    words = _nearest(bank.captions(train), bank.captions(held))
    kept = train[((looks <= near_picture) & (words <= near_caption)).numpy()]
    return np.concatenate([kept, *[classes] * CLASS_REPEATS])


def _nearest(some: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return (some @ others.T).amax(1)


def _seed(row_id: str, seed: int) -> int:
    return zlib.crc32(f"{seed}/{row_id}".encode())
