"""A Hugging Face checkpoint's own image processor as a `Preprocess`: resize and crop, on the CPU.

Rescaling and normalising are left out: they happen on the device (adapters.py), so a picture
travels as `uint8` and a quarter of the bytes. The object carries the processor's settings
and no path, so it works on a node that has never seen the checkpoint; transformers is
imported at its first call, in the task. Pillow does the work; torchvision is not needed.

It does not know models or weights, and importing it imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llmvis.models.files import open_pretrained
from llmvis.schema import UserError

_LONGEST = 32
"""Aspect ratio above which a picture is cut around its centre before a processor that resizes
the shortest edge and crops the centre: 1 x 60000 pixels would else become 224 x 13 million."""


class EncoderError(UserError):
    """A checkpoint that can't be used; the message says why, and what to do."""


class ProcessorPreprocess:
    """RGB picture of any size → `uint8 (H, W, 3)` by a checkpoint's own resize and crop."""

    def __init__(self, settings: Mapping[str, Any], model_type: str) -> None:
        """`settings`: the content of preprocessor_config.json; `model_type`: of config.json."""
        self.settings = dict(settings)
        self.model_type = model_type
        self._loaded: Any = None
        refused = {"max_num_patches", "min_pixels", "max_pixels"} & self.settings.keys()
        if refused:
            raise EncoderError(self._refusal(f"it cuts pictures into patches ({', '.join(sorted(refused))})"))

    @classmethod
    def from_folder(cls, folder: Path, model_type: str) -> ProcessorPreprocess:
        """Settings from a saved checkpoint, of transformers 4 (a file) or 5 (in processor_config.json).

        Raises:
            EncoderError: no image processor there, or one that gives no fixed-size picture.
        """
        for name, key in (("processor_config.json", "image_processor"), ("preprocessor_config.json", None)):
            file = folder / name
            if file.is_file():
                content = json.loads(file.read_text("utf-8"))
                settings = content.get(key) if key else content
                if settings:
                    return cls(settings, model_type)
        raise EncoderError(
            f"{folder} has no image processor (preprocessor_config.json or processor_config.json); "
            "save the model's own there: AutoProcessor.from_pretrained(…).save_pretrained(folder)"
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaded": None}

    @property
    def processor(self) -> Any:
        """The transformers image processor (Pillow back end), loaded at first use.

        Raises:
            EncoderError: its output is no `uint8` picture of one size.
        """
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _load(self) -> Any:
        from transformers import AutoImageProcessor

        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "preprocessor_config.json").write_text(json.dumps(self.settings))
            Path(folder, "config.json").write_text(json.dumps({"model_type": self.model_type}))
            try:
                processor = open_pretrained(AutoImageProcessor, Path(folder), backend="pil")
            except UserError as error:
                raise EncoderError(
                    self._refusal(
                        "transformers has no such class, and llmvis runs no program of a checkpoint's own"
                    )
                ) from error
        shapes = set()
        for width, height in ((50, 90), (300, 200)):
            output = processor(
                Image.new("RGB", (width, height)), do_rescale=False, do_normalize=False, return_tensors="np"
            )
            if set(output) - {"pixel_values"}:
                raise EncoderError(self._refusal(f"it gives {', '.join(sorted(output))}"))
            pixels = output["pixel_values"]
            if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:2] != (1, 3):
                raise EncoderError(self._refusal(f"it gives {pixels.dtype} {pixels.shape}"))
            shapes.add(pixels.shape)
        if len(shapes) > 1:
            raise EncoderError(self._refusal("the size of its output depends on the picture"))
        return processor

    @property
    def side(self) -> int:
        """The largest number among the processor's sizes, pixels: no smaller picture would do."""
        if self.settings.get("do_resize") is False:
            return 2**30  # it crops from the pixels as they are
        sizes = [self.settings.get("size") or 224]
        if self.settings.get("do_center_crop") is not False:
            sizes.append(self.settings.get("crop_size"))
        numbers = [n for size in sizes for n in (size.values() if isinstance(size, dict) else [size])]
        return max(int(n) for n in numbers if n is not None)

    def _refusal(self, why: str) -> str:
        kind = self.settings.get("image_processor_type") or self.settings.get("feature_extractor_type")
        return (
            f"the image processor {kind or 'of ' + self.model_type} can't be used: {why}. "
            "It must resize and crop to one fixed size, like CLIPImageProcessor and SiglipImageProcessor "
            "(of SigLIP 2: the checkpoints with a resolution in their name, not NaFlex)"
        )

    def __call__(self, image: Image.Image) -> np.ndarray:
        """RGB picture → `uint8 (H, W, 3)`, the same H and W for every picture."""
        processor = self.processor
        if processor.do_center_crop and processor.size.get("shortest_edge"):
            image = _centre(image)
        output = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
        pixels: np.ndarray = output["pixel_values"][0]
        return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def _centre(image: Image.Image) -> Image.Image:
    width, height = image.size
    longest = _LONGEST * min(width, height)
    if max(width, height) <= longest:
        return image
    left, top = max(width - longest, 0) // 2, max(height - longest, 0) // 2
    return image.crop((left, top, left + min(width, longest), top + min(height, longest)))
