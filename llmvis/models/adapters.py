"""Any transformers model with `get_image_features` and `get_text_features` as an `Encoder`.

CLIP, SigLIP and the fixed-resolution SigLIP 2, Chinese-CLIP, AltCLIP, MetaCLIP 2, ALIGN and
others alike. Pictures arrive resized and cropped by the checkpoint's own processor
(processor.py); here they are rescaled and normalised on the device with that processor's
mean and standard deviation, so that both halves together equal the processor. Texts go
through the checkpoint's own tokenizer, cut to what its text tower takes.

It does not know files (load.py), Ray, or what to do with NaN: the job looks at that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from llmvis.models.processor import EncoderError, ProcessorPreprocess
from llmvis.models.protocols import EncoderInfo

_IMAGES_AT_ONCE, _IMAGES_AT_ONCE_GPU = 8, 128
_TEXTS_AT_ONCE = 128
_SIGLIP = ("siglip", "siglip2")
_OFFSET_POSITIONS = ("roberta", "camembert", "altclip")
"""Text towers of RoBERTa's kind count positions from `pad_token_id + 1`."""


class TransformersEncoder:
    """A checkpoint in a local folder, on one device; see `Encoder` for the contract."""

    def __init__(
        self, folder: Path, info: EncoderInfo, *, device: str = "cpu", dtype: str = "float32"
    ) -> None:
        """Load, and prove with a picture and a long text that the model is what `info` says.

        Raises:
            EncoderError: no embedding functions, weights missing from the file, or
                another dimension than `info.dim`.
        """
        self.info = info
        self.device = torch.device(device)
        self.dtype = getattr(torch, dtype)
        if not isinstance(self.dtype, torch.dtype):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
        self._model = _load_model(folder).to(device=self.device, dtype=self.dtype)
        self._tokenizer = _load_tokenizer(folder)
        config = self._model.config
        self._is_siglip = config.model_type in _SIGLIP
        self._max_tokens = _max_tokens(self._tokenizer, config)
        if not isinstance(info.preprocess, ProcessorPreprocess):
            raise TypeError("info.preprocess must be a ProcessorPreprocess")
        processor = info.preprocess.processor
        self._scale = float(processor.rescale_factor) if processor.do_rescale else 1.0
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
        self._mean = torch.as_tensor(mean, dtype=torch.float32, device=self.device).reshape(-1, 1, 1)
        self._std = torch.as_tensor(std, dtype=torch.float32, device=self.device).reshape(-1, 1, 1)
        self._prove()

    def encode_images(self, images: np.ndarray) -> np.ndarray:
        """`uint8 (B, H, W, 3)`, sized by `info.preprocess` → `float32 (B, D)`, unit norm."""
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images must be uint8 (B, H, W, 3), got {images.dtype} {images.shape}")
        found = np.zeros((len(images), self.info.dim), np.float32)
        batch = _IMAGES_AT_ONCE if self.device.type == "cpu" else _IMAGES_AT_ONCE_GPU
        for start in range(0, len(images), batch):
            rows = slice(start, start + batch)
            with torch.inference_mode():
                pixels = self._pixels(images[rows]).to(self.dtype)
                found[rows] = self._unit(self._model.get_image_features(pixel_values=pixels))
        return found

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """B texts → `float32 (B, D)`, unit norm, in the order given.

        A text longer than the text tower takes is cut. Texts for SigLIP are lower-cased, as
        its training texts were.
        """
        found = np.zeros((len(texts), self.info.dim), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # alike lengths pad little
        for start in range(0, len(order), _TEXTS_AT_ONCE):
            rows = order[start : start + _TEXTS_AT_ONCE]
            tokens = self._tokens([texts[i] for i in rows])
            with torch.inference_mode():
                found[rows] = self._unit(self._model.get_text_features(**tokens))
        return found

    def _pixels(self, images: np.ndarray) -> torch.Tensor:
        """`uint8 (B, H, W, 3)` → `float32 (B, 3, H, W)` on the device: the processor's second half."""
        if not images.flags.writeable:  # Ray's shared memory; torch warns of it
            images = images.copy()
        pixels = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2)
        return (pixels.float() * self._scale - self._mean) / self._std

    def _tokens(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        clean = [t.encode("utf-8", "replace").decode() for t in texts]  # lone surrogates
        options: dict[str, Any] = {"padding": True}
        if self._is_siglip:  # trained on lower-cased text, padded to the full length, without a mask
            clean = [t.lower() for t in clean]
            options = {"padding": "max_length", "return_attention_mask": False}
        tokens = self._tokenizer(
            clean, truncation=True, max_length=self._max_tokens, return_tensors="pt", **options
        )
        return {name: tensor.to(self.device) for name, tensor in tokens.items()}

    def _unit(self, output: Any) -> np.ndarray:
        """A tensor or transformers 5's output object → `float32 (B, D)` with rows of length 1."""
        features = output if isinstance(output, torch.Tensor) else output.pooler_output
        unit = torch.nn.functional.normalize(features.float(), dim=-1)
        array: np.ndarray = unit.cpu().numpy()
        return array

    def _prove(self) -> None:
        """One picture and one text beyond any limit: dimensions agree, nothing overflows."""
        assert isinstance(self.info.preprocess, ProcessorPreprocess)
        picture = torch.from_numpy(self.info.preprocess(_grey())[None])
        with torch.inference_mode():
            pixels = self._pixels(picture.numpy()).to(self.dtype)
            image = self._unit(self._model.get_image_features(pixel_values=pixels))
            text = self._unit(self._model.get_text_features(**self._tokens(["a word " * 2000])))
        if not image.shape == text.shape == (1, self.info.dim):
            raise EncoderError(
                f"{self.info.name}: config.json says {self.info.dim} dimensions, but the model gives "
                f"{image.shape[1]} for pictures and {text.shape[1]} for texts"
            )


def _grey() -> Any:
    from PIL import Image

    return Image.new("RGB", (64, 64), (128, 128, 128))


def _load_model(folder: Path) -> Any:
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model, report = AutoModel.from_pretrained(
            folder,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except SafetensorError as e:
        raise EncoderError(f"{folder}: the weights can't be read ({e}); copy the checkpoint again") from e
    finally:
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    kind = type(model).__name__
    for function in ("get_image_features", "get_text_features"):
        if not callable(getattr(model, function, None)):
            raise EncoderError(
                f"{folder} holds a {kind}, which has no {function}; give a CLIP-like checkpoint"
            )
    wrong = sorted(report["missing_keys"]) + sorted(str(k) for k in report.get("mismatched_keys", ()))
    if wrong:
        raise EncoderError(
            f"{folder}: the file lacks {len(wrong)} of the weights of {kind}, such as {wrong[0]}; "
            "transformers would fill them with random numbers. Give the whole checkpoint"
        )
    return model.eval().requires_grad_(False)


def _load_tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as e:  # a missing package, a file that is cut off; tokenizers raises plain Exception
        raise EncoderError(
            f"{folder}: its tokenizer can't be loaded: {' '.join(str(e).split())[:400]}"
        ) from e


def _max_tokens(tokenizer: Any, config: Any) -> int:
    """Tokens that both the tokenizer and the position embeddings of the text tower allow."""
    text = getattr(config, "text_config", config)
    limit = int(getattr(text, "max_position_embeddings", 512))
    if any(word in str(text.model_type) for word in _OFFSET_POSITIONS):
        limit -= int(text.pad_token_id or 0) + 1
    return min(limit, int(tokenizer.model_max_length))
