"""Retrieval evaluation of any `Encoder`: fixed pools, controls, languages. Knows no Ray.

Every pool is text → picture with the caption as the query and one right picture; another
picture with the very same caption is no wrong answer, and no candidate. Beside each score
stand two controls: `random`, what chance gives in a pool of this size, and `shuffled`, the
same encoder with the captions dealt to wrong pictures (mean of five deals).

Pools:
  emoji          held-out names of the embedded collection (its test split), 192
  mixed          the same and the clip-art test split of openclipart: 576
  authors        pictures of openclipart authors of whom no picture was trained on
  <language>     names in another language, against the whole embedded collection, and
                 `<language>_held_out` against its test split
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from llmvis.augment import on_ground
from llmvis.data import EMOJI_LANGUAGES, load_emoji
from llmvis.data.openclipart import find_openclipart, load_openclipart
from llmvis.metrics import mean_and_spread, retrieval_scores, retrieval_summary, target_ranks
from llmvis.models.protocols import Encoder
from llmvis.recipe import PACKAGED_RECIPE
from llmvis.schema import UserError

SHUFFLES = 5


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure a model on held-out data and print its figures beside their controls.

    retrieval judges an encoder; reconstruct, translate, generate and caption a synthesis model; enhance the restorer.

    Examples:

      python -m jobs.evaluate --task retrieval --json retrieval.json

      python -m jobs.evaluate --task retrieval --encoder openai/clip-vit-base-patch32

      python -m jobs.evaluate --task retrieval --openclipart ~/.cache/llmvis/unpacked/openclipart

      python -m jobs.evaluate --task translate --html translate.html --json translate.json

      python -m jobs.evaluate --task enhance --html enhance.html --json enhance.json
    """

    task: Literal["retrieval", "reconstruct", "translate", "generate", "caption", "imagine", "enhance"]
    """What to measure."""
    encoder: str | None = None
    """Hugging Face name or local folder; default: the packaged two-tower model."""
    model: str | None = None
    """Folder of a synthesis model, for enhance one with restorer/; default: the packaged one."""
    recipe: str = str(PACKAGED_RECIPE)
    """YAML whose pairs `translate` judges; default: the packaged ones."""
    json: Path | None = None
    """File for the figures."""
    html: Path | None = None
    """Page with figures and the first 24 held-out pictures (not for retrieval)."""
    max_rows: int | None = None
    """Judge only so many held-out pictures of each set (a quick look; not for retrieval)."""
    actors: int = 0
    """Copies of the synthesis model that work at a time on Ray; 0: one, in this process."""
    gpus_per_actor: float = 0.0
    """GPUs for each copy."""
    openclipart: str | None = None
    """Folder of the unpacked Debian packages; default: the cache; without them, two pools are left out."""
    device: str = "cpu"
    """Where the model runs: cpu, cuda, cuda:1, …"""
    languages: tuple[str, ...] = ("en", "de", "fr", "es", "zh", "ja")
    """Languages whose names are asked of the whole embedded collection; also: it, ko, pt, ru."""


@dataclass(frozen=True)
class Pool:
    """Pictures and, for each, one query."""

    images: np.ndarray  # float32 (N, D)
    queries: list[str]

    def __add__(self, other: Pool) -> Pool:
        return Pool(np.concatenate([self.images, other.images]), self.queries + other.queries)


def evaluate_retrieval(config: EvaluateConfig, encoder: Encoder) -> dict[str, Any]:
    """All pools of one encoder.

    Returns:
        `r_at_1 …` and `controls` of the emoji pool at the top, and `splits`: pool name →
        the same with `pool` (its size); `skipped`: why a pool is missing.
    """
    unknown = set(config.languages) - {"en", *EMOJI_LANGUAGES}
    if unknown:
        raise UserError(
            f"no names in {', '.join(sorted(unknown))}: there are en, {', '.join(EMOJI_LANGUAGES)}"
        )
    emoji = load_emoji()
    embedded = embed_pictures(encoder, emoji)
    test = np.array([split == "test" for split in emoji["split"].to_pylist()])
    pools = {"emoji": Pool(embedded[test], emoji.filter(pa.array(test))["caption"].to_pylist())}
    skipped: dict[str, str] = {}
    if (root := find_openclipart(config.openclipart)) is None:
        skipped["mixed"] = skipped["authors"] = "openclipart is not at hand: pass --openclipart DIR"
    else:
        pools["mixed"] = pools["emoji"] + _pool(encoder, load_openclipart(root, "test"))
        pools["authors"] = _pool(encoder, load_openclipart(root, "authors"))
    splits = {name: score(encoder.encode_texts(p.queries), p.images, p.queries) for name, p in pools.items()}
    for language in config.languages:
        names = emoji["caption" if language == "en" else f"name_{language}"].to_pylist()
        asked, held = (
            encoder.encode_texts(names),
            [name for name, is_test in zip(names, test, strict=True) if is_test],
        )
        splits[language] = score(asked, embedded, names)
        splits[f"{language}_held_out"] = score(asked[test], embedded[test], held)
    return {
        "task": "retrieval",
        "encoder": encoder.info.name,
        "fingerprint": encoder.info.fingerprint,
        **splits["emoji"],
        "splits": splits,
        "skipped": skipped,
    }


def score(texts_ND: np.ndarray, images_ND: np.ndarray, queries: Sequence[str]) -> dict[str, Any]:
    """Metrics, pool size and controls; the right picture of query i is i."""
    size = len(queries)
    captions = np.array([query.lower() for query in queries])
    twins = (captions[:, None] == captions) & ~np.eye(size, dtype=bool)
    scores = np.where(twins, -np.inf, texts_ND @ images_ND.T)
    own = retrieval_summary(target_ranks(scores, np.arange(size)))
    controls = {"random": random_control(size), "shuffled": shuffled_control(texts_ND, images_ND)}
    return {"pool": size, **own, "controls": controls}


def random_control(size: int) -> dict[str, float]:
    """What a random order gives in a pool of `size`: exact, not sampled."""
    return retrieval_summary(np.arange(1, size + 1, dtype=np.float64))


def shuffled_control(texts_ND: np.ndarray, images_ND: np.ndarray) -> dict[str, float]:
    """The encoder's own scores against wrong pairs: mean over five fixed permutations."""
    deals = [np.random.default_rng(seed).permutation(len(texts_ND)) for seed in range(SHUFFLES)]
    mean = mean_and_spread([retrieval_scores(texts_ND, images_ND, deal) for deal in deals])
    return {name: value for name, value in mean.items() if not name.endswith("_sd")}


def embed_pictures(encoder: Encoder, table: pa.Table, batch: int = 64) -> np.ndarray:
    """Embeddings of a table's `image` column, transparency on white: float32 (N, D)."""
    out = []
    for chunk in table.select(["image"]).to_batches(max_chunksize=batch):
        pictures = [_opened(row["image"]["bytes"], encoder) for row in chunk.to_pylist()]
        out.append(encoder.encode_images(np.stack(pictures)))
    return np.concatenate(out)


def _pool(encoder: Encoder, table: pa.Table) -> Pool:
    return Pool(embed_pictures(encoder, table), table["caption"].to_pylist())


def _opened(data: bytes, encoder: Encoder) -> np.ndarray:
    return encoder.info.preprocess(on_ground(Image.open(io.BytesIO(data)).convert("RGBA"), (255, 255, 255)))


def table_rows(result: dict[str, Any]) -> Sequence[Sequence[str]]:
    """Lines for a terminal: pool, size, R@1, R@5, R@10, median rank, controls' R@10."""
    lines = []
    for name, scores in result["splits"].items():
        controls = scores["controls"]
        metrics = [f"{scores[m]:.1f}" for m in ("r_at_1", "r_at_5", "r_at_10", "median_rank")]
        shown = [f"{controls[c]['r_at_10']:.1f}" for c in ("random", "shuffled")]
        lines.append([name, str(scores["pool"]), *metrics, *shown])
    return lines


def write_json(result: dict[str, Any], file: Path) -> None:
    """Write figures; the folder is made if it is missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
