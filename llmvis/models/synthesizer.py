"""One model for every synthesis task: an image tokeniser and a language model that fills in.

    model = load_synthesizer()
    codes = model.encode(pictures)                    # and model.decode(codes)
    made = model.generate(["a red apple"], seeds=[0])
    made = model.translate(pictures, ["colour the drawing"])
    made = model.inpaint(pictures, masks, ["a face with a hat"])
    words = model.caption(pictures)

Pictures come in at any size and go out at the model's own. On CPUs each row runs alone, so a
request gives the same bytes whatever else is in the batch. Knows no Ray.

Shape legend: B batch, S side of the model's pictures, h w cells, G groups of code words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from llmvis.images import square, square_mask
from llmvis.models.language import MASKED, LanguageModel
from llmvis.models.sampling import Sampling, code_probabilities, fill_codes, fill_words, stream
from llmvis.models.source_branch import SourceBranch
from llmvis.models.tokenizer import ImageTokenizer
from llmvis.schema import UserError

SAMPLED = Sampling()
"""Sharp and various: for pictures from words."""
BEGUN = Sampling(steps=8, guidance=1.0, temperature=0.3, choice=4.0)
"""For pictures that begin from a known drawing: what is there says most, so little is left to chance."""
REFERENCE = 0.75
"""Share of that drawing's cells that stay (benchmarks/LOG.md)."""
FAITHFUL = Sampling(steps=1, guidance=0.0)
"""Expected code words in one step: for translation that keeps to its source."""


class Words:
    """Texts → ids of the language model, of one length, and back."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length
        if tokenizer.mask_token_id is None:
            raise UserError("the language model has no [MASK] token: it must be a masked language model")

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """B texts → ids int64 (B, W) and attention bool (B, W); longer ones are cut."""
        clean = [text.encode("utf-8", "replace").decode() for text in texts]  # lone surrogates
        made = self.tokenizer(
            clean, padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        )
        return made["input_ids"], made["attention_mask"].bool()

    def text(self, ids: Tensor) -> str:
        """Ids of one row → text."""
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True))


class Synthesizer:
    """Tokeniser, language model and words together; a `Translator` and a `Generator`."""

    def __init__(
        self, tokenizer: ImageTokenizer, language: LanguageModel, words: Words,
        branch: SourceBranch | None = None, fingerprint: str = "", device: str = "cpu",
    ) -> None:  # fmt: skip
        self.tokenizer, self.language = tokenizer.eval().to(device), language.eval().to(device)
        self.branch = branch.eval().to(device) if branch is not None else None
        self.words, self.device, self.fingerprint = words, device, fingerprint
        self._empty = self._read([""])[0]

    @property
    def side(self) -> int:
        """S."""
        return self.tokenizer.config.image_size

    def encode(self, pictures: np.ndarray | Sequence[Image.Image]) -> Tensor:
        """Pictures, `uint8 (B, H, W, 3)` or a list of any sizes → codes int64 (B, h, w, G)."""
        return torch.cat([self.tokenizer.encode(row) for row in self._rows(pictures)])

    def decode(self, codes: Tensor) -> np.ndarray:
        """Codes int64 (B, h, w, G) → `uint8 (B, S, S, 3)`."""
        return np.concatenate([_bytes(self.tokenizer.decode(row[None].to(self.device))) for row in codes])

    def generate(
        self, prompts: Sequence[str], *, negatives: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None, ids: Sequence[str] | None = None, how: Sampling = SAMPLED,
        begin: Sequence[Image.Image] | None = None, share: float = REFERENCE,
    ) -> np.ndarray:  # fmt: skip
        """A picture for each prompt: `uint8 (B, S, S, 3)`.

        `negatives` are what guidance leads away from (default: no words), `ids` name the random
        streams (default: the prompt). `begin`: pictures whose code words each result begins
        from, in a chance `share` of the cells; the rest is filled in under the prompt.
        """
        ids = ids or prompts
        seeds = [0] * len(prompts) if seeds is None else seeds
        targets = [torch.full(self._shape, MASKED, device=self.device)] * len(prompts)
        if begin is not None:
            _same_length(begin, prompts)
            targets = [
                self._some_codes(image, share, stream(f"begin/{key}", seed))
                for image, key, seed in zip(self._rows(begin), ids, seeds, strict=True)
            ]
        return self._made(targets, [None] * len(prompts), prompts, seeds, ids, how, negatives)

    def _some_codes(self, image: Tensor, share: float, random: np.random.Generator) -> Tensor:
        """A picture's codes int64 (K, G), `MASKED` but in a chance `share` of the cells."""
        codes = self.tokenizer.encode(image)[0].flatten(0, 1)
        keep = np.argsort(random.random(len(codes))) < round(share * len(codes))
        return codes.masked_fill(~torch.from_numpy(keep)[:, None].to(codes.device), MASKED)

    def translate(
        self, pictures: np.ndarray | Sequence[Image.Image], instructions: Sequence[str], *,
        seeds: Sequence[int] | None = None, ids: Sequence[str] | None = None, how: Sampling = FAITHFUL,
    ) -> np.ndarray:  # fmt: skip
        """Each picture under its instruction: `uint8 (B, S, S, 3)`."""
        images = self._rows(pictures)
        _same_length(images, instructions)
        nothing = torch.full(self._shape, MASKED, device=self.device)
        ids = ids or [f"{_digest(i)}/{text}" for i, text in zip(images, instructions, strict=True)]
        return self._made([nothing] * len(images), images, instructions, seeds, ids, how)

    def inpaint(
        self, pictures: np.ndarray | Sequence[Image.Image], masks: np.ndarray | Sequence[np.ndarray],
        prompts: Sequence[str], *,
        seeds: Sequence[int] | None = None, ids: Sequence[str] | None = None, how: Sampling = SAMPLED,
    ) -> np.ndarray:  # fmt: skip
        """New content where `masks` is True; elsewhere the picture's own pixels: `uint8 (B, S, S, 3)`.

        A mask, bool (H, W), has its picture's shape, at any resolution, and is fitted as the picture
        is. Every cell that it touches is filled in; pixels that it does not touch are put back.
        Raises `ValueError` where a mask's shape is not its picture's.
        """
        shapes = [
            picture.shape[:2] if isinstance(picture, np.ndarray) else picture.size[::-1]
            for picture in pictures
        ]
        images = self._rows(pictures)
        _same_length(images, prompts)
        _same_length(images, masks)
        regions = [
            torch.from_numpy(square_mask(np.asarray(mask, bool), width, height, self.side)).float()
            for mask, (height, width) in zip(masks, shapes, strict=True)
        ]
        targets = []
        for image, region in zip(images, regions, strict=True):
            codes = self.tokenizer.encode(image)[0].flatten(0, 1)
            hole = F.adaptive_max_pool2d(region[None], self.tokenizer.config.grid).flatten() > 0
            targets.append(codes.masked_fill(hole[:, None].to(self.device), MASKED))
        ids = ids or [f"{_digest(i)}/{text}" for i, text in zip(images, prompts, strict=True)]
        made = self._made(targets, [None] * len(images), prompts, seeds, ids, how)
        if not images:
            return made
        inside = torch.stack(regions)[..., None].numpy() > 0
        return np.where(inside, made, np.concatenate([_bytes(image) for image in images]))

    def caption(self, pictures: np.ndarray | Sequence[Image.Image], *, steps: int = 8) -> list[str]:
        """Words for each picture."""
        out = []
        start = self._empty[0].clone()
        start[1:] = self.language.mask_word
        for image in self._rows(pictures):
            codes = self.tokenizer.encode(image)[0].flatten(0, 1)
            filled = fill_words(self.language, start, codes, steps)
            ends = (filled == self.words.tokenizer.sep_token_id).nonzero()
            out.append(self.words.text(filled[: int(ends[0])] if len(ends) else filled))
        return out

    @property
    def _shape(self) -> tuple[int, int]:
        config = self.tokenizer.config
        return config.cells, config.groups

    def _made(
        self, targets: Sequence[Tensor], sources: Sequence[Tensor | None], texts: Sequence[str],
        seeds: Sequence[int] | None, ids: Sequence[str], how: Sampling, negatives: Sequence[str] | None = None,
    ) -> np.ndarray:  # fmt: skip
        seeds = [0] * len(texts) if seeds is None else seeds
        _same_length(seeds, texts)
        away = [self._empty] * len(texts) if negatives is None else self._read(negatives)
        out = []
        for target, source, words, empty, key, seed in zip(
            targets, sources, self._read(texts), away, ids, seeds, strict=True
        ):
            out.append(_bytes(self._one(target, source, words, empty, how, stream(key, seed))))
        return np.concatenate(out) if out else np.zeros((0, self.side, self.side, 3), np.uint8)

    @torch.inference_mode()
    def _one(
        self, target: Tensor, source: Tensor | None, words: tuple[Tensor, Tensor],
        empty: tuple[Tensor, Tensor], how: Sampling, random: np.random.Generator,
    ) -> Tensor:  # fmt: skip
        """One row: `float (1, 3, S, S)` in 0 … 1.

        In one step the source branch works from source and words alone: expected code words blur, and
        add nothing to it on new drawings (benchmarks/LOG.md).
        """
        config = self.tokenizer.config
        grid = config.grid
        if how.steps == 1 and self.branch is not None and source is not None:
            latents = torch.zeros(1, config.groups * len(config.levels), grid, grid, device=self.device)
            return self.branch.decode(latents, source, self.mean_words(*(part[None] for part in words)))
        codes = None if source is None else self.tokenizer.encode(source)[0].flatten(0, 1)
        if how.steps == 1:
            log_p = code_probabilities(
                self.language, *words, empty, target, codes, how.guidance, how.temperature
            )
            known = target != MASKED
            sure = F.one_hot(target.clamp(min=0), log_p.shape[-1]).float()
            p = torch.where(known[..., None], sure, log_p.exp())
            latents = self.tokenizer.quantiser.expected(p.reshape(1, grid, grid, *p.shape[1:]))
        else:
            filled = fill_codes(self.language, *words, empty, target, codes, how, random)
            latents = self.tokenizer.quantiser.latents(filled.reshape(1, grid, grid, -1))
        if self.branch is not None and source is not None:
            return self.branch.decode(latents, source, self.mean_words(*(part[None] for part in words)))
        return self.tokenizer.decode_latents(latents)

    @torch.inference_mode()
    def mean_words(self, words: Tensor, attend: Tensor) -> Tensor:
        """Ids int64 (B, W) and attention bool (B, W) → the mean of the words' embeddings, float (B, D)."""
        there = attend[..., None].float()
        mean: Tensor = (self.language.word_table(words) * there).sum(1) / there.sum(1)
        return mean

    def _read(self, texts: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
        ids, attend = self.words(texts) if texts else (torch.empty(0), torch.empty(0))
        return [(i.to(self.device), a.to(self.device)) for i, a in zip(ids, attend, strict=True)]

    def _rows(self, pictures: np.ndarray | Sequence[Image.Image]) -> list[Tensor]:
        """Each picture as `float (1, 3, S, S)` in 0 … 1: fitted whole, on white."""
        if isinstance(pictures, np.ndarray):
            if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
                raise ValueError(f"expected uint8 (B, H, W, 3), got {pictures.dtype} {pictures.shape}")
            pictures = [Image.fromarray(picture) for picture in pictures]
        return [self._row(picture) for picture in pictures]

    def _row(self, picture: Image.Image) -> Tensor:
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        flat = Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB")
        pixels = torch.from_numpy(np.array(square(flat, self.side))).to(self.device)
        return pixels.permute(2, 0, 1)[None].float() / 255


def _bytes(images: Tensor) -> np.ndarray:
    """`float (B, 3, S, S)` in 0 … 1 → `uint8 (B, S, S, 3)`."""
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _digest(image: Tensor) -> str:
    return hashlib.sha256(_bytes(image).tobytes()).hexdigest()[:16]


def _same_length(one: Sequence[Any] | np.ndarray, other: Sequence[Any] | np.ndarray) -> None:
    if len(one) != len(other):
        raise ValueError(f"{len(one)} pictures or seeds, but {len(other)} texts or masks: give one each")
