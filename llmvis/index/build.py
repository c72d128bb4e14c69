"""Builds an index, adds to one, compacts one: shards of vectors and metadata, lists where it is approximate, the swap.

    parts → shards (anywhere) → sample → train once → lists of each shard (anywhere) → tune → manifest → CURRENT

A build writes new files and then swaps CURRENT, so a reader has one version or the next and never a
mix, and a build that is killed changes nothing for readers; run again, it takes over what was finished.
It does not know where vectors come from, what a picture is, or what `each` runs its work on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from llmvis.index.compress import EncodeTexts, compress
from llmvis.index.done import Done
from llmvis.index.manifest import IndexInfo, check_fingerprint, manifest_hash, read_current
from llmvis.index.parts import Each, InMemory, NewShard, OldShard, Part, in_turn, pieces, write_shard
from llmvis.index.planner import IndexPlan, plan_kind
from llmvis.index.publish import in_force, next_version, publish, sweep
from llmvis.index.rows import Rows
from llmvis.schema import FORMAT_VERSION
from llmvis.storage import Store, open_store


def build(
    store: Store,
    info: IndexInfo,
    parts: Iterable[Part | pa.Table],
    *,
    plan: IndexPlan | None = None,
    add: bool = False,
    encode_texts: EncodeTexts | None = None,
    each: Each = in_turn,
    say: Callable[[str], None] = lambda line: None,
    counts: Counter[str] | None = None,
) -> dict[str, Any]:
    """Publishes a new version from parts with an `embedding` column (`fixed_size_list<float>[D]`).

    All other columns become metadata; a table is a part of `info.source`. Call it under `store.lock()`.
    Returns the manifest.

    Args:
        plan: kind, recall and size of shards; lists are counted anew from the rows that really come.
            None: exact.
        add: the rows of the current version stay, and of the new ones those come in whose `id` it
            does not have, or has deleted. Kind, recall and lists are the current version's.
        encode_texts: with it an approximate index is tuned on captions, if there are any; else on
            its own pictures, which are easier to find.
        each: what runs the work on shards.
        say: takes a line on what is done next.
        counts: is told what became of the rows, as `write_shard` counts.

    Raises:
        IndexMismatchError: a part's dimension is not the model's, or what is added to is of another model.
        IndexPlanError: an approximate index of no rows.
        StorageError: there is nothing to add to.
    """
    plan = plan or plan_kind("flat", 0, int(info.model["dim"]), 1.0)
    whole = [InMemory(table=p, source=info.source) if isinstance(p, pa.Table) else p for p in parts]
    store.clear_unfinished()  # of a build that was killed: may be gigabytes
    old = None
    if add:
        old = read_current(store)
        check_fingerprint(store, old, info.model["fingerprint"])
    work = _Work(store, info.model, plan, encode_texts, each, say, counts)
    return work.add(old, whole) if old else work.new(whole, None)


def compact(
    store: Store,
    *,
    plan: IndexPlan,
    retrain: bool = False,
    encode_texts: EncodeTexts | None = None,
    each: Each = in_turn,
    say: Callable[[str], None] = lambda line: None,
    counts: Counter[str] | None = None,
) -> dict[str, Any]:
    """Publishes a version of the living rows alone, in full shards; the rest is as `build` has it.

    The trained index stays in use, unless `retrain` is set or the plan is of another kind.
    """
    store.clear_unfinished()
    old = read_current(store)
    dim, parts, first = int(old["model"]["dim"]), list[Part](), 0
    with Rows(store, old) as rows:
        living = rows.living
    for shard in old["shards"]:
        source, dead = old["sources"][shard["source"]], None
        if living is not None:
            dead = np.packbits(~living[first : first + shard["rows"]], bitorder="little").tobytes()
        first += shard["rows"]
        parts.append(OldShard(uri=store.uri, shard=shard, dim=dim, source=source, dead=dead))
    keep = old if plan.kind == old["kind"] != "flat" and not retrain else None
    return _Work(store, old["model"], plan, encode_texts, each, say, counts).new(parts, keep)


@lru_cache(maxsize=1)
def _rows(uri: str, sha256: str) -> Rows:
    store = open_store(uri)
    manifest = read_current(store)
    assert manifest_hash(manifest) == sha256, "nobody publishes while an addition holds the lock"
    return Rows(store, manifest)


@dataclass(frozen=True)
class Known:
    """Which ids the index at `uri` has: of a `(N,)` column, bool `(N,)`.

    `sha256` is its `manifest_hash`, not its version, which an index that takes its place would have too.
    """

    uri: str
    sha256: str

    def __call__(self, ids: pa.Array) -> npt.NDArray[np.bool_]:
        return _rows(self.uri, self.sha256).rows_of(ids) >= 0


@dataclass(frozen=True)
class _Work:
    """One version in the making."""

    store: Store
    model: dict[str, Any]
    plan: IndexPlan
    encode_texts: EncodeTexts | None
    each: Each
    say: Callable[[str], None]
    counts: Counter[str] | None

    def new(self, parts: Sequence[Part], trained: dict[str, Any] | None) -> dict[str, Any]:
        """A version of these parts alone, with the trained index of the manifest `trained` or one of its own."""
        sources: list[dict[str, Any]] = []
        shards = self._shards(parts, sources, None)
        return self._publish(shards, sources, self.plan.kind, self.plan.recall, trained, None)

    def add(self, old: dict[str, Any], parts: Sequence[Part]) -> dict[str, Any]:
        """The version `old`, and what it lacks of these parts."""
        sources = list(old["sources"])
        shards = self._shards(parts, sources, Known(self.store.uri, manifest_hash(old)))
        if not shards:
            sweep(self.store, old)  # all of it was there; the run that put it there may have been killed then
            return old
        recall = old["tuned"]["target"] if "tuned" in old else 1.0
        kept = old if old["kind"] != "flat" else None
        return self._publish(
            [*old["shards"], *shards], sources, old["kind"], recall, kept, old.get("deleted")
        )

    @property
    def _version(self) -> int:
        return next_version(self.store)

    def _shards(
        self, parts: Sequence[Part], sources: list[dict[str, Any]], known: Known | None
    ) -> list[dict[str, Any]]:
        """Writes shards; `sources` gets those that it lacks."""
        groups = list(pieces(parts, self.plan.shard_rows))
        news = [
            NewShard(
                self.store.uri, f"shards/{self._version:06}-{at:05}", group, int(self.model["dim"]), known
            )
            for at, group in enumerate(groups)
        ]
        work = [(new.key, [f"{new.name}.npy", f"{new.name}.arrow"], new) for new in news]
        made = Done(self.store).each(self.each, write_shard, work, what="shards")
        shards = []
        for group, entry in zip(groups, made, strict=True):
            shard = dict(entry)
            counted = shard.pop("counts")
            if self.counts is not None:
                self.counts.update(counted)
            if shard["rows"]:
                source = group[0].part.source
                if source not in sources:
                    sources.append(source)
                shards.append({**shard, "source": sources.index(source)})
        return shards

    def _publish(
        self,
        shards: list[dict[str, Any]],
        sources: list[dict[str, Any]],
        kind: str,
        recall: float,
        trained: dict[str, Any] | None,
        deleted: dict[str, Any] | None,
    ) -> dict[str, Any]:
        rows = sum(shard["rows"] for shard in shards)
        manifest = {
            "format": FORMAT_VERSION,
            "version": self._version,
            # not always the number before: a build that was killed has one, too
            "replaces": in_force(self.store),
            "kind": kind,
            "metric": "inner_product",
            "dtype": "float16",
            "model": self.model,
            "sources": sources,
            "rows": rows,
            "shards": shards,
            "faiss": faiss.__version__,
        }
        if deleted is not None:
            manifest["deleted"] = deleted
        if kind != "flat":
            final = plan_kind(kind, rows, int(self.model["dim"]), recall)  # type: ignore[arg-type]
            manifest |= compress(
                self.store, final, shards, self._version,
                old=trained, encode_texts=self.encode_texts, each=self.each, say=self.say,
            )  # fmt: skip
        publish(self.store, manifest)
        return manifest
