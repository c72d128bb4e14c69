"""Does it help a search to make pictures of the query first? R@k with and without, on held-out names.

The pool is the held-out pictures of the embedded collection, the queries their names. Pictures
are made as `llmvis search --imagine` makes them, but from known drawings of the training split
only. Beside text alone stand the known drawings as they are, and pictures of other names. Knows no Ray.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmvis.evaluation_synthesis import Judge, Rows, Synthesise, held_out
from llmvis.images import square
from llmvis.metrics import retrieval_scores
from llmvis.models.references import References
from llmvis.models.synthesizer import BEGUN
from llmvis.pictures import load_collection
from llmvis.recipe import Collection
from llmvis.report import PictureGrid

WEIGHTS = (0.25, 0.5, 1.0)
VARIANTS = 2
SHOWN = 24


def evaluate_imagine(side: int, run: Synthesise, judge: Judge, most: int | None = None) -> dict[str, Any]:
    """`r_at_…` of the best of `WEIGHTS` by R@10; `ways` has each, `controls` text alone and others."""
    real, captions = held_out(load_collection(Collection(name="noto", images="emoji"), side), most)
    references = References(("train",))
    known = np.stack([np.asarray(square(references.picture(n), side)) for n in references.nearest(captions)])
    texts, pool = judge.encoder.encode_texts(captions), judge.embed(real)
    vectors = []
    for seed in range(VARIANTS):
        asked = Rows(list(captions), known, [seed] * len(captions), BEGUN)
        made = np.stack(run("generate", asked))
        vectors.append(judge.embed(made))
    imagined = np.mean(vectors, 0)

    def judged(pictures: np.ndarray | None, weight: float) -> dict[str, float]:
        asked = texts if pictures is None else texts + weight * pictures
        return retrieval_scores(asked / np.linalg.norm(asked, axis=1, keepdims=True), pool)

    ways = {f"weight_{weight:g}": judged(imagined, weight) for weight in WEIGHTS}
    best = max(ways, key=lambda way: ways[way]["r_at_10"])
    controls = {
        "text_alone": judged(None, 0),
        "known_drawing": judged(judge.embed(known), 0.5),
        "shuffled": judged(np.roll(imagined, 1, 0), 0.5),
    }
    grid = PictureGrid(
        title="imagined, and what was looked for",
        rows=[("imagined", made[:SHOWN]), ("real", real[:SHOWN])],
        captions=captions[:SHOWN],
    )
    return {
        "task": "imagine", "pool": len(real), "best": best, **ways[best], "variants": VARIANTS, "ways": ways,
        "controls": controls, "grids": [grid],
    }  # fmt: skip
