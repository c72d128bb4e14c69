"""Many queries to an index, as the job engine wants it: read on CPUs, searched in actors, a shard in one search.

Queries are texts, vectors, or the pictures of an index. Each actor opens the index once, memory-mapped, so that
all actors of a node share its pages. Knows no Ray and no concrete model.

Shape legend: Q queries, k hits, D dimensions.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from llmvis.index import SOURCE, Index, Rows, manifest_hash, open_index, read_info
from llmvis.models.protocols import Encoder
from llmvis.schema import UserError
from llmvis.sources.base import LISTING_CHUNK, SourceError, can_carry, carried, listing_table
from llmvis.sources.queries import OURS, Queries, Read, asked
from llmvis.storage import open_store

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Row = dict[str, Any]

TEXTS = 64
"""Texts that go to an encoder at once."""
HITS = pa.list_(
    pa.struct(
        [
            ("rank", pa.int32()),
            ("id", pa.string()),
            ("score", pa.float32()),
            ("path", pa.string()),
            ("caption", pa.string()),
        ]
    )
)
"""Of one query, best first; `score` is the cosine, `path` where people find the picture."""


_LISTED = ("id", "path", "caption", "locator", "caption_truncated")
"""Columns of an index that become the listing's own, or mean nothing beside the picture."""


class IndexMovedError(UserError):
    """The index is not the one that was planned with; the message says what to do."""


def results_schema(source: Queries) -> pa.Schema:
    """What a bulk search writes, a row a query: `text` is null for vectors, `caption` is of a picture asked for."""
    caption = [pa.field("caption", pa.string())] if source.pictures else []
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("path", pa.string(), nullable=False),
            pa.field("text", pa.string()),
            *caption,
            pa.field("hits", HITS, nullable=False),
            *source.user_columns,
        ]
    )


class IndexQueries:
    """The pictures of an index as queries, in its order, those that are deleted left out. Opens no vectors."""

    pictures, texts = True, False

    def __init__(self, index: str) -> None:
        self._store = open_store(index)
        self.manifest = read_info(index)
        with Rows(self._store, self.manifest) as rows:
            fields = rows.fields
        self._others = [f for f in fields if f.name not in _LISTED and can_carry(f.type)]
        self.user_columns = carried(self._others, index, OURS)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "index queries",
            "root": self._store.uri,
            "shown_root": "",
            "version": self.manifest["version"],
            "sha256": manifest_hash(self.manifest),
        }

    def notes(self) -> list[str]:
        return []

    def listing(self) -> Iterator[pa.Table]:
        """The locator is the global row."""
        roots = [source["shown_root"] for source in self.manifest["sources"]]
        for rows, table in Rows(self._store, self.manifest).batches(LISTING_CHUNK):
            if table.num_rows and not pc.all(pc.match_substring_regex(table["id"], "^[0-9a-f]{32}$")).as_py():
                raise SourceError(f"{self._store.uri} has ids that llmvis did not make; build it anew")
            listed = {
                "id": table["id"].to_pylist(),
                "path": _places(table, roots),
                "locator": [str(row).encode() for row in rows],
                "caption": table["caption"].to_pylist(),
            }
            own = [
                table[f.name].cast(f.type).combine_chunks()
                if f.name in table.column_names
                else pa.nulls(len(rows), f.type)
                for f in self._others
            ]
            yield listing_table(listed, pa.table(own, schema=pa.schema(self.user_columns)))


@dataclass(frozen=True, kw_only=True)
class ReadRows:
    """Listing rows of an index's pictures → rows, and their global rows `int64 (Q, 1)`: the actor has the vectors."""

    def __call__(self, rows: pa.Table) -> Read:
        numbers = np.array([int(locator) for locator in rows["locator"].to_pylist()], np.int64)
        return asked(rows, texts=False), numbers[:, None], [], {"read": 0.0}


@dataclass(frozen=True, kw_only=True)
class Search:
    """Rows of queries → rows with `hits`.

    Args:
        encoder: for texts; None where queries are vectors.
        asked: whose rows the queries are; None where they are texts or vectors. A picture is no hit of its own.
        min_score: hits with a lower cosine are left out.
    """

    index: Index
    encoder: Encoder | None
    asked: Index | None
    k: int
    where: str | None
    exact: bool
    min_score: float | None

    def __call__(self, rows: pa.Table, arrays: npt.NDArray[Any]) -> tuple[pa.Table, list[Row]]:
        vectors = self._vectors(rows, arrays)
        more = int(self.asked is not None)
        scores, found = self.index.search(vectors, self.k + more, where=self.where, exact=self.exact)
        hit = self.index.columns(found.reshape(-1), ["id", "path", "caption"])
        keep = np.ones(found.shape, bool)
        if self.min_score is not None:
            keep &= scores >= self.min_score
        if self.asked is not None:
            own = rows["id"].combine_chunks().take(pa.array(np.repeat(np.arange(len(found)), found.shape[1])))
            keep &= ~pc.equal(hit["id"], own).to_numpy().reshape(found.shape)
        keep &= np.cumsum(keep, axis=1) <= self.k
        chosen = hit.filter(pa.array(keep.reshape(-1)))
        roots = [source["shown_root"] for source in self.index.sources]
        struct = pa.StructArray.from_arrays(
            [
                pa.array(np.cumsum(keep, axis=1)[keep], pa.int32()),
                chosen["id"].combine_chunks(),
                pa.array(scores[keep], pa.float32()),
                pa.array(_places(chosen, roots), pa.string()),
                chosen["caption"].combine_chunks(),
            ],
            fields=list(HITS.value_type),
        )
        offsets = np.concatenate([[0], np.cumsum(keep.sum(axis=1))]).astype(np.int32)
        return rows.append_column("hits", pa.ListArray.from_arrays(pa.array(offsets), struct)), []

    def _vectors(self, rows: pa.Table, arrays: npt.NDArray[Any]) -> F32:
        if self.encoder is not None:
            texts = rows["text"].to_pylist()
            parts = [self.encoder.encode_texts(texts[at : at + TEXTS]) for at in range(0, len(texts), TEXTS)]
            return np.concatenate(parts).astype(np.float32)
        if self.asked is None:
            return np.asarray(arrays, np.float32)
        vectors = self.asked.vectors(arrays[:, 0])
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)  # fp16 has rounded them
        vectors /= np.where(lengths > 0, lengths, 1)
        return vectors


def _places(table: pa.Table, roots: list[str]) -> list[str]:
    """Where people find each picture, from `path` and `SOURCE`."""
    pairs = zip(table[SOURCE].to_pylist(), table["path"].to_pylist(), strict=True)
    return [posixpath.join(roots[source], path) for source, path in pairs]


@dataclass(frozen=True, kw_only=True)
class Version:
    """An index as it was when a job was planned: where, which version, and the hash of what that is."""

    path: str
    number: int
    sha256: str

    @classmethod
    def of(cls, path: str, manifest: dict[str, Any]) -> Version:
        return cls(path=open_store(path).uri, number=manifest["version"], sha256=manifest_hash(manifest))

    def open(self) -> Index:
        """The index at this version, every file checked. Raises `IndexMovedError` where another one is in force."""
        index = open_index(self.path)
        if manifest_hash(index.manifest) != self.sha256:
            raise IndexMovedError(
                f"{self.path} was at version {self.number} when this job was planned, and is at version "
                f"{index.manifest['version']} now: one job searches one version. Give the job a new --out to search "
                "the new one"
            )
        return index


@dataclass(frozen=True, kw_only=True)
class LoadSearch:
    """Opens the index in the actor, and loads the model where there are texts; neither is sent around."""

    load: Callable[[], Encoder] | None
    index: Version
    asked: Version | None
    k: int
    where: str | None = None
    exact: bool = False
    min_score: float | None = None

    def __call__(self) -> Search:
        index = self.index.open()
        encoder = self.load() if self.load else None
        model = index.manifest["model"]
        if encoder is not None and encoder.info.fingerprint != model["fingerprint"]:
            raise UserError(
                f"the model {encoder.info.name} on this node is not the one that made the index ({model['name']}): "
                "install the same files, or name it with --model"
            )
        same = self.asked is not None and self.asked.sha256 == self.index.sha256
        return Search(
            index=index, encoder=encoder,
            asked=index if same else self.asked.open() if self.asked else None,
            k=self.k, where=self.where, exact=self.exact, min_score=self.min_score,
        )  # fmt: skip
