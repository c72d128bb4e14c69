"""Filling in what is masked: parallel decoding by confidence, with guidance, one random stream a row.

All unknown code words are predicted at once; the surest are kept and the rest asked again,
along a cosine (MaskGIT, Chang 2022), with classifier-free guidance (Ho & Salimans 2022) away
from what would be said without words. On CPUs each row is run by itself: arithmetic then does
not depend on the batch, and the same request gives the same bytes in any company.

Shape legend: K cells, G groups, C codebook entries, W words; one row has no batch axis.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llmvis.models.language import MASKED, LanguageModel


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to fill in.

    steps: 1 gives expected code words, faithful and soft; 8 to 12 give sampled ones, sharp and various.
    guidance: 0 none; 2 pulls towards the words.
    temperature: of the distribution over code words.
    choice: noise in the order in which code words are decided, falling to zero with the steps. Little of
        it decides the surest first, which are white, and more white around them (benchmarks/LOG.md).
    """

    steps: int = 12
    guidance: float = 3.0
    temperature: float = 0.8
    choice: float = 30.0


def stream(key: str, seed: int) -> np.random.Generator:
    """The random stream of one request: of its id and seed, and of nothing else."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


@torch.inference_mode()
def code_probabilities(
    model: LanguageModel, words: Tensor, attend: Tensor, empty: tuple[Tensor, Tensor], target: Tensor,
    source: Tensor | None, guidance: float, temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """Guided log-probabilities of every code word of one row, `float (K, G, C)`.

    `empty` is the sequence of no words, with its attention. Without guidance it is not run.
    """
    rows = [(words, attend), empty] if guidance else [(words, attend)]
    many = len(rows)
    hidden = model(
        torch.stack([w for w, _ in rows]), torch.stack([a for _, a in rows]),
        target.expand(many, -1, -1), None if source is None else source.expand(many, -1, -1),
    ).last_hidden_state  # fmt: skip
    logits = model.code_logits(hidden)
    told = logits[0] if many == 1 else logits[1] + (1 + guidance) * (logits[0] - logits[1])
    return (told / temperature).log_softmax(-1)


def fill_codes(
    model: LanguageModel, words: Tensor, attend: Tensor, empty: tuple[Tensor, Tensor], target: Tensor,
    source: Tensor | None, how: Sampling, random: np.random.Generator,
) -> Tensor:  # fmt: skip
    """Fills in every `MASKED` code of one row: int64 (K, G) → int64 (K, G), known ones as they were."""
    target = target.clone()
    masked = int((target == MASKED).sum())
    for step in range(how.steps):
        unknown = target == MASKED
        if not unknown.any():
            break
        log_p = code_probabilities(model, words, attend, empty, target, source, how.guidance, how.temperature)
        gumbel = torch.from_numpy(random.gumbel(size=tuple(log_p.shape)).astype(np.float32)).to(log_p.device)
        drawn = (log_p + gumbel).argmax(-1)
        sure = log_p.gather(-1, drawn[..., None])[..., 0]
        left = 1 - (step + 1) / how.steps
        noise = torch.from_numpy(random.gumbel(size=tuple(sure.shape)).astype(np.float32)).to(sure.device)
        sure = (sure + how.choice * left * noise).masked_fill(~unknown, -math.inf)
        stay = int(masked * math.cos(math.pi / 2 * (step + 1) / how.steps)) if left > 0 else 0
        decide = max(1, int(unknown.sum()) - stay)
        chosen = sure.flatten().topk(decide).indices
        target.view(-1)[chosen] = drawn.flatten()[chosen]
    return target


@torch.inference_mode()
def fill_words(model: LanguageModel, words: Tensor, target: Tensor, steps: int) -> Tensor:
    """Fills in every [MASK] of one row's words, the surest first: int64 (W,) → int64 (W,)."""
    words = words.clone()
    attend = torch.ones_like(words, dtype=torch.bool)
    for step in range(steps):
        unknown = (words == model.mask_word).nonzero()[:, 0]
        if not len(unknown):
            break
        hidden = model(words[None], attend[None], target[None]).last_hidden_state
        log_p = model.word_logits(hidden[0, unknown]).log_softmax(-1)
        log_p[:, model.mask_word] = -math.inf
        sure, best = log_p.max(-1)
        decide = math.ceil(len(unknown) / (steps - step))
        chosen = sure.topk(decide).indices
        words[unknown[chosen]] = best[chosen]
    return words
