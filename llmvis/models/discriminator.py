"""The judge of the decoder's GAN training: real or made, patch by patch (pix2pix, Isola 2017)."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class PatchDiscriminator(nn.Module):
    """Pictures `(B, 3, H, W)` in −1 … 1 → scores `(B, 1, h, w)`, each for a patch of about 30 px.

    No attention, no batch statistics: a row's score depends on the row alone. Spectral norm
    (Miyato 2018) keeps it from running away on small data.
    """

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        widths = [12, width, 2 * width, 4 * width]
        self.convs = nn.ModuleList(
            spectral_norm(nn.Conv2d(a, b, 4, stride=2, padding=1) if i else nn.Conv2d(a, b, 3, padding=1))
            for i, (a, b) in enumerate(pairwise(widths))
        )
        self.out = spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        x = F.pixel_unshuffle(images, 2)
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
        scores: Tensor = self.out(x)
        return scores
