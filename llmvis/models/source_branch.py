"""The decoder's source branch: a U-Net round the code words, from source and instruction to result.

Maps of the source picture go to the decoder at every width (asymmetric VQGAN, Zhu 2023; U-Net,
Ronneberger 2015), changed by the instruction's words on the way (FiLM, Perez 2018), and at the
grid they look at each other, so that what moves between two hands' drawings can be found. The
language model's code words say what changes. They are known better for drawings that it was
trained on than for new ones: training leaves them out of most rows (training/branch.py), so the
result does not lean on them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llmvis.models.tokenizer import Decoder, Encoder, ImageTokenizer, TokenizerConfig

LAYERS, HEADS, WORDS = 2, 4, 256


class SourceBranch(nn.Module):
    """An encoder of the source and a decoder of its own, which starts as the tokeniser's.

    Args:
        width: of the language model's word embeddings.
    """

    def __init__(self, config: TokenizerConfig, width: int) -> None:
        super().__init__()
        widths = config.channels[::-1]
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.words = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, WORDS), nn.SiLU())
        self.change = nn.ModuleList(nn.Linear(WORDS, 2 * wide) for wide in widths)
        self.places = nn.Parameter(torch.randn(config.cells, widths[0]) * 0.02)
        layer = nn.TransformerEncoderLayer(
            widths[0], HEADS, 2 * widths[0], dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.mix = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.join = nn.ModuleList(nn.Conv2d(wide, wide, 1) for wide in widths)
        for module in (*self.join, *self.change):
            for tensor in module.parameters():
                nn.init.zeros_(tensor)

    def start_from(self, tokenizer: ImageTokenizer) -> None:
        """Begin with the tokeniser's weights: until trained, the branch changes nothing."""
        self.encoder.load_state_dict(tokenizer.encoder.state_dict())
        self.decoder.load_state_dict(tokenizer.decoder.state_dict())

    def forward(self, latents: Tensor, source: Tensor, words: Tensor) -> Tensor:
        """Latents, sources and words → pictures `float (B, 3, S, S)`, about 0 … 1.

        Args:
            latents: float (B, Z, h, w); zeros where they are not to be used.
            source: float (B, 3, S, S) in 0 … 1.
            words: float (B, D), the mean embedding of the instruction's words.
        """
        maps = self.encoder.features(source * 2 - 1)[::-1]
        told = self.words(words)
        extra = []
        for level, (seen, change, join) in enumerate(zip(maps, self.change, self.join, strict=True)):
            scale, shift = change(told)[..., None, None].chunk(2, 1)
            seen = seen * (1 + scale) + shift
            if level == 0:
                cells = seen.flatten(2).transpose(1, 2) + self.places
                seen = self.mix(cells).transpose(1, 2).reshape(seen.shape)
            extra.append(join(seen))
        images: Tensor = (self.decoder(latents, extra) + 1) / 2
        return images

    @torch.inference_mode()
    def decode(self, latents: Tensor, source: Tensor, words: Tensor) -> Tensor:
        """As `ImageTokenizer.decode_latents`, with source and words beside it: pictures in 0 … 1."""
        images: Tensor = self(latents, source, words)
        return images.clamp(0, 1)
