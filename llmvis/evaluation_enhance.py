"""Scores of the restorer on held-out drawings that were spoilt here, each task beside its controls.

  denoise  Gaussian noise of standard deviation 25 of 255; controls: as it is, a 3 × 3 median
  deblur   Gaussian blur of 1.2 px; controls: as it is, unsharp masking
  enlarge  half the size by bicubic resampling, and back; controls: pixels doubled, bicubic, Lanczos

Pictures are the test groups of the embedded collection (Noto emoji) on white, at 128 px. The network was
trained on other drawings of that hand and of OpenMoji and on these very kinds of spoiling, so the figures
say what it can do at best; they say nothing of photographs. Knows no Ray.

Shape legend: N pictures, S side in pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from llmvis.degrade import blurred, halved, noisy
from llmvis.enhance import TASKS, Task
from llmvis.evaluation_synthesis import SHOWN, distortion, held_out
from llmvis.models.protocols import PictureRestorer
from llmvis.pictures import load_collection
from llmvis.recipe import Collection
from llmvis.report import PictureGrid

SIDE = 128
STRENGTHS: dict[Task, str] = {
    "denoise": "noise of 25 of 255",
    "deblur": "blur of 1.2 px",
    "enlarge": "bicubic half",
}
Filter = Callable[[Image.Image], Image.Image]
CONTROLS: dict[Task, dict[str, Filter]] = {
    "denoise": {"median": lambda image: image.filter(ImageFilter.MedianFilter(3))},
    "deblur": {"unsharp": lambda image: image.filter(ImageFilter.UnsharpMask(1, 300, 0))},
    "enlarge": {
        "bicubic": lambda image: _twice(image, Image.Resampling.BICUBIC),
        "lanczos": lambda image: _twice(image, Image.Resampling.LANCZOS),
    },
}
"""What needs no learning; of unsharp masking the radius and amount that were best on validation pictures."""


def evaluate_enhance(restorer: PictureRestorer, most: int | None = None) -> dict[str, Any]:
    """Every task; at the top the means over tasks, where the control `classic` is the best of each task's filters."""
    everything = load_collection(Collection(name="noto", images="emoji"), SIDE)
    real, captions = held_out(everything, most)
    splits, grids = dict[str, dict[str, Any]](), list[PictureGrid]()
    for task in TASKS:
        spoilt = spoil(real, task)
        begun = time.perf_counter()
        made = np.stack([restorer.restore(picture, task) for picture in spoilt])
        seconds = (time.perf_counter() - begun) / len(real)
        as_it_is = (
            spoilt if task != "enlarge" else _each(spoilt, lambda x: _twice(x, Image.Resampling.NEAREST))
        )
        others = {"degraded": as_it_is} | {
            name: _each(spoilt, change) for name, change in CONTROLS[task].items()
        }
        splits[task] = distortion(made, real) | {
            "pool": len(real),
            "strength": STRENGTHS[task],
            "seconds": seconds,
            "controls": {name: distortion(x, real) for name, x in others.items()},
        }
        shown = others | {"made": made, "real": real}
        rows = [(name, x[:SHOWN]) for name, x in shown.items()]
        grids.append(PictureGrid(title=f"{task}: {STRENGTHS[task]}", rows=rows, captions=captions[:SHOWN]))
    return {"task": "enhance", **_means(list(splits.values())), "splits": splits, "grids": grids}


def spoil(real: np.ndarray, task: Task) -> np.ndarray:
    """`uint8 (N, S, S, 3)` → what the restorer is to undo, the same on every run; half the size for "enlarge"."""
    pictures = torch.tensor(real).permute(0, 3, 1, 2).float() / 255
    if task == "denoise":
        normal = torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
        pictures = noisy(pictures, normal, torch.full((len(real),), 25.0))
    elif task == "deblur":
        pictures = blurred(pictures, torch.full((len(real),), 1.2))
    else:
        pictures = halved(pictures)
    return np.ascontiguousarray((pictures * 255).round().byte().permute(0, 2, 3, 1).numpy())


def _twice(image: Image.Image, how: Image.Resampling) -> Image.Image:
    return image.resize((2 * image.width, 2 * image.height), how)


def _each(pictures: np.ndarray, change: Filter) -> np.ndarray:
    return np.stack([np.asarray(change(Image.fromarray(picture))) for picture in pictures])


def _means(splits: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over tasks of the scores, and of those of the input and of the best filter by PSNR."""
    names = ("psnr", "ssim", "l1")
    inputs = [split["controls"]["degraded"] for split in splits]
    best = [
        max(
            (c for name, c in split["controls"].items() if name != "degraded"), key=lambda c: float(c["psnr"])
        )
        for split in splits
    ]
    means = [
        {name: float(np.mean([row[name] for row in rows])) for name in names}
        for rows in (splits, inputs, best)
    ]
    seconds = float(np.mean([split["seconds"] for split in splits]))
    return {**means[0], "seconds": seconds, "controls": {"degraded": means[1], "classic": means[2]}}
