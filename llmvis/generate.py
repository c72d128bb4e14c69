"""Prompts → pictures, as the job engine wants it: `ReadPrompts` on CPUs, `Generate` in actors.

Knows no Ray and no concrete model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from llmvis.made import made_table, on_the_way, picture_columns, png_bytes
from llmvis.models.protocols import Generator, SynthesisInfo
from llmvis.scene import cutout
from llmvis.sources.prompts import ADDED
from llmvis.translate import check_loaded

Row = dict[str, Any]
BATCH = 8
"""Prompts that go to a generator at once."""


@dataclass(frozen=True, kw_only=True)
class ReadPrompts:
    """Listing rows as they are: a prompt has nothing to be read."""

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, npt.NDArray[np.uint8], list[Row], dict[str, float]]:
        table = on_the_way(rows.to_pylist(), rows.schema, [])
        return table, np.zeros((rows.num_rows, 0), np.uint8), [], {"read": 0.0, "decode": 0.0}


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Rows with prompts → made rows (`made.made_schema`); `cut`: cut out from the white ground."""

    generator: Generator
    cut: bool

    def __call__(self, rows: pa.Table, arrays: npt.NDArray[np.uint8]) -> tuple[pa.Table, list[Row]]:
        listed, made, info = rows.to_pylist(), list[Row](), self.generator.info
        for at in range(0, len(listed), BATCH):
            batch = listed[at : at + BATCH]
            pictures = self.generator.generate(
                [row["prompt"] for row in batch],
                negatives=[row["negative"] for row in batch],
                seeds=[row["seed"] for row in batch],
                ids=[row["prompt"] for row in batch],
            )
            for row, picture in zip(batch, pictures, strict=True):
                ready = np.asarray(cutout(Image.fromarray(picture))) if self.cut else picture
                known = {"model": info.name, "model_fingerprint": info.fingerprint}
                made.append({**row, **picture_columns(row["id"], png_bytes(ready)), **known})
        return made_table(made, rows, ADDED), []


@dataclass(frozen=True, kw_only=True)
class LoadGenerator:
    """Loads the model in the actor, from a name: weights are never sent around."""

    load: Callable[[], Generator]
    info: SynthesisInfo
    cut: bool

    def __call__(self) -> Generate:
        generator = self.load()
        check_loaded(generator.info, self.info)
        return Generate(generator=generator, cut=self.cut)
