"""For tests of synthesis: an untrained model of 32 px, and a fast translator whose processes can be killed."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from llmvis.cluster.jobs import Mapping, Pool, run_job
from llmvis.cluster.session import session
from llmvis.export import pack_parquet
from llmvis.ledger import Packing
from llmvis.made import made_schema
from llmvis.models.protocols import SynthesisInfo
from llmvis.sources import open_reader, open_source
from llmvis.sources.variants import VariantSource
from llmvis.translate import LoadTranslator, ReadSources

INFO = SynthesisInfo(name="tint", fingerprint=hashlib.sha256(b"tint").hexdigest(), side=8, licence="none")
INSTRUCTIONS = ("tint it", "shade it", "colour it")


def save(folder: Path) -> str:
    """An untrained `Synthesizer` with the packaged language model."""
    import torch

    from llmvis.models.language import LanguageConfig
    from llmvis.models.synthesizer_files import new_language, save_language
    from llmvis.models.tokenizer import ImageTokenizer
    from llmvis.models.tokenizer_files import save_tokenizer
    from llmvis.presets import tiny

    torch.manual_seed(0)
    tokenizer = ImageTokenizer(tiny().tokenizer).eval()
    language, _ = new_language(LanguageConfig.of(tokenizer.config, words=12), tokenizer)
    save_tokenizer(tokenizer, folder / "tokenizer")
    save_language(language, folder / "language", tokenizer)
    return str(folder)


def kill_once(file: str) -> None:
    """Kills this process, if it is the first to come here; the file tells that it did."""
    try:
        os.close(os.open(file, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


class Tint:
    """Adds a colour that depends on instruction, seed and id; dies once at its `dies_at`-th call."""

    info = INFO

    def __init__(self, kills: str, dies_at: int) -> None:
        self._kills, self._left = kills, dies_at

    def translate(
        self, pictures: np.ndarray, instructions: Sequence[str], *, seeds: Sequence[int], ids: Sequence[str],
        masks: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        self._left -= 1
        if self._left == 0:
            kill_once(f"{self._kills}/actor")
        keys = [f"{t}/{s}/{i}".encode() for t, s, i in zip(instructions, seeds, ids, strict=True)]
        tints = [np.frombuffer(hashlib.sha256(key).digest()[:3], np.uint8) for key in keys]
        return pictures + np.stack(tints)[:, None, None]


@dataclass(frozen=True)
class DeadlyPack:
    """Packs as jobs do; its process dies once, at the file with row `row`."""

    kills: str
    row: str

    def __call__(self, table: pa.Table) -> bytes:
        if self.row in table["source"].to_pylist():
            kill_once(f"{self.kills}/writer")
        return pack_parquet(table)


def run(images: str, out: str, kills: str, seed: int) -> None:
    """200 or so pictures × 3 instructions × 2 seeds; the seed says where actor and writer die."""
    chance = np.random.default_rng(seed)
    source = VariantSource(open_source(images), instructions=INSTRUCTIONS, seeds=(0, 1))
    mapping = Mapping(
        job="translate",
        settings={"model_fingerprint": INFO.fingerprint},
        about={"model": {"name": INFO.name, "fingerprint": INFO.fingerprint}},
        prepare=ReadSources(
            reader=open_reader(source.describe()), masks=None, side=INFO.side, whole=False,
            max_pixels=10**6, max_bytes=10**6,
        ),
        load=LoadTranslator(
            load=partial(Tint, kills, int(chance.integers(2, 20))), info=INFO, region=None, cut=False
        ),
        schema=made_schema([]),
        packing=Packing(ending="parquet", pack=DeadlyPack(kills, f"{int(chance.integers(20, 180)):05}.png")),
    )  # fmt: skip
    run_job(mapping, source, out, Pool(shard_items=32), quiet=True)


if __name__ == "__main__":  # a driver of its own, for tests that kill it
    with session(num_cpus=2):
        run(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
