"""A real encoder that is small and fast: mean colours of a 4×4 grid. For tests of the engine."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from llmvis.cluster.jobs import Mapping, Pool, run_job
from llmvis.cluster.session import session
from llmvis.cluster.stages import Prepare
from llmvis.encode import LoadEncoder, ReadPictures
from llmvis.models.protocols import EncoderInfo
from llmvis.schema import encoded
from llmvis.sources import Source, open_reader, open_source

SIDE, GRID = 16, 4
COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}


@dataclass(frozen=True)
class Squash:
    side: int = SIDE

    def __call__(self, image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize((self.side, self.side)))


INFO = EncoderInfo(
    name="tiny", fingerprint=hashlib.sha256(b"tiny").hexdigest(), dim=GRID * GRID * 3, preprocess=Squash()
)


class TinyEncoder:
    """Writes a line `pid rows` a call into the file that TINY_CALLS names, and takes TINY_DELAY seconds."""

    info = INFO

    def encode_images(self, images: np.ndarray) -> np.ndarray:
        if calls := os.environ.get("TINY_CALLS"):
            with open(calls, "a") as file:
                file.write(f"{os.getpid()} {len(images)}\n")
        time.sleep(float(os.environ.get("TINY_DELAY", "0")))
        cells = images.astype(np.float32).reshape(len(images), GRID, SIDE // GRID, GRID, SIDE // GRID, 3)
        return unit(cells.mean(axis=(2, 4)).reshape(len(images), -1) - 127.0)

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """The colour words of a text, as a plain picture of their mean."""
        found = [
            [COLOURS[w] for w in text.lower().split() if w in COLOURS] or [(128, 128, 128)] for text in texts
        ]
        return self.encode_images(
            np.stack([np.broadcast_to(np.mean(f, axis=0), (SIDE, SIDE, 3)).astype(np.uint8) for f in found])
        )


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)


@dataclass(frozen=True)
class Watched:
    """Reads as it should, and notes the highest memory of its process (bytes, a line a shard) in `file`."""

    prepare: Prepare
    file: str

    def __call__(self, rows: pa.Table) -> Any:
        found = self.prepare(rows)
        with open(self.file, "a") as file:
            file.write(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}\n")
        return found


def load(model: str | None = None) -> TinyEncoder:
    return TinyEncoder()


def mapping(source: Source) -> Mapping:
    """Encoding with the tiny encoder, to the job engine."""
    return Mapping(
        job="encode",
        settings={"model": INFO.name, "model_fingerprint": INFO.fingerprint},
        about={
            "model": {"name": INFO.name, "fingerprint": INFO.fingerprint, "dim": INFO.dim, "licence": "none"}
        },
        prepare=ReadPictures(
            reader=open_reader(source.describe()),
            preprocess=INFO.preprocess,
            max_pixels=10**7,
            max_bytes=10**7,
        ),
        load=LoadEncoder(load=load, model=None, fingerprint=INFO.fingerprint),
        schema=encoded(INFO.dim, source.user_columns),
    )


def run(images: str, out: str, shard_items: int = 8) -> dict[str, object]:
    """The whole job on the Ray that is connected."""
    source = open_source(images)
    return run_job(mapping(source), source, out, Pool(shard_items=shard_items), quiet=True)


def pictures(folder: Path, count: int) -> list[str]:
    """Writes `count` small PNGs; returns their names as ids are made from."""
    rng = np.random.default_rng(0)
    names = [f"{i:05}.png" for i in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / name)
    return names


if __name__ == "__main__":  # a driver of its own, for tests that kill it
    with session(num_cpus=2):
        print(json.dumps(run(sys.argv[1], sys.argv[2])))
