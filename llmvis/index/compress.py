"""Makes shards of vectors an approximate index: trains on a sample, writes each shard's lists, measures recall.

Training and lists take nearly all the time of a build, so each is noted in `shards/building.json` when it
is done, with its hash and what it was made from. A build that comes after one that was killed takes over
what it would make again. Knows of models only a function from texts to vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from llmvis.index.ann import ListShards, train, write_lists
from llmvis.index.exact import BLOCK_ROWS, F32, I64, Shard, take
from llmvis.index.opened import read_vectors
from llmvis.index.planner import IndexPlan
from llmvis.index.tune import tune
from llmvis.storage import StorageError, Store, sha256_bytes, sha256_file

EncodeTexts = Callable[[Sequence[str]], F32 | None]
"""Texts → `float32 (B, D)`, unit length; None where that cannot be done."""

BUILDING = "shards/building.json"
SEED = 0
TUNE_QUERIES = 512
TUNE_ROWS = 2_000_000
"""Recall is measured on whole shards, chosen by chance, of so many rows or a few more."""


def compress(
    store: Store,
    plan: IndexPlan,
    shards: Sequence[dict[str, Any]],
    version: int,
    *,
    old: dict[str, Any] | None,
    encode_texts: EncodeTexts | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """What the manifest of an approximate index has beside that of an exact one; its `shards` with `lists`.

    shards: all of them; those of `old`, the version that is added to, have their lists.
    """
    vectors = _open_vectors(store, shards)
    done = _Done(store)
    if old is None:
        factory = plan.factory
        trained = _train(store, vectors, plan, f"shards/{version:06}.trained", done, say)
    else:
        factory, trained = old["factory"], old["trained"]
    blob = store.read_checked(trained["name"], trained["sha256"])
    listed = []
    for number, (shard, part) in enumerate(zip(shards, vectors, strict=True), 1):
        if "lists" not in shard:
            say(f"lists of shard {number:,} of {len(shards):,}")
            name = shard["vectors"]["name"].removesuffix(".npy") + ".lists"
            key = f"{trained['sha256']} {shard['vectors']['sha256']} {part.first}"
            write = partial(write_lists, blob, _decoded(part))
            shard = {**shard, "lists": done.once(key, name, write)}
        listed.append(shard)
    say(f"tune for recall {plan.recall}")
    tuned = _measure(store, listed, vectors, blob, plan, encode_texts)
    return {"factory": factory, "trained": trained, "shards": listed, "tuned": tuned}


class _Done:
    """Finished files of a build that may have been killed, by what they were made from."""

    def __init__(self, store: Store) -> None:
        self._store = store
        try:
            self._files = store.read_json(BUILDING)
        except (FileNotFoundError, StorageError):
            self._files = {}

    def once(self, key: str, name: str, write: Callable[[Path], object]) -> dict[str, Any]:
        """The file's entry; `write` makes it, unless a whole one of this name and key is there."""
        file = self._files.get(key)
        if isinstance(file, dict) and file.get("name") == name:
            try:
                self._store.fetch(name, str(file.get("sha256")))
                return file
            except StorageError:
                pass  # gone or damaged: made anew
        with self._store.written(name) as path:
            write(path)
            file = {"name": name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
        self._files[key] = file
        self._store.write_json(BUILDING, self._files)
        return file


def _open_vectors(store: Store, shards: Sequence[dict[str, Any]]) -> list[Shard]:
    found, first = [], 0
    for shard in shards:
        path = store.fetch(shard["vectors"]["name"], shard["vectors"]["sha256"])
        found.append(Shard(first, read_vectors(path)))
        first += shard["rows"]
    return found


def _decoded(shard: Shard) -> Iterator[tuple[int, F32]]:
    for at in range(0, len(shard.vectors), BLOCK_ROWS):
        yield shard.first + at, shard.vectors[at : at + BLOCK_ROWS].astype(np.float32)


def _train(
    store: Store, vectors: list[Shard], plan: IndexPlan, name: str, done: _Done, say: Callable[[str], None]
) -> dict[str, Any]:
    say(f"train {plan.lists:,} lists on {plan.train_rows:,} vectors")
    chosen = np.random.default_rng(SEED).choice(plan.rows, plan.train_rows, replace=False, shuffle=False)
    sample = take(vectors, np.sort(chosen)).astype(np.float32)
    key = sha256_bytes(f"{plan.factory} {SEED} {faiss.__version__} ".encode() + sample.tobytes())
    return done.once(key, name, lambda path: path.write_bytes(train(sample, plan.factory, SEED)))


def _measure(
    store: Store, shards: Sequence[dict[str, Any]], vectors: Sequence[Shard], blob: bytes, plan: IndexPlan,
    encode_texts: EncodeTexts | None,
) -> dict[str, Any]:  # fmt: skip
    """The tuning, on captions where there are some and a model to read them, else on vectors of the index."""
    chance = np.random.default_rng(SEED)
    chosen, rows = [], 0
    for number in chance.permutation(len(shards)):
        chosen.append(int(number))
        rows += len(vectors[number].vectors)
        if rows >= TUNE_ROWS:
            break
    some = [vectors[number] for number in sorted(chosen)]
    lists = ListShards(
        blob,
        [
            store.fetch(shards[number]["lists"]["name"], shards[number]["lists"]["sha256"])
            for number in sorted(chosen)
        ],
        [len(shard.vectors) for shard in some],
        plan.dim,
    )
    captions = [] if encode_texts is None else _captions(store, [shards[n] for n in chosen], chance)
    queries = encode_texts(captions) if encode_texts and captions else None
    own: I64 | None = None
    kind = "captions"
    if queries is None:
        each = np.concatenate([shard.first + np.arange(len(shard.vectors)) for shard in some])
        own = np.sort(chance.choice(each, min(TUNE_QUERIES, len(each)), replace=False))
        queries, kind = take(some, own).astype(np.float32), "pictures, a proxy"
    tuned = tune(lists, some, queries, target=plan.recall, rows=plan.rows, own=own)
    return {**tuned, "queries": len(queries), "queries_are": kind, "measured_rows": rows}


def _captions(store: Store, shards: Sequence[dict[str, Any]], chance: np.random.Generator) -> list[str]:
    """Different captions, chosen by chance."""
    found: set[str] = set()
    for shard in shards:
        path = store.fetch(shard["metadata"]["name"], shard["metadata"]["sha256"])
        with pa.memory_map(str(path)) as mapped:
            table = pa.ipc.open_file(mapped).read_all()
            if "caption" in table.column_names:
                column = table["caption"].drop_null().unique()
                some = chance.choice(len(column), min(TUNE_QUERIES, len(column)), replace=False)
                found |= {str(caption) for caption in column.take(pa.array(np.sort(some))).to_pylist()}
    ordered = sorted(caption for caption in found if caption.strip())
    return [str(caption) for caption in chance.permutation(np.array(ordered, object))[:TUNE_QUERIES]]
