"""Made pictures → a data set: scored, judged by gates, and written again, as the job engine wants it.

    ReadMade + Score     pass 1: what the gates need to know of each picture
    judged               between: all rows at once (`gates.decide`)
    ReadMade + Keep      pass 2: what stays, in the data set's own form

Knows no Ray and no concrete model.

Shape legend: N rows, D embedding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmvis.gates import (
    GateConfig,
    GateRows,
    cross_modal,
    decide,
    is_blank,
    load_scorer,
    picture_digest,
    scores,
)
from llmvis.images import decode
from llmvis.ledger import dead_row
from llmvis.models.protocols import Encoder, Preprocess
from llmvis.schema import ItemError, Reason
from llmvis.sources.made import MadeReader

Row = dict[str, Any]
Read = tuple[pa.Table, npt.NDArray[np.uint8], list[Row], dict[str, float]]
LOOKED_AT = pa.schema(
    [
        ("id", pa.string()),
        ("group", pa.string()),
        ("caption", pa.string()),
        ("user_score", pa.float32()),
        ("blank", pa.bool_()),
        ("digest", pa.string()),
    ]
)


def scored_schema(dim: int) -> pa.Schema:
    """What pass 1 writes: a row a picture; `embedding` fp16 of unit length, `score` its cosine with its text."""
    return pa.schema([*LOOKED_AT, ("score", pa.float32()), ("embedding", pa.list_(pa.float16(), dim))])


@dataclass(frozen=True, kw_only=True)
class LookAtMade:
    """Pass 1 on CPUs: made rows → what is seen without a model, and pictures for the encoder.

    A picture that cannot be decoded is a dead letter.
    """

    reader: MadeReader
    preprocess: Preprocess
    scorer: str | None

    def __call__(self, rows: pa.Table) -> Read:
        begun = time.perf_counter()
        made = self.reader.rows(rows["locator"].to_pylist()).select(
            ["id", "image", "caption", "prompt", "source_id"]
        )
        read = time.perf_counter()
        scorer = load_scorer(self.scorer) if self.scorer else None
        kept, arrays, dead = list[Row](), list[npt.NDArray[np.uint8]](), list[Row]()
        for row in made.to_pylist():
            try:
                image = decode((row["image"] or {}).get("bytes") or b"").image
            except ItemError as error:
                dead.append(dead_row(row["id"], f"{row['id']}.png", "decode", error))
                continue
            caption = row["caption"] or row["prompt"] or ""
            seen = {"blank": is_blank(image), "digest": picture_digest(image), "caption": caption}
            if scorer is not None:
                seen["user_score"] = float(scores(scorer, [image], [caption])[0])
            kept.append({"id": row["id"], "group": row["source_id"] or row["prompt"], **seen})
            arrays.append(self.preprocess(image))
        seconds = {"read": read - begun, "decode": time.perf_counter() - read}
        ready = np.stack(arrays) if arrays else np.zeros((0, 1, 1, 3), np.uint8)
        return pa.Table.from_pylist(kept, LOOKED_AT), ready, dead, seconds


@dataclass(frozen=True, kw_only=True)
class Score:
    """Pass 1 in actors: rows and pictures → embeddings, and how well each picture fits its text."""

    encoder: Encoder

    def __call__(self, rows: pa.Table, pictures: npt.NDArray[np.uint8]) -> tuple[pa.Table, list[Row]]:
        seen = self.encoder.encode_images(pictures)
        fit = cross_modal(seen, self.encoder.encode_texts(rows["caption"].to_pylist()))
        column = pa.FixedSizeListArray.from_arrays(
            pa.array(seen.astype(np.float16).reshape(-1)), seen.shape[1]
        )
        table = rows.append_column("score", pa.array(fit, pa.float32())).append_column("embedding", column)
        return table, []


@dataclass(frozen=True, kw_only=True)
class LoadScore:
    """Loads the encoder in the actor, from a name."""

    load: Callable[[], Encoder]

    def __call__(self) -> Score:
        return Score(encoder=self.load())


Nearest = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]
"""Of an index: unit vectors float32 (N, D) → the highest cosine of each, float32 (N,)."""


def judged(
    tables: Iterable[pa.Table], config: GateConfig, nearest: Nearest | None = None
) -> dict[str, tuple[Reason, str]]:
    """Pass 1's rows, all of them in order → the refused ones by id, each with its reason and a figure.

    Memory: 2 D bytes a row for the embeddings.
    """
    if not (found := list(tables)):
        return {}
    table = pa.concat_tables(found).combine_chunks()
    dim = table.schema.field("embedding").type.list_size
    column = table["embedding"].combine_chunks()
    vectors = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    rows = GateRows(
        group=table["group"].to_pylist(),
        blank=table["blank"].to_numpy(zero_copy_only=False),
        score=table["score"].to_numpy(),
        user_score=table["user_score"].to_numpy(zero_copy_only=False),
        digest=table["digest"].to_pylist(),
        embedding=vectors,
        index_cosine=None if nearest is None else nearest(vectors.astype(np.float32)),
    )
    reasons = decide(rows, config)
    ids, fits = table["id"].to_pylist(), table["score"].to_pylist()
    return {
        row_id: (reason, f"score {fit:.4f}")
        for row_id, reason, fit in zip(ids, reasons, fits, strict=True)
        if reason is not None
    }


def no_pictures(dead: Iterable[pa.Table]) -> dict[str, tuple[Reason, str]]:
    """Pass 1's dead letters by id: what cannot be decoded or scored stays out of the set too."""
    return {row["id"]: (Reason(row["reason"]), row["detail"]) for table in dead for row in table.to_pylist()}


@dataclass(frozen=True, kw_only=True)
class ReadMade:
    """Pass 2 on CPUs: the rows that stay, whole."""

    reader: MadeReader

    def __call__(self, rows: pa.Table) -> Read:
        begun = time.perf_counter()
        made = self.reader.rows(rows["locator"].to_pylist())
        return made, np.zeros((len(made), 0), np.uint8), [], {"read": time.perf_counter() - begun}


class Keep:
    """Pass 2 in actors: nothing is left to be done."""

    def __call__(self, rows: pa.Table, arrays: npt.NDArray[np.uint8]) -> tuple[pa.Table, list[Row]]:
        return rows, []
