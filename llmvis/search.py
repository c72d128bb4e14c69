"""Questions to an index: a text, a picture, both with weights, and things to avoid → hits.

A question becomes one vector, `Σ w·v` over what is wanted less `w·v` over what is not,
and unit length again; `Index.search` does the rest. Knows no files but those that
the index's own reader opens.
"""

from __future__ import annotations

import math
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from llmvis.images import decode
from llmvis.index import SOURCE, Index
from llmvis.models.protocols import Encoder
from llmvis.schema import ItemError, UserError
from llmvis.sources import open_reader
from llmvis.sources.files import read_file

F32 = npt.NDArray[np.float32]


MOST_LOOKED_AT = 10_000
"""Hits, to find some that are distinct: more near-same pictures than these are one answer."""


class QueryError(UserError):
    """A question that cannot be asked; the message says what to change."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """What is looked for. At least one of `text` and `image`; weights are relative to each other."""

    text: str | None = None
    image: str | None = None  # path of a picture
    avoid: tuple[str, ...] = ()
    text_weight: float = 1.0
    image_weight: float = 1.0
    avoid_weight: float = 0.5
    imagine_weight: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One answer. `score` is the cosine with the question, -1 to 1; `columns` are the user's own."""

    rank: int
    id: str
    score: float
    path: str
    caption: str | None
    width: int
    height: int
    locator: bytes
    source: int = 0  # which of the index's sources opens it
    columns: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The user's columns lie beside ours; what JSON does not know becomes text, NaN null."""
        own = ("rank", "id", "score", "path", "caption", "width", "height")
        ours = {name: getattr(self, name) for name in own}
        return ours | {name: _plain(value) for name, value in self.columns.items() if name not in ours}


def query_vector(query: Query, encoder: Encoder, imagined: Sequence[Image.Image] = ()) -> F32:
    """The question as `float32 (1, D)`, unit length.

    `imagined`: pictures of what is looked for; the mean of their vectors counts `imagine_weight`.

    Raises `QueryError` where there is nothing to look for, the picture cannot be read,
    or the parts cancel out.
    """
    parts: list[tuple[float, F32]] = []
    texts = [*([query.text] if query.text else []), *query.avoid]
    vectors = encoder.encode_texts(texts) if texts else np.empty((0, encoder.info.dim), np.float32)
    if query.text:
        parts.append((query.text_weight, vectors[0]))
    if query.image:
        parts.append((query.image_weight, _picture(query.image, encoder)))
    if imagined:
        ready = np.stack([encoder.info.preprocess(image) for image in imagined])
        parts.append((query.imagine_weight, encoder.encode_images(ready).mean(0)))
    if not parts:
        raise QueryError("nothing to search for: give a text, --image, or both")
    parts += [(-query.avoid_weight, v) for v in vectors[len(vectors) - len(query.avoid) :]]
    total = np.sum([weight * vector for weight, vector in parts], axis=0)
    norm = float(np.linalg.norm(total))
    if not norm > 1e-6:
        raise QueryError(
            "what is wanted and what is to be avoided cancel out; change the words or the weights"
        )
    vector: F32 = (total / norm).astype(np.float32)
    return vector[None]


def _picture(path: str, encoder: Encoder) -> F32:
    try:
        image = decode(read_file(Path(path).resolve()), target=encoder.info.preprocess.side).image
    except ItemError as error:
        raise QueryError(f"{path}: {error}") from error
    (vector,) = encoder.encode_images(encoder.info.preprocess(image)[None])
    return np.asarray(vector, np.float32)


def search(
    index: Index, vectors: F32, k: int, *, where: str | None = None, exact: bool = False, offset: int = 0,
    distinct: float | None = None,
) -> list[list[Hit]]:  # fmt: skip
    """For each of `vectors (Q, D)` its k best hits; k asked is k got, if the index has as many.

    Args:
        where, exact: as `Index.search` takes them.
        offset: so many of the best are passed over, as the pages before this one.
        distinct: a hit that has this cosine or more with a better one is left out, and the next one comes
            instead; `MOST_LOOKED_AT` are looked at.

    Raises as `Index.search` does.
    """
    found: Iterable[tuple[F32, npt.NDArray[np.int64]]]
    if distinct is None:
        found = zip(*index.search(vectors, offset + k, where=where, exact=exact), strict=True)
    else:
        found = [_distinct(index, vector[None], offset + k, distinct, where, exact) for vector in vectors]
    return [
        [
            _hit(rank, float(score), metadata, index.sources)
            for rank, (score, metadata) in enumerate(
                zip(scores[offset:], index.metadata(rows[offset:]), strict=True), offset + 1
            )
        ]
        for scores, rows in found
    ]


def _distinct(
    index: Index, vector: F32, k: int, most: float, where: str | None, exact: bool
) -> tuple[F32, npt.NDArray[np.int64]]:
    """Scores and rows of the k best of which no two have a cosine of `most` or more."""
    ask = 2 * k
    while True:
        (scores,), (rows,) = index.search(vector, min(ask, MOST_LOOKED_AT), where=where, exact=exact)
        vectors = index.vectors(rows)
        kept: list[int] = []
        for place, each in enumerate(vectors):
            if not kept or float((vectors[kept] @ each).max()) < most:
                kept.append(place)
                if len(kept) == k:
                    break
        if len(kept) == k or len(rows) < ask:
            return scores[kept], rows[kept]
        ask *= 4


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _hit(rank: int, score: float, row: dict[str, Any], sources: list[dict[str, Any]]) -> Hit:
    own = {name: row.pop(name) for name in ("id", "caption", "width", "height", "locator")}
    own["source"] = row.pop(SOURCE)
    row.pop("caption_truncated")
    path = posixpath.join(sources[own["source"]]["shown_root"], row.pop("path"))
    return Hit(rank=rank, score=round(score, 6), path=path, columns=row, **own)


def pictures(index: Index, hits: list[Hit]) -> list[bytes | None]:
    """The encoded picture behind each hit, from where the collection lies; None where it is gone."""
    found = read_pictures(index.sources, hits)
    return [None if isinstance(data, ItemError) else data for data in found]


def read_pictures(sources: Sequence[dict[str, Any]], hits: Sequence[Hit]) -> list[bytes | ItemError]:
    """The encoded picture behind each hit of an index with these `sources`, or why it cannot be had."""
    found: dict[int, bytes | ItemError] = {}
    for number, source in enumerate(sources):
        some = [i for i, hit in enumerate(hits) if hit.source == number]
        found |= dict(zip(some, open_reader(source).read([hits[i].locator for i in some]), strict=True))
    return [data for _, data in sorted(found.items())]
