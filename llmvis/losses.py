"""Losses of the alignment stage: pure functions on tensors. No models, no Ray, no files.

Shape legend: B pairs in this worker's batch, G pairs over all workers, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Gather = Callable[[Tensor], Tensor]
"""`(B, ...)` of this worker → `(G, ...)` of all workers in rank order, with gradients through it."""


def alone(local: Tensor) -> Tensor:
    """The gather of a single worker: itself."""
    return local


def info_nce(
    images_BD: Tensor,
    texts_BD: Tensor,
    scale: Tensor,
    *,
    same_BG: Tensor | None = None,
    gather: Gather = alone,
    rank: int = 0,
) -> Tensor:
    """Symmetric InfoNCE (van den Oord 2018; CLIP, Radford 2021) over the pairs of all workers.

    Each worker scores its own B pairs against all G; the mean over workers of what is
    returned is the loss over the global batch, and because `gather` passes gradients, the
    averaged gradient equals that of one worker with the whole batch.

    Args:
        images_BD, texts_BD: unit norm; row i of one belongs to row i of the other.
        scale: inverse temperature, a scalar.
        same_BG: bool, True where two different rows are the same thing (equal captions) and
            so must not count as a negative; the diagonal is ignored.
        gather: differentiable gather.
        rank: this worker's place in the gathered order.

    Returns:
        A scalar, in nats.
    """
    all_images, all_texts = gather(images_BD), gather(texts_BD)
    target = torch.arange(len(images_BD), device=images_BD.device) + rank * len(images_BD)
    image_to_text = scale * images_BD @ all_texts.T
    text_to_image = scale * texts_BD @ all_images.T
    if same_BG is not None:
        own = F.one_hot(target, all_texts.shape[0]).bool()
        ignored = same_BG & ~own
        image_to_text = image_to_text.masked_fill(ignored, float("-inf"))
        text_to_image = text_to_image.masked_fill(ignored, float("-inf"))
    return (F.cross_entropy(image_to_text, target) + F.cross_entropy(text_to_image, target)) / 2
