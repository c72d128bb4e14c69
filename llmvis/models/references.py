"""The nearest known drawing to a prompt, for a picture to begin from: retrieval for synthesis.

A small model that has seen two thousand drawings cannot draw a thing that it never saw; but it
can change a drawing of something near (retrieval-augmented synthesis, Blattmann 2022). Near is
the cosine of the language model's sentence embeddings of prompt and name, and of prompt and
name with keywords: no picture is looked at. The packaged retriever reads queries with the same
language model, so where it judges the results it is no independent judge of the choice.
Embeddings of the collection are made once and kept in the user's cache.
Knows no code words.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from llmvis.data import emoji_path, load_emoji
from llmvis.images import decode
from llmvis.models.language_model import language_model_folder
from llmvis.models.two_tower import TextEncoder

F32 = npt.NDArray[np.float32]


class References:
    """The packaged collection as drawings to begin from.

    Args:
        splits: of the collection; an evaluation on held-out names may use "train" only.
    """

    def __init__(self, splits: Sequence[str] = ("train", "validation", "test")) -> None:
        table = load_emoji()
        keep = [i for i, split in enumerate(table["split"].to_pylist()) if split in splits]
        self._images = table["image"].take(keep)
        self.names: list[str] = table["caption"].take(keep).to_pylist()
        words = table["keywords"].take(keep).to_pylist()
        self._worded = [
            f"{name}: {', '.join(more or ())}" for name, more in zip(self.names, words, strict=True)
        ]

    def nearest(self, prompts: Sequence[str]) -> list[int]:
        """For each prompt the number of the nearest drawing; the first of equals."""
        if not prompts:
            return []
        asked = self._embed(prompts)
        names, worded = self._known
        return [int(i) for i in (asked @ names.T + asked @ worded.T).argmax(1)]

    def picture(self, number: int) -> Image.Image:
        """A drawing, RGB on white."""
        return decode(self._images[number].as_py()["bytes"]).image

    @cached_property
    def _sentences(self) -> TextEncoder:
        return TextEncoder(language_model_folder())

    def _embed(self, texts: Sequence[str]) -> F32:
        return np.asarray(self._sentences(texts).numpy(), np.float32)

    @cached_property
    def _known(self) -> tuple[F32, F32]:
        """Embeddings of names, and of names with keywords: float32 (N, T) each."""
        key = hashlib.sha256(emoji_path().read_bytes())
        key.update("\n".join([*self.names, *self._worded]).encode())
        cache = Path(os.environ.get("LLMVIS_CACHE", Path.home() / ".cache" / "llmvis"))
        file = cache / f"references-{key.hexdigest()[:16]}.npy"
        if not file.exists():
            cache.mkdir(parents=True, exist_ok=True)
            partial = file.with_name(f".{uuid.uuid4().hex}.npy")
            np.save(partial, np.stack([self._embed(self.names), self._embed(self._worded)]))
            partial.replace(file)
        both = np.load(file, allow_pickle=False)
        return both[0], both[1]
