"""Pictures ↔ code words: a CNN encoder, a codebook and a CNN decoder.

The encoder turns a picture into a grid of cells; each cell holds `groups` code words, one
from each of as many codebooks. A codebook is a product of a few evenly spaced levels (finite
scalar quantisation, Mentzer 2023): the nearest entry is a rounding, and no entry can die.
What the decoder's GAN training needs is in `discriminator.py` and `training/tokenize.py`.
Transparency is gone before a picture comes here: composited on white.

Shape legend: B batch, H W pixels, h w cells (h = H / 8), G groups, L levels a group, Z = G · L.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Sizes of an `ImageTokenizer`.

    channels: width at 1/2, 1/4, 1/8 … of the picture's side; the last one is the grid's.
    blocks: residual blocks of the decoder at each width; the encoder has one.
    levels: of each dimension of a code word; a codebook has their product of entries.
    """

    image_size: int = 64
    channels: tuple[int, ...] = (64, 128, 256)
    blocks: int = 2
    groups: int = 2
    levels: tuple[int, ...] = (8, 5, 5, 5)

    @property
    def grid(self) -> int:
        """Cells along a side."""
        return self.image_size // int(2 ** len(self.channels))

    @property
    def cells(self) -> int:
        """Cells of a picture."""
        return self.grid**2

    @property
    def codebook(self) -> int:
        """Entries of each group's codebook."""
        return math.prod(self.levels)


class Quantiser(nn.Module):
    """Finite scalar quantisation: each latent is bounded and rounded to one of its levels.

    A code word is the mixed-radix number of its L rounded latents, first level fastest.
    """

    def __init__(self, groups: int, levels: tuple[int, ...]) -> None:
        super().__init__()
        self.groups = groups
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer(
            "radix", torch.tensor([math.prod(levels[:i]) for i in range(len(levels))]), persistent=False
        )
        every = torch.arange(math.prod(levels))[:, None] // self.radix % self.levels
        self.register_buffer("entries", self._scaled(every), persistent=False)

    levels: Tensor
    radix: Tensor
    entries: Tensor  # float (codebook, L) in [-1, 1]

    def _scaled(self, digits: Tensor) -> Tensor:
        """0 … level − 1 → −1 … 1."""
        return digits * 2.0 / (self.levels - 1) - 1

    def forward(self, z_BZhw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents → `(B, Z, h, w)` rounded, codes `int64 (B, h, w, G)`, commitment loss.

        Gradients pass the rounding straight through. The commitment is MSE(Z, Z*), Z* the
        nearest entry (van den Oord 2017): it draws latents towards the levels.
        """
        digits_of = (self.levels - 1).repeat(self.groups)[:, None, None]
        bounded = torch.tanh(z_BZhw.float())
        digits = ((bounded + 1) / 2 * digits_of).round()
        near = digits * 2 / digits_of - 1
        commitment = F.mse_loss(bounded, near.detach())
        grouped = digits.long().reshape(len(digits), self.groups, -1, *digits.shape[2:])
        codes = (grouped * self.radix[:, None, None]).sum(2).permute(0, 2, 3, 1)
        return bounded + (near - bounded).detach(), codes, commitment

    def latents(self, codes_BhwG: Tensor) -> Tensor:
        """Codes → the latents they stand for, `float (B, Z, h, w)`."""
        return self.entries[codes_BhwG].flatten(3).permute(0, 3, 1, 2)

    def expected(self, probabilities_BhwGC: Tensor) -> Tensor:
        """Probabilities over each codebook → expected latents, `float (B, Z, h, w)`."""
        return (probabilities_BhwGC @ self.entries).flatten(3).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions with group normalisation, and the input added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(8, channels) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        out: Tensor = x + self.conv2(F.silu(self.norm2(y)))
        return out


class Encoder(nn.Module):
    """Pictures in −1 … 1 `(B, 3, H, W)` → latents `(B, Z, h, w)`; `features` gives every width's map."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = config.channels
        self.stem = nn.Conv2d(12, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(ResidualBlock(width) for width in widths)
        self.down = nn.ModuleList(nn.Conv2d(4 * a, b, 1) for a, b in pairwise(widths))
        self.out = nn.Sequential(
            nn.GroupNorm(8, widths[-1]),
            nn.SiLU(),
            nn.Conv2d(widths[-1], config.groups * len(config.levels), 1),
        )

    def features(self, images: Tensor) -> list[Tensor]:
        """Maps at 1/2, 1/4, … of the side, before quantisation."""
        x, maps = self.stem(F.pixel_unshuffle(images, 2)), []
        for i, block in enumerate(self.blocks):
            if i:
                x = self.down[i - 1](F.pixel_unshuffle(x, 2))
            x = block(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        latents: Tensor = self.out(self.features(images)[-1])
        return latents


class Decoder(nn.Module):
    """Latents `(B, Z, h, w)` → pictures `(B, 3, H, W)`, about −1 … 1: the GAN's generator.

    `extra`, one map for each width from the grid up, is added on the way: the source branch.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = config.channels[::-1]
        self.stem = nn.Conv2d(config.groups * len(config.levels), widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(width) for _ in range(config.blocks))) for width in widths
        )
        self.up = nn.ModuleList(nn.Conv2d(a, 4 * b, 1) for a, b in pairwise(widths))
        self.out = nn.Sequential(
            nn.GroupNorm(8, widths[-1]), nn.SiLU(), nn.Conv2d(widths[-1], 12, 3, padding=1)
        )

    def forward(self, latents: Tensor, extra: list[Tensor] | None = None) -> Tensor:
        x = self.stem(latents)
        for i, blocks in enumerate(self.blocks):
            if i:
                x = F.pixel_shuffle(self.up[i - 1](x), 2)
            x = blocks(x if extra is None else x + extra[i])
        return F.pixel_shuffle(self.out(x), 2)

    @property
    def last_weight(self) -> Tensor:
        """Of the last convolution: where the GAN's gradient is weighed against the reconstruction's."""
        conv = self.out[-1]
        assert isinstance(conv, nn.Conv2d)
        return conv.weight


class ImageTokenizer(nn.Module):
    """Pictures `float (B, 3, H, W)` in 0 … 1, H = W = `image_size` ↔ codes `int64 (B, h, w, G)`."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantiser = Quantiser(config.groups, config.levels)
        self.decoder = Decoder(config)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruction (0 … 1, not clipped), codes, commitment loss: what training sees."""
        latents, codes, commitment = self.quantiser(self.encoder(images * 2 - 1))
        return (self.decoder(latents) + 1) / 2, codes, commitment

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """`float (B, 3, H, W)` in 0 … 1 → codes `int64 (B, h, w, G)`."""
        codes: Tensor = self.quantiser(self.encoder(images * 2 - 1))[1]
        return codes

    @torch.inference_mode()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes `int64 (B, h, w, G)` → `float (B, 3, H, W)` in 0 … 1."""
        return self.decode_latents(self.quantiser.latents(codes))

    def decode_latents(self, latents: Tensor, extra: list[Tensor] | None = None) -> Tensor:
        """Latents `float (B, Z, h, w)` in −1 … 1, also between the levels → pictures in 0 … 1."""
        images: Tensor = (self.decoder(latents, extra) + 1) / 2
        return images.clamp(0, 1)
