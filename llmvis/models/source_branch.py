"""The decoder's source branch: fine lines that code words lose go round them, from source to result.

Maps of the source picture are added to the decoder's at every width (asymmetric VQGAN, Zhu
2023), so a translation keeps the source's strokes while the language model's code words say
what changes. Trained on expected code words, after the language model (training/branch.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmvis.models.tokenizer import Decoder, Encoder, ImageTokenizer, TokenizerConfig


class SourceBranch(nn.Module):
    """An encoder of the source and a decoder of its own, which starts as the tokeniser's."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.join = nn.ModuleList(nn.Conv2d(width, width, 1) for width in config.channels[::-1])
        for conv in self.join:
            assert isinstance(conv, nn.Conv2d) and conv.bias is not None
            nn.init.zeros_(conv.weight)
            nn.init.zeros_(conv.bias)

    def start_from(self, tokenizer: ImageTokenizer) -> None:
        """Begin with the tokeniser's weights: until trained, the branch changes nothing."""
        self.encoder.load_state_dict(tokenizer.encoder.state_dict())
        self.decoder.load_state_dict(tokenizer.decoder.state_dict())

    def forward(self, latents: Tensor, source: Tensor) -> Tensor:
        """Latents `(B, Z, h, w)` and source pictures in 0 … 1 → pictures, about 0 … 1."""
        maps = self.encoder.features(source * 2 - 1)[::-1]
        extra = [join(m) for join, m in zip(self.join, maps, strict=True)]
        images: Tensor = (self.decoder(latents, extra) + 1) / 2
        return images

    @torch.inference_mode()
    def decode(self, latents: Tensor, source: Tensor) -> Tensor:
        """As `ImageTokenizer.decode_latents`, with the source beside it: pictures in 0 … 1."""
        images: Tensor = self(latents, source)
        return images.clamp(0, 1)
