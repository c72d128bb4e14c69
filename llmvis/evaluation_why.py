"""Grids for an evaluation's page that show why: where the retriever looks, and what cells heed which word."""

from __future__ import annotations

import numpy as np
from PIL import Image

from llmvis.explain import attention_map, grad_cam, overlay
from llmvis.models.synthesizer import Synthesizer
from llmvis.models.two_tower import TwoTowerEncoder
from llmvis.report import PictureGrid

SHOWN, WORDS = 12, 6


def saliency_grid(encoder: TwoTowerEncoder, pictures: np.ndarray, captions: list[str]) -> PictureGrid:
    """Grad-CAM of the image tower for each picture's own words; pictures `uint8 (N, S, S, 3)`."""
    pictures, captions = pictures[:SHOWN], captions[:SHOWN]
    ready = np.stack([encoder.info.preprocess(Image.fromarray(picture)) for picture in pictures])
    heat = grad_cam(encoder, ready, captions)
    side = pictures.shape[1] * 2
    large = [np.asarray(Image.fromarray(x).resize((side, side), Image.Resampling.BICUBIC)) for x in pictures]
    shown = np.stack([np.asarray(overlay(x, h)) for x, h in zip(large, heat, strict=True)])
    rows = [("picture", np.stack(large)), ("heat", shown)]
    return PictureGrid(title="why: where the retriever finds the words", rows=rows, captions=captions)


def attention_grid(model: Synthesizer, picture: np.ndarray, text: str) -> PictureGrid:
    """What each cell of a generated picture heeds of each of its words; picture `uint8 (S, S, 3)`."""
    words, heat = attention_map(model, text)
    words, heat = words[:WORDS], heat[:WORDS]
    side = picture.shape[0] * 2
    large = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
    top = max(float(heat.max()), 1e-9)
    shown = np.stack([np.asarray(large), *(np.asarray(overlay(large, h / top)) for h in heat)])
    return PictureGrid(
        title=f"why: attention to the words of “{text}”", rows=[("cells", shown)], captions=["", *words]
    )
