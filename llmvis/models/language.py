"""A pre-trained language model that reads and writes words and code words in one sequence.

    [ words ] [ cells ]

A cell carries its target code words and, in translation, the source's at the same place: the
sequence is half as long as with a segment for the source, and alignment need not be learned.
The transformer is any Hugging Face encoder with `inputs_embeds` (BERT family; MiniLM by
default). New are: an embedding for each code word, for row and column of a cell, a map
for code words of the source, and two heads: over the codebooks, and over the language model's own
words (tied to its embeddings). What is masked is filled in; that is all it does, and every
synthesis task is a way of masking. Knows no pixels, no files, no Ray.

Shape legend: B batch, W words, K cells, G groups of code words in a cell, C codebook entries,
D width of the transformer.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmvis.models.tokenizer import TokenizerConfig

MASKED = -1
"""In place of a code: to be filled in."""


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Sizes that the transformer does not fix. `language_model`: "packaged", a folder or a hub name."""

    language_model: str = "packaged"
    words: int = 20
    grid: int = 8
    groups: int = 2
    levels: tuple[int, ...] = (8, 5, 5, 5)

    @staticmethod
    def of(tokenizer: TokenizerConfig, language_model: str = "packaged", words: int = 20) -> LanguageConfig:
        """For the code words of an image tokeniser."""
        return LanguageConfig(
            language_model=language_model, words=words,
            grid=tokenizer.grid, groups=tokenizer.groups, levels=tokenizer.levels,
        )  # fmt: skip


class LanguageModel(nn.Module):
    """Transformer, code-word embeddings and heads.

    Args:
        transformer: a Hugging Face encoder; its word embeddings stay as they are (frozen).
        entries: float (C, L), what each code word stands for (`Quantiser.entries`).
        mask_word: id of the language model's [MASK].
    """

    def __init__(self, config: LanguageConfig, transformer: Any, entries: Tensor, mask_word: int) -> None:
        super().__init__()
        self.config, self.transformer, self.mask_word = config, transformer, mask_word
        wide, size = int(transformer.config.hidden_size), len(entries)
        self.word_table = transformer.get_input_embeddings()
        self.word_table.weight.requires_grad_(False)
        self.register_buffer("entries", entries, persistent=False)
        self.code_table = nn.Parameter(torch.randn(config.groups, size, wide) * 0.02)
        self.code_map = nn.Parameter(torch.randn(config.groups, entries.shape[1], wide) * 0.05)
        self.code_mask = nn.Parameter(torch.zeros(config.groups, wide))
        self.rows, self.columns = (nn.Parameter(torch.randn(config.grid, wide) * 0.02) for _ in range(2))
        self.from_source = nn.Linear(wide, wide)
        self.no_source = nn.Parameter(torch.zeros(wide))
        self.code_head = nn.Sequential(
            nn.Linear(wide, wide), nn.GELU(), nn.LayerNorm(wide), nn.Linear(wide, config.groups * size)
        )
        self.word_head = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.LayerNorm(wide))
        self.word_bias = nn.Parameter(torch.zeros(self.word_table.num_embeddings))
        self._kept: Tensor | None = None
        self._takes = set(inspect.signature(transformer.forward).parameters)

    entries: Tensor

    @property
    def cells(self) -> int:
        """K."""
        return self.config.grid**2

    @property
    def width(self) -> int:
        """D."""
        return int(self.word_table.weight.shape[1])

    def train(self, mode: bool = True) -> LanguageModel:
        """As of any module; what was kept of the weights is forgotten."""
        self._kept = None
        super().train(mode)
        return self

    def _tables(self) -> Tensor:
        """Embeddings of all code words, float (G, C, D); kept while nothing is trained."""
        if self.training:
            return self.code_table + self.entries @ self.code_map
        if self._kept is None:
            self._kept = (self.code_table + self.entries @ self.code_map).detach()
        return self._kept

    def embed_cells(self, target_BKG: Tensor, source_BKG: Tensor | None) -> Tensor:
        """Codes, `MASKED` where unknown or, for a source, where there is none → `(B, K, D)`."""
        tables = self._tables()
        groups = torch.arange(self.config.groups, device=target_BKG.device)
        unknown = self.code_mask + self.word_table.weight[self.mask_word] / self.config.groups
        found = tables[groups, target_BKG.clamp(min=0)]
        target = torch.where((target_BKG != MASKED)[..., None], found, unknown).sum(2)
        places = (self.rows[:, None] + self.columns[None]).flatten(0, 1)
        if source_BKG is None:
            return target + places + self.no_source
        source = self.from_source(tables[groups, source_BKG.clamp(min=0)].sum(2))
        there = (source_BKG != MASKED).all(2)[..., None]
        return target + places + torch.where(there, source, self.no_source)

    def forward(
        self,
        words_BW: Tensor,
        attend_BW: Tensor,
        target_BKG: Tensor,
        source_BKG: Tensor | None = None,
        **more: Any,
    ) -> Any:
        """The transformer's output for a sequence; `last_hidden_state (B, W + K, D)`.

        Args:
            words_BW: int64, ids of the language model's tokenizer, its [MASK] where unknown.
            attend_BW: bool, False where a word is padding.
            target_BKG: int64 codes, `MASKED` where unknown.
            source_BKG: int64 codes, `MASKED` in rows that have no source.
        """
        words = words_BW.shape[1]
        sequence = torch.cat([self.word_table(words_BW), self.embed_cells(target_BKG, source_BKG)], 1)
        attend = F.pad(attend_BW, (0, self.cells), value=True)
        if (
            "position_ids" in self._takes
        ):  # cells share one place in the text and have their own in the picture
            places = torch.arange(words, device=words_BW.device)
            more["position_ids"] = F.pad(places, (0, self.cells), value=words)[None]
        return self.transformer(inputs_embeds=sequence, attention_mask=attend.long(), **more)

    def code_logits(self, hidden: Tensor) -> Tensor:
        """Output of the transformer → logits of the cells `float (B, K, G, C)`."""
        logits: Tensor = self.code_head(hidden[:, self.config.words :]).float()
        return logits.reshape(*logits.shape[:2], self.config.groups, -1)

    def word_logits(self, hidden_ND: Tensor) -> Tensor:
        """Any rows of the output → logits over the language model's words, `float (N, vocabulary)`."""
        logits: Tensor = self.word_head(hidden_ND) @ self.word_table.weight.T + self.word_bias
        return logits.float()
