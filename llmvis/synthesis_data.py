"""What the language stage reads: code words of every picture in a few views, and words for them.

A recipe's collections and pairs are fitted, seen in chance views (both sides of a pair in the
same one), tokenised once, and kept as small integers: a million pictures are 0.5 GB a view.
Rows are then drawn by task and weight from (seed, step) alone. Knows no Ray.

Shape legend: V views, N pictures, B batch, K cells, G groups, W words, S side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from llmvis.models.language import MASKED
from llmvis.models.tokenizer import ImageTokenizer
from llmvis.models.tokenizer_files import encoder_digest
from llmvis.pictures import MapRows, Pictures, Row, list_pictures, load_collection, load_pairs
from llmvis.recipe import TASKS, Recipe
from llmvis.schema import UserError
from llmvis.training.views import changed_views

AT_ONCE = 32


@dataclass
class Loaded:
    """A recipe's pictures: collections with their styles, and both sides of each pair.

    key: of everything that decides what they are; code words are kept under it.
    """

    recipe: Recipe
    collections: list[Pictures]
    pairs: list[tuple[Pictures, Pictures]]
    key: str

    def weighted(self) -> list[tuple[Pictures, float]]:
        """Everything that a tokeniser must know, with weights: collections, and each side of the pairs."""
        out = [(p, part.weight) for p, part in zip(self.collections, self.recipe.collections, strict=True)]
        for sides, part in zip(self.pairs, self.recipe.pairs, strict=True):
            out += [(side, part.weight / 2) for side in sides]
        return out


def fit_recipe(
    recipe: Recipe, side: int, folder: Path, map_rows: MapRows = map, max_rows: int | None = None
) -> Path:
    """All pictures of a recipe at `side` px, fitted into a folder below `folder` unless they lie there.

    The folder's name stands for the recipe and for what lies in its collections today: a file
    that was added, changed or taken away makes another one.

    max_rows: so many of each part at most, spread over it, for a quick trial.
    """
    names = [part.images for part in recipe.collections]
    names += [name for part in recipe.pairs for name in (part.source, part.target)]
    listed = {name: list_pictures(name) for name in dict.fromkeys(names)}
    known = [recipe.describe(), side, max_rows, [listed[name].digest for name in names]]
    folder = folder / f"pictures-{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:12]}"
    for one in recipe.collections:
        load = partial(load_collection, one, side, map_rows, most=max_rows, listed=listed[one.images])
        _keep([folder / one.name], load)
    for pair in recipe.pairs:
        both = listed[pair.source], listed[pair.target]
        load_both = partial(load_pairs, pair, side, map_rows, most=max_rows, listed=both)
        _keep(_sides(folder, pair.name), load_both)
    return folder


def open_recipe(recipe: Recipe, folder: Path) -> Loaded:
    """What `fit_recipe` left in its folder; raises `UserError` where a part has no picture to train on."""
    loaded = Loaded(
        recipe,
        [Pictures.load(folder / part.name) for part in recipe.collections],
        [(Pictures.load(a), Pictures.load(b)) for a, b in (_sides(folder, p.name) for p in recipe.pairs)],
        folder.name,
    )
    names = [part.name for part in recipe.collections] + [part.name for part in recipe.pairs]
    for name, pictures in zip(names, [*loaded.collections, *(a for a, _ in loaded.pairs)], strict=True):
        if not len(pictures.where("train")):
            raise UserError(
                f"{name}: none of its {len(pictures.rows)} pictures is for training, as one in ten is held out: "
                "give more pictures"
            )
    return loaded


def load_recipe(
    recipe: Recipe, side: int, folder: Path, map_rows: MapRows = map, max_rows: int | None = None
) -> Loaded:
    """`fit_recipe` and `open_recipe`."""
    return open_recipe(recipe, fit_recipe(recipe, side, folder, map_rows, max_rows))


def counted(loaded: Loaded) -> list[str]:
    """For a person: how many pictures each part has, and what was left out of it for which reason."""
    parts: list[tuple[str, Pictures]] = [
        (part.name, pictures)
        for part, pictures in zip(loaded.recipe.collections, loaded.collections, strict=True)
    ]
    for pair, sides in zip(loaded.recipe.pairs, loaded.pairs, strict=True):
        parts += zip((f"{pair.name}, source", f"{pair.name}, target"), sides, strict=True)
    lines = []
    for name, pictures in parts:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(pictures.left_out.items()))
        lines.append(
            f"{name}: {len(pictures.rows):,} pictures" + (f"; left out: {reasons}" if reasons else "")
        )
    return lines


def _sides(folder: Path, name: str) -> list[Path]:
    return [folder / f"{name}-source", folder / f"{name}-target"]


def _keep(folders: list[Path], load: Callable[[], Pictures | tuple[Pictures, Pictures]]) -> None:
    """Fits pictures into their folders unless they are there."""
    if not (folders[-1] / "rows.json").exists():
        made = load()
        for pictures, folder in zip((made,) if isinstance(made, Pictures) else made, folders, strict=True):
            pictures.save(folder)


@dataclass
class Coded:
    """Pictures as code words."""

    codes: np.ndarray  # int16 (V, N, K, G)
    rows: list[Row]
    train: np.ndarray  # int64 indices


@dataclass
class Batch:
    """One batch of the language stage, all tasks mixed; numpy, to be sliced and sent to a device."""

    texts: list[str]
    ask_words: np.ndarray  # bool (B,): the words are what is masked (caption)
    target: np.ndarray  # int64 (B, K, G)
    source: np.ndarray  # int64 (B, K, G), MASKED where there is none
    hide: np.ndarray  # bool (B, K, G): code words to predict


class LanguageData:
    """Draws batches of tasks from coded pictures."""

    def __init__(self, recipe: Recipe, grid: int, collections: list[Coded], pairs: list[tuple[Coded, Coded]]):
        self.collections, self.pairs = collections, pairs
        self.recipe, self._grid = recipe, grid
        weights = np.array([recipe.tasks.get(task, 0.0) for task in TASKS])
        self._tasks = weights / weights.sum()
        self._collection_share = _shares([part.weight for part in recipe.collections])
        self._pair_share = _shares([part.weight for part in recipe.pairs])

    @property
    def digest(self) -> str:
        """Of all code words: what a resumed run must share."""
        total = hashlib.sha256()
        for part in [*self.collections, *(side for sides in self.pairs for side in sides)]:
            total.update(part.codes[0].tobytes())
        return total.hexdigest()[:16]

    def batch(self, rng: np.random.Generator, size: int, drop: float) -> Batch:
        """`size` rows; a share `drop` of those that are not captions have no words, for guidance."""
        rows = [self._row(TASKS[rng.choice(len(TASKS), p=self._tasks)], rng, drop) for _ in range(size)]
        texts, ask, target, source, hide = zip(*rows, strict=True)
        return Batch(list(texts), np.array(ask), np.stack(target), np.stack(source), np.stack(hide))

    def _row(
        self, task: str, rng: np.random.Generator, drop: float
    ) -> tuple[str, bool, np.ndarray, np.ndarray, np.ndarray]:
        if task == "translate":
            place = int(rng.choice(len(self.pairs), p=self._pair_share))
            before, after = self.pairs[place]
            i, view = _pick(after, rng)
            words = self.recipe.pairs[place].instructions
            text = instructed(words[int(rng.integers(len(words)))], after.rows[i].caption)
            target, source = after.codes[view, i].astype(np.int64), before.codes[view, i].astype(np.int64)
            hide = np.ones(target.shape, bool) if rng.random() < 0.5 else _some(rng, target.shape)
            return ("" if rng.random() < drop else text), False, target, source, hide
        place = int(rng.choice(len(self.collections), p=self._collection_share))
        pictures = self.collections[place]
        i, view = _pick(pictures, rng)
        row, target = pictures.rows[i], pictures.codes[view, i].astype(np.int64)
        source = np.full_like(target, MASKED)
        if (
            task == "caption" and row.caption
        ):  # where there are no words to ask for, it is one more to generate
            return row.caption, True, target, source, np.zeros(target.shape, bool)
        text = "" if rng.random() < drop else described(row, self.recipe.collections[place].style, rng)
        hide = _some(rng, target.shape)
        if task == "inpaint":
            box = np.broadcast_to(_box(rng, self._grid)[:, None], hide.shape)
            hide = hide & box if (hide & box).any() else box
        return text, False, target, source, hide


def described(row: Row, style: str, rng: np.random.Generator) -> str:
    """Words to ask for a picture by: caption, sometimes with keywords, mostly with its style."""
    words = [row.caption]
    if row.keywords and rng.random() < 0.3:
        words += rng.choice(row.keywords, min(2, len(row.keywords)), replace=False).tolist()
    if style and rng.random() < 0.8:
        words.append(style)
    return ", ".join(word for word in words if word)


def instructed(instruction: str, caption: str) -> str:
    """An instruction with the picture's caption in it, or ended before the place of one that is missing."""
    text = instruction.replace("{caption}", caption)
    return text if caption else text.rstrip(" :,;-–—")


def code_all(
    loaded: Loaded, tokenizer: ImageTokenizer, views: int, folder: Path, *,
    device: str = "cpu", rank: int = 0, world: int = 1, wait: Callable[[], None] = lambda: None,
) -> LanguageData:  # fmt: skip
    """Code words of a recipe's pictures, from `folder` or made: each worker makes its share.

    They are kept by pictures, encoder and views. `wait` returns when every worker has come to it.
    """
    pictures_key = loaded.key.removeprefix("pictures-")
    folder = folder / f"codes-{pictures_key}-{encoder_digest(tokenizer)}-{views}"
    folder.mkdir(parents=True, exist_ok=True)
    sides = [*loaded.collections, *(side for pair in loaded.pairs for side in pair)]
    for number, pictures in enumerate(sides):
        file = folder / f"{number}-{rank}-of-{world}.npy"
        if not file.exists():
            mine = Pictures(pictures.pixels[rank::world], pictures.rows[rank::world])
            partial = file.with_suffix(".partial.npy")
            np.save(partial, coded(mine, tokenizer, views, device))
            partial.rename(file)
    wait()
    made = []
    for number, pictures in enumerate(sides):
        shares = [np.load(folder / f"{number}-{r}-of-{world}.npy") for r in range(world)]
        codes = np.empty((views, len(pictures.rows), *shares[0].shape[2:]), np.int16)
        for r, share in enumerate(shares):
            codes[:, r::world] = share
        made.append(Coded(codes, pictures.rows, pictures.where("train")))
    many = len(loaded.collections)
    pairs = list(zip(made[many::2], made[many + 1 :: 2], strict=True))
    return LanguageData(loaded.recipe, tokenizer.config.grid, made[:many], pairs)


def coded(pictures: Pictures, tokenizer: ImageTokenizer, views: int, device: str = "cpu") -> np.ndarray:
    """Code words int16 (V, N, K, G): view 0 as pictures are on white, the others shifted and resized.

    A view's chance depends on the picture's id, so both sides of a pair are seen alike.
    """
    config = tokenizer.config
    codes = np.empty((views, len(pictures.rows), config.cells, config.groups), np.int16)
    with tqdm(total=codes.shape[0] * codes.shape[1], desc="code words", mininterval=10) as bar:
        for view in range(views):
            chance = np.stack([_chance(row.id, view) for row in pictures.rows])
            for at in range(0, len(pictures.rows), AT_ONCE):
                part = slice(at, at + AT_ONCE)
                rgba = torch.from_numpy(np.array(pictures.pixels[part])).to(device)
                seen = changed_views(
                    rgba.permute(0, 3, 1, 2).float() / 255, torch.from_numpy(chance[part]).to(device)
                )
                codes[view, part] = tokenizer.encode(seen).flatten(1, 2).cpu().numpy()
                bar.update(len(rgba))
    return codes


def _chance(key: str, view: int) -> np.ndarray:
    """What `changed_views` is given: view 0 stays; others move, and keep side and ground."""
    draw = np.random.default_rng(list(hashlib.sha256(f"{view}/{key}".encode()).digest()[:8])).random(
        9, np.float32
    )
    draw[[0, 2, 5]] = 0.9 if view else 0.0
    return draw


def _pick(pictures: Coded, rng: np.random.Generator) -> tuple[int, int]:
    return int(pictures.train[rng.integers(len(pictures.train))]), int(rng.integers(len(pictures.codes)))


def _some(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """A chance part of the code words, its size along a cosine (MaskGIT): bool, at least one True."""
    share = np.cos(np.pi / 2 * rng.random())
    order = rng.random(tuple(shape))
    return np.asarray(order <= max(np.quantile(order, share), order.min()))


def _box(rng: np.random.Generator, grid: int) -> np.ndarray:
    """A chance rectangle of cells: bool (K,)."""
    height, width = rng.integers(2, max(3, grid), 2)
    top, left = rng.integers(0, grid - height + 1), rng.integers(0, grid - width + 1)
    box = np.zeros((grid, grid), bool)
    box[top : top + height, left : left + width] = True
    return box.ravel()


def _shares(weights: Sequence[float]) -> np.ndarray:
    total = np.array(weights, np.float64)
    return total / total.sum() if len(total) else total
