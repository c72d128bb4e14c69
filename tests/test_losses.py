"""The contrastive loss against hand computation, and over pretended workers."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F

from llmvis.losses import info_nce


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_two_orthogonal_pairs_by_hand() -> None:
    pairs = torch.eye(2)
    expected = math.log(1 + math.exp(-3.0))  # -log(e³ / (e³ + e⁰))
    assert torch.isclose(info_nce(pairs, pairs, torch.tensor(3.0)), torch.tensor(expected))


def test_same_words_are_no_negatives() -> None:
    images, texts = torch.eye(2), torch.eye(2)
    same = torch.ones(2, 2, dtype=torch.bool)
    assert info_nce(images, texts, torch.tensor(3.0), same_BG=same).item() == 0.0


def test_workers_losses_average_to_the_loss_of_the_whole_batch() -> None:
    images, texts, scale = unit(6, 4), unit(6, 4, seed=1), torch.tensor(10.0)
    whole = info_nce(images, texts, scale)
    parts = []
    for rank in range(2):
        mine = slice(rank * 3, rank * 3 + 3)
        everyone = iter([images, texts])  # a pretended gather: the first call wants images, the second texts
        gather = partial(lambda source, _: next(source), everyone)
        parts.append(info_nce(images[mine], texts[mine], scale, gather=gather, rank=rank))
    assert torch.isclose(torch.stack(parts).mean(), whole)
