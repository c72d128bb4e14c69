"""Where in a picture, and in which words of a text, a model's answer lies: heat maps and overlays.

    heat = grad_cam(encoder, pictures, texts)           # of a cosine of the two-tower encoder
    words = word_saliency(encoder, picture, text)
    words, heat = attention_map(model, "a red apple")   # of the synthesis model
    overlay(picture, heat[0]).save("apple.png")

Heat says what a score or a prediction leans on, to first order: it is neither the outline of a
thing nor a proof of cause. Gradients go to maps and inputs, never into weights, and a model is as
it was afterwards. Knows no files, no training, no Ray.

Shape legend: B pictures, H W pixels, h w cells of a feature map, D embedding, N words,
g side of the grid of code cells, S places in a sequence.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from llmvis.images import contact_sheet
from llmvis.models.efficientnet import Features
from llmvis.models.language import MASKED, LanguageModel
from llmvis.models.synthesizer import Synthesizer
from llmvis.models.two_tower import TwoTower, TwoTowerEncoder
from llmvis.schema import UserError

Part = Literal["whole", "learned", "class"]
"""Of an embedding: all of it, its learned part or its class-name part."""
BATCH = 8
"""Pictures at once: a trunk that keeps what gradients need takes some 60 MB for each."""
PATH = 16
"""Points between padding and a word."""
_TINY = 1e-12  # below it a feature counts as 0, whose root has no slope
_COLOURS = "viridis"


# pictures, two-tower encoder


def grad_cam(
    encoder: TwoTowerEncoder, pictures: np.ndarray, texts: Sequence[str], part: Part = "whole"
) -> np.ndarray:
    """Grad-CAM (Selvaraju 2017) of the cosine of each picture with its text, fine and coarse.

    The mean of two maps: of stride 16, gradient times feature in each cell (HiResCAM, Draelos &
    Carin 2020: Grad-CAM without the mean over cells), and of stride 32, where the two are one. The
    fine map says which strokes matter, the coarse one which of several things is meant:

                                              fine   coarse  both   drawn cells at random
      hottest 15 % blurred, fall in the cosine
      of 48 test emoji with their names       .046   .037    .048   .024
      the same, learned part                  .063   .040    .059   .030
      a name's region among four emoji
      lies in its own quarter                 36 %   57 %    58 %   (25 %)

    Args:
        pictures: uint8 (B, H, W, 3), sized by `encoder.info.preprocess`.
        texts: one for each picture; the encoder's glossary is applied.
        part: whose cosine is explained.

    Returns:
        float32 (B, H, W) in 0 … 1; the hottest place is 1, and all is 0 where nothing speaks for the text.
    """
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype != np.uint8:
        raise ValueError(f"expected uint8 (B, H, W, 3), got {pictures.dtype} {pictures.shape}")
    if len(pictures) != len(texts):
        raise ValueError(f"{len(pictures)} pictures, but {len(texts)} texts: give one each")
    wanted = torch.from_numpy(encoder.encode_texts(texts))
    out = np.zeros(pictures.shape[:3], np.float32)
    for start in range(0, len(pictures), BATCH):
        rows = slice(start, start + BATCH)
        out[rows] = _grad_cam(encoder, pictures[rows], wanted[rows], part)
    return out


@torch.enable_grad()
def _grad_cam(encoder: TwoTowerEncoder, pictures: np.ndarray, texts_BD: Tensor, part: Part) -> np.ndarray:
    images = encoder.to_tensor(pictures).requires_grad_()  # a graph even where weights are frozen
    features: Features = encoder.model.trunk(images)
    cosine = _cosine(encoder.model, features, texts_BD.to(images.device), part)
    maps = [features.middle, features.final]
    heat = torch.zeros(len(images), *images.shape[2:], device=images.device)
    for map_, slope in zip(maps, torch.autograd.grad(cosine.sum(), maps), strict=True):
        cells = (slope * map_).sum(1, keepdim=True).relu().detach()
        heat += _to_unit(F.interpolate(cells, images.shape[2:], mode="bilinear")[:, 0])
    result: np.ndarray = _to_unit(heat).cpu().numpy()
    return result


def _to_unit(maps: Tensor) -> Tensor:
    """Not negative (B, H, W), scaled so that the highest is 1; zeros stay."""
    return maps / maps.amax((1, 2), keepdim=True).clamp(min=_TINY)


def _cosine(model: TwoTower, features: Features, texts_BD: Tensor, part: Part) -> Tensor:
    """Cosine of pictures, by their features, with texts, in one part or as a whole: float (B,)."""
    width, share = model.config.text_dim, model.config.semantic_share
    inputs = torch.cat([features.pooled, features.middle.mean((2, 3))], 1).clamp(min=_TINY)
    by_class = model.class_name_part(features.logits) * F.normalize(texts_BD[:, :width])
    learned = model.learned.project_images(inputs) * F.normalize(texts_BD[:, width:])
    if part == "class":
        return by_class.sum(1)
    if part == "learned":
        return learned.sum(1)
    return share * by_class.sum(1) + (1 - share) * learned.sum(1)


def region_of(encoder: TwoTowerEncoder, picture: np.ndarray, text: str, share: float = 0.25) -> np.ndarray:
    """Where a picture shows what a text names, for `Synthesizer.inpaint`: bool (H, W).

    Args:
        picture: uint8 (H, W, 3) of any size; it is squashed to the encoder's.
        share: of the picture's pixels. The region is smaller where the map is 0 beyond it.
    """
    side = encoder.info.preprocess.side
    height, width = picture.shape[:2]
    square = np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC))
    heat = grad_cam(encoder, square[None], [text])[0]
    return hottest_region(_resized(heat, width, height), share)


def hottest_region(heat: np.ndarray, share: float) -> np.ndarray:
    """One connected region of a map (H, W), grown from its hottest pixel, the hottest neighbour first.

    Returns:
        bool (H, W), `share` of all pixels or fewer: pixels of no heat are left out.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    height, width = heat.shape
    inside, seen = np.zeros((height, width), bool), np.zeros((height, width), bool)
    start = divmod(int(heat.argmax()), width)
    edge = [(-float(heat[start]), *start)]
    seen[start] = True
    for _ in range(round(share * heat.size)):
        if not edge or edge[0][0] >= 0:
            break
        _, y, x = heapq.heappop(edge)
        inside[y, x] = True
        for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if 0 <= v < height and 0 <= u < width and not seen[v, u]:
                seen[v, u] = True
                heapq.heappush(edge, (-float(heat[v, u]), v, u))
    return inside


# words, two-tower encoder


@torch.enable_grad()
def word_saliency(encoder: TwoTowerEncoder, picture: np.ndarray, text: str) -> list[tuple[str, float]]:
    """What each word of a text adds to its cosine with a picture, by integrated gradients.

    Gradient times input, averaged over a path from padding to the words (Sundararajan 2017). Without
    the path it says the opposite of what leaving words out does (mean r −.55; with it .69): the
    first layer normalises its input, so the gradient is orthogonal to it.

    Args:
        picture: uint8 (H, W, 3), sized by `encoder.info.preprocess`.
        text: any; one that the glossary rewrites is explained as rewritten.

    Returns:
        Its words in order, each with its share; together they are the cosine less that of padding alone,
        up to the error of a mean over `PATH` points.
    """
    tokenizer, language = encoder.text_encoder._loaded
    if encoder._rewrite is not None:
        text = encoder._rewrite(text)
    reading = _read(tokenizer, text, encoder.text_encoder._max_tokens)
    image = torch.from_numpy(encoder.encode_images(picture[None]))[0]
    state = {**dict(language.named_parameters()), **dict(language.named_buffers())}
    state = {name: tensor.detach().clone() for name, tensor in state.items()}  # loaded in inference mode
    table = language.get_input_embeddings().weight.detach().clone()
    given = table[reading.ids[0].to(table.device)]  # (S, D)
    ours = (reading.owner >= 0)[:, None].to(table.device)
    change = torch.where(ours, given - table[tokenizer.pad_token_id], 0)
    left = 1 - (torch.arange(PATH, device=table.device) + 0.5) / PATH
    points = (given - left[:, None, None] * change).requires_grad_()
    attend = torch.ones(points.shape[:2], dtype=torch.long, device=table.device)
    made = torch.func.functional_call(
        language, state, kwargs={"inputs_embeds": points, "attention_mask": attend}
    )
    texts = encoder.model.embed_texts(F.normalize(made.last_hidden_state.mean(1), dim=1))
    (slope,) = torch.autograd.grad((texts @ image.to(texts.device)).sum(), points)
    token = (slope.mean(0) * change).sum(1).cpu()
    return [(word, float(token[reading.of(i)].sum())) for i, word in enumerate(reading.words)]


@dataclass(frozen=True)
class _Reading:
    """A text as a language model reads it. `owner`: for each token its word, −1 for those of none."""

    words: list[str]
    ids: Tensor  # int64 (1, S)
    attend: Tensor  # bool (1, S)
    owner: Tensor  # int64 (S,)

    def of(self, word: int) -> Tensor:
        """Where a word's tokens are, bool (S,)."""
        return self.owner == word


def _read(tokenizer: Any, text: str, length: int, *, padded: bool = False) -> _Reading:
    """Words are what blanks part; those beyond `length` tokens are cut."""
    clean = text.encode("utf-8", "replace").decode()  # lone surrogates
    spans = list(re.finditer(r"\S+", clean))
    made = tokenizer(
        clean, padding="max_length" if padded else False, truncation=True, max_length=length,
        return_offsets_mapping=True, return_tensors="pt",
    )  # fmt: skip
    owner = [
        next((j for j, word in enumerate(spans) if start < end and word.start() < end <= word.end()), -1)
        for start, end in made["offset_mapping"][0].tolist()
    ]
    words = [word.group() for word in spans[: max(owner) + 1]]
    return _Reading(words, made["input_ids"], made["attention_mask"].bool(), torch.tensor(owner))


# the synthesis model


@torch.inference_mode()
def attention_map(
    model: Synthesizer,
    text: str,
    *,
    source: np.ndarray | Image.Image | None = None,
    captioned: np.ndarray | Image.Image | None = None,
) -> tuple[list[str], np.ndarray]:
    """Attention between words and code cells, rolled out over the layers (Abnar & Zuidema 2020).

    What is asked decides who attends to whom, as heat lies where something is read for what is filled in:

      text alone        `generate`: every cell is masked; how much each cell reads of each word
      with `source`     `translate`: the same, and cells carry the source's code words
      with `captioned`  `caption`: each word is masked in turn; how much it reads of each cell

    Returns:
        N words, and float32 (N, g, g) in 0 … 1. Cells that read: over the words, a cell's values sum
        to at most 1. Words that read: a word's values do. The rest goes to itself and its like.
    """
    if source is not None and captioned is not None:
        raise ValueError("give a source (to translate) or a captioned picture, not both")
    language, grid = model.language, model.language.config.grid
    reading = _read(model.words.tokenizer, text, model.words.length, padded=True)
    ids, attend = reading.ids.to(model.device), reading.attend.to(model.device)
    count, first = len(reading.words), ids.shape[1]
    heat = torch.zeros(count, language.cells)
    with _eager(language.transformer):
        if captioned is not None:
            codes = _codes(model, captioned)
            for word in range(count):
                hidden = ids.masked_fill(reading.of(word).to(ids.device), language.mask_word)
                flow = _rollout(language, hidden, attend, codes, None)
                heat[word] = flow[:first][reading.of(word), first:].mean(0)
        elif count:
            source_codes = None if source is None else _codes(model, source)
            nothing = torch.full((1, language.cells, language.config.groups), MASKED, device=ids.device)
            flow = _rollout(language, ids, attend, nothing, source_codes)[first:, :first]
            for word in range(count):
                heat[word] = flow[:, reading.of(word)].sum(1)
    result: np.ndarray = heat.reshape(count, grid, grid).numpy()
    return reading.words, result


def _codes(model: Synthesizer, picture: np.ndarray | Image.Image) -> Tensor:
    """A picture's code words, int64 (1, K, G)."""
    return model.encode([picture] if isinstance(picture, Image.Image) else picture[None]).flatten(1, 2)


def _rollout(
    language: LanguageModel, words: Tensor, attend: Tensor, target: Tensor, source: Tensor | None
) -> Tensor:
    """Product over layers of (Ā + 1) / 2, Ā the mean over heads: float (S, S), each row sums to 1."""
    layers = language(words, attend, target, source, output_attentions=True).attentions
    if not layers or layers[0] is None:
        raise UserError(f"{language.config.language_model} gives no attentions: they cannot be shown")
    flow = torch.eye(layers[0].shape[-1])
    for layer in layers:
        flow = (layer[0].float().mean(0).cpu() @ flow + flow) / 2
    return flow


@contextmanager
def _eager(transformer: Any) -> Iterator[None]:
    """Attention that can be looked at, which fused kernels do not give; afterwards what was before.

    The setting is the model's own: another thread that runs it meanwhile has it too.
    """
    before = transformer.config._attn_implementation
    transformer.set_attn_implementation("eager")
    try:
        yield
    finally:
        transformer.set_attn_implementation(before)


# to look at


def overlay(picture: np.ndarray | Image.Image, heat: np.ndarray, alpha: float = 0.5) -> Image.Image:
    """A map (h, w) in 0 … 1 over a picture, as RGB of the picture's size.

    The picture is made grey, so that all colour is the map's.
    """
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    grey = image.convert("L").convert("RGB")
    colours = colormaps[_COLOURS](_resized(heat, *image.size).clip(0, 1), bytes=True)[..., :3]
    return Image.blend(grey, Image.fromarray(np.ascontiguousarray(colours)), alpha)


def saliency_sheet(
    picture: np.ndarray | Image.Image,
    heats: np.ndarray,
    captions: Sequence[str],
    *,
    columns: int = 4,
    cell: int = 160,
    title: str = "",
) -> Image.Image:
    """A picture beside its maps (N, h, w) with their captions; all maps share one scale, 0 to the highest."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    top = max(float(heats.max(initial=0)), _TINY)
    shown = [image, *(overlay(image, heat / top) for heat in heats)]
    return contact_sheet(shown, ["", *captions], columns, cell, title=title)


def _resized(heat: np.ndarray, width: int, height: int) -> np.ndarray:
    """A map (h, w) → float32 (height, width), bilinear."""
    small = Image.fromarray(np.asarray(heat, np.float32))
    return np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))
