"""Scores of a synthesis model on held-out drawings: four tasks, each beside its controls.

  reconstruct  pictures → code words → pictures
  translate    line art → colour, Noto → Twemoji
  generate     held-out names → pictures; found again by text, and how far from real ones
  caption      pictures → words

Held out are the test groups of the embedded collection in every hand. The Fréchet distance
is taken on EfficientNet-Lite0's pooled features (`fd_lite0`; it is not Inception's FID), and
the floor beside it is the distance of real pictures from real ones. Knows no Ray: who runs
the model is told by a `Synthesise`.

Shape legend: N pictures, S side in pixels, F features.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchmetrics.functional.image import structural_similarity_index_measure

from llmvis.evaluation import score
from llmvis.images import square
from llmvis.metrics import psnr, retrieval_scores
from llmvis.models.protocols import Encoder
from llmvis.models.references import References
from llmvis.models.sampling import Sampling
from llmvis.models.synthesizer import BEGUN, FAITHFUL, REFERENCE, SAMPLED, Synthesizer
from llmvis.models.two_tower import TwoTower
from llmvis.pictures import Pictures, load_collection, load_pairs, on_white
from llmvis.recipe import Collection, Pairs, Recipe
from llmvis.report import FigureTable, PictureGrid
from llmvis.schema import UserError
from llmvis.synthesis_data import instructed

SHOWN = 24
"""Held-out pictures on a page: the first ones, not picked."""


METRICS = (
    "psnr",
    "ssim",
    "l1",
    "fd_lite0",
    "token_accuracy",
    "r_at_1",
    "r_at_5",
    "r_at_10",
    "median_rank",
    "seconds",
)


@dataclass
class Rows:
    """What a model is asked: the arguments of one of `Synthesizer`'s methods, row by row."""

    texts: list[str] = field(default_factory=list)
    pictures: np.ndarray | None = None  # uint8 (N, S, S, 3)
    seeds: list[int] = field(default_factory=list)
    how: Sampling = SAMPLED

    def __len__(self) -> int:
        return len(self.texts) if self.pictures is None else len(self.pictures)

    def part(self, at: slice) -> Rows:
        """Some of the rows."""
        some = None if self.pictures is None else self.pictures[at]
        return Rows(self.texts[at], some, self.seeds[at], self.how)


Synthesise = Callable[[str, Rows], list[Any]]
"""`(task, rows)` → one result a row: a picture `uint8 (S, S, 3)`, or a caption."""


def run_rows(model: Synthesizer, task: str, rows: Rows) -> list[Any]:
    """A `Synthesise` in this process, once its model is given."""
    if task == "reconstruct":
        assert rows.pictures is not None
        return list(model.decode(model.encode(rows.pictures)))
    if task == "translate":
        assert rows.pictures is not None
        return list(model.translate(rows.pictures, rows.texts, seeds=rows.seeds, how=rows.how))
    if task == "generate":
        begin = None if rows.pictures is None else [Image.fromarray(x) for x in rows.pictures]
        return list(model.generate(rows.texts, seeds=rows.seeds, how=rows.how, begin=begin))
    assert rows.pictures is not None
    return list(model.caption(rows.pictures))


@dataclass
class Judge:
    """What pictures are judged with: the retriever, and the features of its trunk."""

    encoder: Encoder
    model: TwoTower

    def embed(self, pictures: np.ndarray) -> np.ndarray:
        """`uint8 (N, S, S, 3)` → float32 (N, D)."""
        side = self.encoder.info.preprocess
        ready = np.stack([side(Image.fromarray(picture)) for picture in pictures])
        return self.encoder.encode_images(ready)

    @torch.inference_mode()
    def features(self, pictures: np.ndarray) -> np.ndarray:
        """`uint8 (N, S, S, 3)` → pooled features of the trunk, float64 (N, F)."""
        out = []
        for at in range(0, len(pictures), 16):
            images = (
                torch.from_numpy(np.ascontiguousarray(pictures[at : at + 16])).permute(0, 3, 1, 2).float()
            )
            images = torch.nn.functional.interpolate(images, (224, 224), mode="bilinear", antialias=True)
            out.append(self.model.trunk(images).pooled.double().numpy())
        return np.concatenate(out)


def frechet_distance(one_NF: np.ndarray, other_NF: np.ndarray) -> float:
    """Fréchet distance of two Gaussians fitted to features (Heusel 2017).

    |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½). The trace of the root is the sum of the roots of the
    eigenvalues of Σ₁Σ₂, which are those of the small matrix A Aᵀ with A = X₁ X₂ᵀ where there are
    fewer pictures than features.
    """
    means = one_NF.mean(0) - other_NF.mean(0)
    x, y = ((z - z.mean(0)) / np.sqrt(max(1, len(z) - 1)) for z in (one_NF, other_NF))
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    return float(means @ means + (x**2).sum() + (y**2).sum() - 2 * cross)


def distortion(made: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Mean over pictures of PSNR in dB, SSIM (Wang 2004) and L1 in 0 … 1; both `uint8 (N, S, S, 3)`."""
    a, b = (torch.from_numpy(x.astype(np.float32) / 255).permute(0, 3, 1, 2) for x in (made, real))
    ssim = structural_similarity_index_measure(a, b, data_range=1.0)
    assert isinstance(ssim, torch.Tensor)
    l1 = float((a - b).abs().mean())
    return {"psnr": float(psnr(a.numpy(), b.numpy()).mean()), "ssim": float(ssim), "l1": l1}


def held_out(pictures: Pictures, most: int | None) -> tuple[np.ndarray, list[str]]:
    """Test pictures on white, `uint8 (N, S, S, 3)`, and their captions; raises `UserError` where there is none."""
    rows = pictures.where("test")[:most]
    if not len(rows):
        raise UserError(
            f"of {len(pictures.rows)} pictures none is held out for a test: of your own collections it is one "
            "picture in twenty, so give more"
        )
    return on_white(np.array(pictures.pixels[rows])), [pictures.rows[i].caption for i in rows]


def spread(pictures: np.ndarray, most: int) -> np.ndarray:
    """As many pictures, spread over all."""
    return np.asarray(pictures[np.linspace(0, len(pictures) - 1, min(most, len(pictures))).astype(int)])


def nearest(sources: np.ndarray, known: np.ndarray) -> np.ndarray:
    """For each of `sources` the row of `known` that is nearest in pixels: int64 (N,)."""
    a, b = (x.reshape(len(x), -1).astype(np.float32) / 255 for x in (sources, known))
    return np.asarray(((a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)).argmin(1))


def commonest(texts: Sequence[str]) -> str:
    """The text that is there most often, the first of them where several are."""
    return Counter(texts).most_common(1)[0][0]


def evaluate_reconstruct(side: int, run: Synthesise, judge: Judge, most: int | None = None) -> dict[str, Any]:
    """Each hand of the embedded collection; `psnr` at the top is the mean over hands."""
    splits, grids = {}, []
    for name in ("emoji", "twemoji", "openmoji", "openmoji-line", "fluent-flat"):
        everything = load_collection(Collection(name=name, images=name), side)
        real, captions = held_out(everything, most)
        begun = time.perf_counter()
        made = np.stack(run("reconstruct", Rows(pictures=real)))
        seconds = (time.perf_counter() - begun) / len(real)
        known = on_white(np.array(everything.pixels[everything.where("train")]))
        real_features = judge.features(real)
        scored = {
            kind: distortion(x, real) | {"fd_lite0": frechet_distance(judge.features(x), real_features)}
            for kind, x in (
                ("made", made),
                ("constant", np.broadcast_to(known.mean(0).astype(np.uint8), real.shape)),
                ("nearest", known[nearest(real, known)]),
                ("shuffled", np.roll(made, 1, 0)),
            )
        }
        splits[name] = scored.pop("made") | {"pool": len(real), "seconds": seconds, "controls": scored}
        grids.append(
            _grid(f"reconstruct: {name}", [("real", real[:SHOWN]), ("made", made[:SHOWN])], captions[:SHOWN])
        )
    return _summed("reconstruct", splits) | {"grids": grids}


def evaluate_translate(
    side: int, run: Synthesise, judge: Judge, recipe: Recipe, most: int | None = None
) -> dict[str, Any]:
    """Each of the recipe's pairs, with words and without, expected and sampled."""
    splits, grids = {}, []
    for part in recipe.pairs:
        before, after = load_pairs(part, side)
        (source, captions), (real, _) = held_out(before, most), held_out(after, most)
        told = [instructed(part.instructions[-1], caption) for caption in captions]
        real_features = judge.features(real)
        made, seconds = {}, {}
        for name, texts, how in _ways(told, part):
            begun = time.perf_counter()
            rows = Rows(texts, source, list(range(len(source))), how)
            made[name] = np.stack(run("translate", rows))
            seconds[name] = (time.perf_counter() - begun) / len(source)
        train = before.where("train")
        known = on_white(np.array(before.pixels[train]))
        answers = on_white(np.array(after.pixels[train]))
        others = {
            "copy": source,
            "constant": np.full_like(real, 255),
            "nearest": answers[nearest(source, known)],
            "shuffled": np.roll(made["translated"], 1, 0),
        }
        scored = {
            name: distortion(x, real) | {"fd_lite0": frechet_distance(judge.features(x), real_features)}
            for name, x in (made | others).items()
        }
        splits[part.name] = scored.pop("translated") | {
            "pool": len(real),
            "seconds": seconds["translated"],
            "fd_lite0_floor": frechet_distance(judge.features(spread(answers, len(real))), real_features),
            "ways": {
                name: scored.pop(name) | {"seconds": seconds[name]} for name in made if name != "translated"
            },
            "controls": scored,
        }
        shown = [
            ("source", source),
            ("made", made["translated"]),
            ("sampled", made["sampled"]),
            ("real", real),
        ]
        grids.append(_grid(f"translate: {part.name}", [(n, x[:SHOWN]) for n, x in shown], captions[:SHOWN]))
    return _summed("translate", splits) | {"grids": grids}


def _ways(told: list[str], part: Pairs) -> list[tuple[str, list[str], Sampling]]:
    plain = instructed(part.instructions[0], "")
    return [
        ("translated", told, FAITHFUL),
        ("without_caption", [plain] * len(told), FAITHFUL),
        ("sampled", told, Sampling(steps=8, guidance=0.0)),
    ]


def evaluate_generate(
    side: int, run: Synthesise, judge: Judge, style: str = "Noto emoji", most: int | None = None
) -> dict[str, Any]:
    """Held-out names → pictures, judged by text search among them; real pictures are the ceiling.

    Made as users get them, from the nearest known drawing (of the training split), and from words
    alone. `reference` among the controls is that drawing as it is: what is not better than it owes
    its rank to the choice of the drawing. `changed` is 1 − SSIM of a made picture with its drawing.
    """
    everything = load_collection(Collection(name="noto", images="emoji"), side)
    real, captions = held_out(everything, most)
    known = on_white(np.array(everything.pixels[everything.where("train")]))
    references = References(("train",))
    begin = np.stack(
        [np.asarray(square(references.picture(number), side)) for number in references.nearest(captions)]
    )
    seeds = list(range(len(captions)))
    asked = [f"{caption}, {style}" for caption in captions]
    begun = time.perf_counter()
    made = np.stack(run("generate", Rows(asked, begin, seeds, BEGUN)))
    seconds = (time.perf_counter() - begun) / len(captions)
    from_words = np.stack(run("generate", Rows(asked, None, seeds)))
    wordless = np.stack(run("generate", Rows([""] * len(captions), None, seeds)))
    texts = judge.encoder.encode_texts(captions)
    real_features = judge.features(real)

    def judged(pictures: np.ndarray) -> dict[str, float]:
        found = retrieval_scores(texts, judge.embed(pictures))
        return found | {"fd_lite0": frechet_distance(judge.features(pictures), real_features)}

    own = score(texts, judge.embed(made), captions)
    controls = own.pop("controls") | {
        "reference": judged(begin), "without_words": judged(wordless), "real": judged(real),
    }  # fmt: skip
    some = spread(known, len(real))
    controls["train"] = {"fd_lite0": frechet_distance(judge.features(some), real_features)}
    own |= {
        "fd_lite0": frechet_distance(judge.features(made), real_features),
        "changed": 1 - distortion(made, begin)["ssim"],
        "seconds": seconds,
        "ways": {"from_words": judged(from_words)},
        "controls": controls,
    }
    shown = [("known", begin), ("made", made), ("from words", from_words), ("real", real)]
    grid = _grid("generate: held-out names", [(n, x[:SHOWN]) for n, x in shown], captions[:SHOWN])
    sampling = {"made": asdict(BEGUN), "from_words": asdict(SAMPLED), "share": REFERENCE}
    return {"task": "generate", **own, "sampling": sampling, "grids": [grid]}


def evaluate_caption(
    side: int,
    run: Synthesise,
    judge: Judge,
    tokens: Callable[[Sequence[str]], np.ndarray],
    most: int | None = None,
) -> dict[str, Any]:
    """Captions of held-out pictures: tokens that are right at their place, and rank of the true caption.

    `tokens` gives ids int64 (N, W) of texts, with padding 0. A caption is right in so far as the
    true one is the nearest in the retriever's text space among all held-out captions.
    """
    everything = load_collection(Collection(name="noto", images="emoji"), side)
    real, captions = held_out(everything, most)
    begun = time.perf_counter()
    made = [str(text) for text in run("caption", Rows(pictures=real))]
    seconds = (time.perf_counter() - begun) / len(real)
    train = everything.where("train")
    near = nearest(real, on_white(np.array(everything.pixels[train])))
    others = {
        "nearest": [everything.rows[train[i]].caption for i in near],
        "shuffled": list(np.roll(np.array(made, object), 1)),
        "constant": [commonest(captions)] * len(captions),
    }
    truth = judge.encoder.encode_texts(captions)

    def judged(texts: Sequence[str]) -> dict[str, float]:
        wanted, said = tokens(captions), tokens(list(texts))
        there = wanted[:, 1:] != 0
        right = float(100 * ((wanted == said)[:, 1:] & there).sum() / there.sum())
        ranks = retrieval_scores(judge.encoder.encode_texts([t or " " for t in texts]), truth)
        return {"token_accuracy": right, **ranks}

    examples = [{"true": t, "said": s} for t, s in zip(captions[:SHOWN], made[:SHOWN], strict=True)]
    controls = {name: judged(texts) for name, texts in others.items()}
    named = [f"{said} ({true})" for true, said in zip(captions[:SHOWN], made[:SHOWN], strict=True)]
    grid = _grid("caption: said (true)", [("picture", real[:SHOWN])], named)
    return {
        "task": "caption", "pool": len(real), **judged(made), "seconds": seconds,
        "controls": controls, "examples": examples, "grids": [grid],
    }  # fmt: skip


def _summed(task: str, splits: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Means over splits at the top, with their controls; the splits below."""
    names = [
        name
        for name in ("psnr", "ssim", "l1", "fd_lite0", "seconds")
        if all(name in s for s in splits.values())
    ]
    mean = {name: float(np.mean([s[name] for s in splits.values()])) for name in names}
    controls: dict[str, dict[str, float]] = {}
    for kind in next(iter(splits.values()))["controls"]:
        rows = [s["controls"][kind] for s in splits.values()]
        controls[kind] = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return {"task": task, **mean, "controls": controls, "splits": splits}


def _grid(title: str, rows: Sequence[tuple[str, np.ndarray]], captions: Sequence[str]) -> PictureGrid:
    return PictureGrid(title=title, rows=rows, captions=captions)


def figure_tables(result: dict[str, Any]) -> list[FigureTable]:
    """What a person reads of a result: each split's scores, then its ways and controls."""
    tables = []
    for name, split in (result.get("splits") or {result["task"]: result}).items():
        rows = {"model": split} | split.get("ways", {}) | split["controls"]
        head = [key for key in METRICS if any(key in row for row in rows.values())]
        cells = [
            [kind, *(f"{row[key]:.4g}" if key in row else "" for key in head)] for kind, row in rows.items()
        ]
        tables.append(FigureTable(title=f"{name}, {split['pool']} held out", head=["", *head], rows=cells))
    return tables
