"""Quality gates: which made pictures are good enough to keep, and why the others are not.

    pictures  is_blank, picture_digest
    vectors   cross_modal: how well a picture fits its text
    a user's  load_scorer("module:callable"), scores
    all rows  decide(rows, config) → for each row None, or the reason why it goes

`decide` sees all rows of a job at once, in canonical order, so that what stays depends neither on
shards nor on who was first. It does not know where scores and embeddings come from, nor files,
torch and Ray.

Shape legend: N rows, B rows of a block, K rows kept so far, D embedding.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageStat

from llmvis.schema import Reason, UserError

if TYPE_CHECKING:
    from llmvis.index.seen import Seen

BLANK_SPREAD = 2.0
"""Levels of 255: with a standard deviation below it in each channel a picture shows nothing."""
BLANK_SHARE = 0.995
"""One colour (with neighbours up to 2 levels away: a decoder's noise) on more of the area is blank."""
_NEIGHBOUR = 2

BLOCK, KEPT_BLOCK = 1_024, 8_192
"""Rows whose cosines are computed at a time, and kept rows that they are held against: 32 MB of
cosines. Fixed, so that sums run in the same order on every run."""

LISTS_FROM = 8_192
"""Rows kept, and rows to come, from which on lists (`index.seen`) find near duplicates, and not each kept row."""

Floats = npt.NDArray[np.floating[Any]]


@runtime_checkable
class Scorer(Protocol):
    """A user's own judge of pictures."""

    name: str

    def score(self, pictures: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        """B RGB pictures and what each should show → `float32 (B,)`, higher is better."""
        ...


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """What a made picture must be to stay; None is off. By default blank pictures and exact copies go."""

    blank: bool = True
    """Leave out pictures of nearly one colour."""
    duplicates: bool = True
    """Leave out pictures with the very pixels of an earlier one."""
    min_score: float | None = None
    """Least cosine of a picture with its text."""
    scorer: str | None = None
    """Your own scorer, as module:Class with `name` and `score(pictures, texts)`: a number for each PIL
    picture. The module may lie in this folder. Needs --min-user-score."""
    min_user_score: float | None = None
    """Least score of your own scorer."""
    near_duplicates: float | None = None
    """Leave out a picture whose cosine with an earlier one that stays is above this, such as 0.97."""
    in_index: float | None = None
    """Leave out a picture whose cosine with one of a given index is above this."""
    best: int | None = None
    """Keep that many of the pictures with one source (or one prompt): those with the best scores."""

    def __post_init__(self) -> None:
        for name, least in (("min_score", -1.0), ("near_duplicates", 0.0), ("in_index", 0.0)):
            value = getattr(self, name)
            if value is not None and not least <= value <= 1:
                raise UserError(
                    f"--{name.replace('_', '-')} is {value}, but it is a cosine: give {least:g} to 1, "
                    "or leave it out"
                )
        if self.min_user_score is not None and not math.isfinite(self.min_user_score):
            raise UserError(f"--min-user-score is {self.min_user_score}; give a finite number")
        if (self.scorer is None) != (self.min_user_score is None):
            raise UserError("--scorer and --min-user-score go together: give who judges, and what will do")
        if self.best is not None and self.best < 1:
            raise UserError(f"--best is {self.best}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class GateRows:
    """What `decide` knows of N rows, in canonical order. What no gate in force asks for may be None."""

    group: Sequence[str]
    """Whose variant each row is: its `source_id`, or its prompt."""
    blank: npt.NDArray[np.bool_] | None = None
    """bool (N,), by `is_blank`."""
    score: Floats | None = None
    """float (N,), by `cross_modal`."""
    user_score: Floats | None = None
    """float (N,), of the user's scorer."""
    digest: Sequence[str] | None = None
    """By `picture_digest`."""
    embedding: Floats | None = None
    """float16 or float32 (N, D), rows of any length; may be memory-mapped."""
    index_cosine: Floats | None = None
    """float (N,): the highest cosine with a picture of the index."""

    def __post_init__(self) -> None:
        for name in ("blank", "score", "user_score", "digest", "embedding", "index_cosine"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.group):
                raise ValueError(f"{name} has {len(value)} rows, group has {len(self.group)}")


# one picture


def is_blank(image: Image.Image) -> bool:
    """Whether a picture shows nothing: nearly one colour, transparency composited on white.

    A spread below `BLANK_SPREAD`, or one colour on more than `BLANK_SHARE` of the area. Takes any
    mode of Pillow but `F`, whose range nobody knows: that raises `ValueError`.
    """
    levels = _eight_bit(image)
    statistics = ImageStat.Stat(levels)  # by histograms, which is fast
    if max(statistics.stddev) < BLANK_SPREAD:
        return True
    # a colour that has more than half of the area is the median
    distance = np.abs(np.asarray(levels, np.int16) - np.array(statistics.median, np.int16))
    near = (distance <= _NEIGHBOUR).reshape(levels.height, levels.width, -1).all(axis=2)
    return bool(near.mean() > BLANK_SHARE)


def _eight_bit(image: Image.Image) -> Image.Image:
    """The picture as RGB, or as 8-bit grey where it was 16-bit grey, which `convert` would clip to white."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no stated range; llmvis.images.decode refuses them, too")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    top = image.convert("RGBA")
    ground = Image.new("RGB", top.size, (255, 255, 255))
    ground.paste(top, mask=top.getchannel("A"))
    return ground


def picture_digest(image: Image.Image) -> str:
    """Hex sha256 over size, mode and pixels: the same for one picture as PNG, BMP or lossless WebP.

    Palettes and colour keys are resolved first. JPEG changes pixels, and so the digest.
    """
    if image.mode in ("P", "PA") or (image.mode in ("1", "L", "RGB") and "transparency" in image.info):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    mode, pixels = image.mode, image.tobytes()
    if mode.startswith("I;16"):  # one digest for both byte orders
        mode, pixels = "I;16", np.asarray(image).astype("<u2").tobytes()
    head = f"{image.width} x {image.height} {mode}\n".encode()
    return hashlib.sha256(head + pixels).hexdigest()


# scores


def cross_modal(embedding_ND: Floats, text_ND: Floats) -> npt.NDArray[np.float32]:
    """Cosine of each picture with its text: two float (N, D) of one space → float32 (N,).

    Rows need not be unit length; a row of zeros has cosine 0. Raises `ValueError` where shapes differ.
    """
    if embedding_ND.ndim != 2 or embedding_ND.shape != text_ND.shape:
        raise ValueError(f"expected two (N, D), got {embedding_ND.shape} and {text_ND.shape}")
    cosine: npt.NDArray[np.float32] = np.einsum("nd,nd->n", _unit(embedding_ND), _unit(text_ND))
    return cosine


def _unit(rows_ND: Floats) -> npt.NDArray[np.float32]:
    """The rows as float32 of unit length; zeros stay."""
    rows = rows_ND.astype(np.float32)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    rows /= np.where(length > 0, length, 1)
    return rows


def load_scorer(name: str) -> Scorer:
    """The scorer that `module:callable` makes when called without arguments: a class, or a function.

    Raises `UserError` where there is none; what the user's own code raises passes through.
    """
    module_name, _, attribute = name.partition(":")
    if not attribute or not all(part.isidentifier() for part in module_name.split(".")):
        raise UserError(f"{name!r} is no scorer: write module:callable, such as my_scores:Sharpness")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # their module is there, and lacks something itself
        raise UserError(
            f"there is no module {error.name!r} for the scorer {name}; run from its folder or set PYTHONPATH"
        ) from error
    make = getattr(module, attribute, None)
    if not callable(make):
        raise UserError(
            f"{module_name} has no callable {attribute!r}; a scorer is a class or a function there"
        )
    try:
        inspect.signature(make).bind()
    except TypeError as error:
        raise UserError(
            f"{name} cannot be called without arguments ({error}): give a class, or a function that makes a "
            "scorer, an object with `name` and `score(pictures, texts)`"
        ) from error
    scorer = make()
    if not isinstance(scorer, Scorer):
        raise UserError(
            f"{name} gives a {type(scorer).__name__}, which is no scorer: it needs `name` and "
            "`score(pictures, texts)`"
        )
    return scorer


def scores(scorer: Scorer, pictures: Sequence[Image.Image], texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """What a user's scorer says of B pictures: float32 (B,). Raises `UserError` where it gives another shape."""
    given = np.asarray(scorer.score(pictures, texts))
    if given.shape != (len(pictures),) or given.dtype.kind not in "fiub":
        raise UserError(
            f"the scorer {scorer.name} gave {given.dtype} {given.shape} for {len(pictures)} pictures; "
            "it must give one number each"
        )
    return given.astype(np.float32)


# all rows


def decide(rows: GateRows, config: GateConfig) -> list[Reason | None]:
    """For each of N rows None, where it stays, or why it goes: the first of these gates that it fails.

    1. `blank`: nearly one colour.
    2. `low_score`: score below `min_score`; then the user's score below `min_user_score`.
    3. `duplicate_picture`: the digest of an earlier row that passed 1 and 2.
    4. `near_duplicate`: cosine above `near_duplicates` with an earlier row that passed 1 to 4.
    5. `in_index`: cosine with the index above `in_index`.
    6. `not_best`: `best` rows of its group that passed 1 to 5 have better scores, or equal ones and
       come earlier.

    NaN is below every minimum and above no threshold. Near duplicates are found exactly, in time
    N · K · D with K the rows that stay, to some thousands of these (`LISTS_FROM`); what comes after is
    held against the few lists of kept rows that are nearest (`index.seen`), which misses some: 1 of 9,812 at
    .97 and none of 31,667 at .9, of 100,000 rows of 768 dimensions, in 20–26 and 21 s instead of 102 and
    107. One that was missed stays, and is then an earlier row to others. Memory is bounded by blocks and
    some bytes a row, with lists 2 · D bytes a kept row more. The same rows in the same order give the same
    answer. Raises `ValueError` where a gate in force lacks its column.
    """
    _check_columns(rows, config)
    reasons: list[Reason | None] = [None] * len(rows.group)

    def leave_out(found: npt.NDArray[np.integer[Any]] | list[int], reason: Reason) -> None:
        for row in found:
            reasons[row] = reasons[row] or reason

    def staying() -> list[int]:
        return [row for row, reason in enumerate(reasons) if reason is None]

    if config.blank and rows.blank is not None:
        leave_out(np.flatnonzero(rows.blank), Reason.BLANK)
    if config.min_score is not None and rows.score is not None:
        leave_out(np.flatnonzero(~(rows.score >= config.min_score)), Reason.LOW_SCORE)
    if config.min_user_score is not None and rows.user_score is not None:
        leave_out(np.flatnonzero(~(rows.user_score >= config.min_user_score)), Reason.LOW_SCORE)
    if config.duplicates and rows.digest is not None:
        leave_out(_copies(rows.digest, staying()), Reason.DUPLICATE_PICTURE)
    if config.near_duplicates is not None and rows.embedding is not None:
        near = _near_copies(rows.embedding, staying(), config.near_duplicates)
        leave_out(near, Reason.NEAR_DUPLICATE)
    if config.in_index is not None and rows.index_cosine is not None:
        leave_out(np.flatnonzero(rows.index_cosine > config.in_index), Reason.IN_INDEX)
    if config.best is not None and rows.score is not None:
        leave_out(_beaten(rows.group, rows.score, staying(), config.best), Reason.NOT_BEST)
    return reasons


def _check_columns(rows: GateRows, config: GateConfig) -> None:
    asked = {
        "blank": config.blank,
        "score": config.min_score is not None or config.best is not None,
        "user_score": config.min_user_score is not None,
        "digest": config.duplicates,
        "embedding": config.near_duplicates is not None,
        "index_cosine": config.in_index is not None,
    }
    lacking = [name for name, wanted in asked.items() if wanted and getattr(rows, name) is None]
    if lacking:
        raise ValueError(f"the gates in force need {', '.join(lacking)} of the rows")


def _copies(digests: Sequence[str], staying: list[int]) -> list[int]:
    """Rows of `staying` with the digest of an earlier one."""
    seen: set[str] = set()
    found = []
    for row in staying:
        if digests[row] in seen:
            found.append(row)
        seen.add(digests[row])
    return found


def _near_copies(embedding_ND: Floats, staying: list[int], threshold: float) -> list[int]:
    """Rows of `staying` with a cosine above `threshold` to an earlier one that is not among them itself.

    Exact to `LISTS_FROM` kept rows; of what comes after them all but what lists miss (see `decide`).
    """
    kept: list[int] = []
    found: list[int] = []
    lists: Seen | None = None
    for at in range(0, len(staying), BLOCK):
        block = staying[at : at + BLOCK]
        block_BD = _unit(embedding_ND[block])
        if lists is None and min(len(kept), len(staying) - at) > LISTS_FROM:
            lists = _lists(embedding_ND, staying, kept)
        near = (
            _near_kept(embedding_ND, kept, block_BD, threshold)
            if lists is None
            else lists.near(block_BD, threshold)
        )
        before = len(kept)
        cosine_BB = block_BD @ block_BD.T
        for i, row in enumerate(block):
            if near[i]:
                found.append(row)
            else:
                kept.append(row)
                near |= cosine_BB[i] > threshold  # of no effect on rows before i: they had their turn
        if lists is not None:
            lists.add(_unit(embedding_ND[kept[before:]]))
    return found


def _near_kept(
    embedding_ND: Floats, kept: list[int], block_BD: npt.NDArray[np.float32], threshold: float
) -> npt.NDArray[np.bool_]:
    """bool (B,): whether each has a cosine above `threshold` with any of the kept rows."""
    near = np.zeros(len(block_BD), bool)
    for start in range(0, len(kept), KEPT_BLOCK):
        kept_KD = _unit(embedding_ND[kept[start : start + KEPT_BLOCK]])
        near |= (block_BD @ kept_KD.T > threshold).any(axis=1)
    return near


def _lists(embedding_ND: Floats, staying: list[int], kept: list[int]) -> Seen:
    """Lists for the rows of `staying`, in which those kept so far lie."""
    from llmvis.index.seen import Seen, sample_size  # brings faiss, which a small set does without

    some = np.random.default_rng(0).choice(len(staying), sample_size(len(staying)), replace=False)
    lists = Seen(_unit(embedding_ND[[staying[place] for place in np.sort(some)]]), len(staying))
    for start in range(0, len(kept), KEPT_BLOCK):
        lists.add(_unit(embedding_ND[kept[start : start + KEPT_BLOCK]]))
    return lists


def _beaten(groups: Sequence[str], score: Floats, staying: list[int], best: int) -> list[int]:
    """Rows of `staying` that are not among the `best` of their group; of equal scores the earlier one wins."""
    members: dict[str, list[int]] = defaultdict(list)
    for row in staying:
        members[groups[row]].append(row)
    cost = np.where(np.isnan(score), np.inf, -score)
    found: list[int] = []
    for rows in members.values():
        found += sorted(rows, key=lambda row: float(cost[row]))[best:]  # stable
    return found


def count_reasons(reasons: Sequence[Reason | None]) -> dict[str, int]:
    """How many rows went for which reason, by the reason's name; all others stayed."""
    return dict(sorted(Counter(str(reason) for reason in reasons if reason is not None).items()))


def gate_lines(config: GateConfig, counts: Mapping[str, int]) -> list[tuple[str, str, int]]:
    """The gates in force, in their order: `(reason, what is asked, how many went)`, for people.

    `low_score` has one line for both scores, as both go by one reason.
    """
    least = [f"score ≥ {config.min_score:g}"] if config.min_score is not None else []
    if config.min_user_score is not None:
        least.append(f"{config.scorer} ≥ {config.min_user_score:g}")
    asked = [
        (Reason.BLANK, "more than one colour" if config.blank else None),
        (Reason.LOW_SCORE, " and ".join(least) or None),
        (Reason.DUPLICATE_PICTURE, "pixels unlike any earlier picture's" if config.duplicates else None),
        (Reason.NEAR_DUPLICATE, _at_most("cosine with earlier pictures", config.near_duplicates)),
        (Reason.IN_INDEX, _at_most("cosine with the index", config.in_index)),
        (Reason.NOT_BEST, f"the best {config.best} of a group" if config.best is not None else None),
    ]
    return [(str(reason), what, counts.get(reason, 0)) for reason, what in asked if what is not None]


def _at_most(what: str, threshold: float | None) -> str | None:
    return None if threshold is None else f"{what} ≤ {threshold:g}"
