"""Chance views of pictures for training, and sheets of pictures to look at while it goes on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def changed_views(rgba: Tensor, chance: Tensor) -> Tensor:
    """Chance views on a ground: shifted, resized, mirrored, recoloured, half of them as they are.

    Args:
        rgba: float (B, 4, S, S) in 0 … 1.
        chance: float (B, 9), uniform in 0 … 1: all the randomness there is.

    Returns:
        float (B, 3, S, S) in 0 … 1.
    """
    plain = (chance[:, 0] < 0.5).float()
    moved = 1 - plain
    scale = 1 + moved * (chance[:, 1] * 0.7 - 0.2)
    mirror = torch.where((chance[:, 2] < 0.5) & (plain == 0), -1.0, 1.0)
    zero = torch.zeros_like(scale)
    dx, dy = moved * (chance[:, 3] - 0.5) * 0.5, moved * (chance[:, 4] - 0.5) * 0.5
    theta = torch.stack([torch.stack([scale * mirror, zero, dx], 1), torch.stack([zero, scale, dy], 1)], 1)
    grid = F.affine_grid(theta, list(rgba.shape), align_corners=False)
    premultiplied = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
    view = F.grid_sample(premultiplied, grid, align_corners=False)
    coloured = (moved * (chance[:, 5] < 0.4))[:, None]
    ground = 1 - coloured * (1 - chance[:, 6:9])
    return view[:, :3] + (1 - view[:, 3:]) * ground[:, :, None, None]


def pair_sheet(pairs: Sequence[tuple[Tensor, ...]], columns: int = 12) -> Image.Image:
    """Pictures `float (3, S, S)` in 0 … 1 below each other, pair by pair."""
    made = []
    for pair in pairs:
        joined = torch.cat([image.float().cpu() for image in pair], 1)
        made.append(Image.fromarray((joined.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()))
    width, height = made[0].size
    sheet = Image.new(
        "RGB", (columns * (width + 4), -(-len(made) // columns) * (height + 8)), (255, 255, 255)
    )
    for i, image in enumerate(made):
        sheet.paste(image, (i % columns * (width + 4), i // columns * (height + 8)))
    return sheet
