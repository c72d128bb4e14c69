"""What spoils a picture, as tensors: noise, blur, half the size. For training that undoes it, and its measure.

All results are whole grey levels, as a file would hold them: a network that learnt from finer values
would find nothing of the kind in use. Knows no chance but what it is given, no models, no files.

Shape legend: B batch, H W height and width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

RADIUS = 6
"""Of a Gaussian's window, px: three times the widest blur of training."""


def levels(pictures: Tensor) -> Tensor:
    """Clipped to 0 … 1 and rounded to one of 256 levels."""
    return (pictures.clamp(0, 1) * 255).round() / 255


def noisy(pictures: Tensor, normal: Tensor, sigmas: Tensor) -> Tensor:
    """With additive white Gaussian noise, of each channel by itself.

    Args:
        pictures: float (B, 3, H, W) in 0 … 1.
        normal: standard normal numbers of the same shape.
        sigmas: float (B,), standard deviations in levels of 0 … 255.
    """
    return levels(pictures + normal * (sigmas / 255)[:, None, None, None])


def blurred(pictures: Tensor, sigmas: Tensor) -> Tensor:
    """Through a Gaussian, in sRGB values as stored, mirrored at the edges.

    Args:
        pictures: float (B, 3, H, W) in 0 … 1; H and W above `RADIUS`.
        sigmas: float (B,), in px, above 0 and up to a third of `RADIUS`.
    """
    size, channels, height, width = pictures.shape
    at = torch.arange(-RADIUS, RADIUS + 1, device=pictures.device, dtype=pictures.dtype)
    weights = torch.exp(-0.5 * (at / sigmas[:, None]) ** 2)
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = pictures.reshape(1, size * channels, height, width)
    flat = F.pad(flat, (RADIUS, RADIUS, RADIUS, RADIUS), mode="reflect")
    flat = F.conv2d(flat, weights[:, None, None, :], groups=size * channels)
    flat = F.conv2d(flat, weights[:, None, :, None], groups=size * channels)
    return levels(flat.reshape(pictures.shape))


def halved(pictures: Tensor, how: str = "bicubic") -> Tensor:
    """Half the size: float (B, 3, H, W) → (B, 3, H / 2, W / 2); H and W even.

    how: "area", the mean of each 2 × 2 px, or "bicubic" with a window widened to the step, as Pillow does it.
    """
    if how == "area":
        return levels(F.avg_pool2d(pictures, 2))
    return levels(F.interpolate(pictures, scale_factor=0.5, mode="bicubic", antialias=True))


def doubled(pictures: Tensor) -> Tensor:
    """Twice the size, by the bicubic kernel of Pillow: float (B, 3, H, W) → (B, 3, 2 H, 2 W)."""
    return levels(F.interpolate(pictures, scale_factor=2, mode="bicubic", antialias=True))
