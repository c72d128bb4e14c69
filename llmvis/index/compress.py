"""Makes shards of vectors an approximate index: trains on a sample, writes each shard's lists, measures recall.

Samples and lists are made shard by shard by functions that can run anywhere; training is one of its own.
Knows of models only a function from texts to vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import faiss
import numpy as np

from llmvis.index.ann import ListShards, train, write_lists
from llmvis.index.done import Done
from llmvis.index.exact import BLOCK_ROWS, F16, F32, I64, Shard, take
from llmvis.index.parts import Each
from llmvis.index.planner import IndexPlan
from llmvis.index.shard import open_vectors, read_metadata
from llmvis.index.tune import tune
from llmvis.storage import Store, open_store, sha256_bytes, sha256_file

EncodeTexts = Callable[[Sequence[str]], F32 | None]
"""Texts → `float32 (B, D)`, unit length; None where that cannot be done."""

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
    each: Each,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """What the manifest of an approximate index has beside that of an exact one; its `shards` with `lists`.

    shards: all of them; those that have lists keep them. old: the manifest of the version whose trained
    index stays in use; None: one is trained.
    """
    done = Done(store)
    if old is None:
        factory = plan.factory
        trained = _train(store, shards, plan, f"shards/{version:06}.trained", done, each)
    else:
        factory, trained = old["factory"], old["trained"]
    listed = _with_lists(store, shards, plan.dim, trained, done, each)
    say(f"tune for recall {plan.recall}")
    tuned = _measure(store, listed, plan, trained, encode_texts)
    if old is None:
        cost = {"share_of_exact": tuned["share_of_exact"]}
        trained = trained | {"rows": plan.rows, "fit": mean_fit(listed), **cost}
    return {"factory": factory, "trained": trained, "shards": listed, "tuned": tuned}


def mean_fit(shards: Sequence[dict[str, Any]]) -> float:
    """The mean cosine of vectors with their list's centroid, over shards."""
    rows = [shard["rows"] for shard in shards]
    return round(float(np.average([shard["lists"]["fit"] for shard in shards], weights=rows)), 4)


class _SampleOf(NamedTuple):
    uri: str
    shard: dict[str, Any]
    dim: int
    rows: int
    seed: tuple[int, int]


def sample(of: _SampleOf) -> F16:
    """`float16 (rows, dim)` of a shard, chosen by chance, the same for one seed."""
    vectors = open_vectors(open_store(of.uri), of.shard, of.dim)
    chosen = np.random.default_rng(of.seed).choice(len(vectors), of.rows, replace=False, shuffle=False)
    return vectors[np.sort(chosen)]


class _Training(NamedTuple):
    sample: F16
    factory: str


def train_sample(given: _Training) -> bytes:
    """The trained index, without vectors."""
    return train(given.sample.astype(np.float32), given.factory, SEED)


def _train(
    store: Store, shards: Sequence[dict[str, Any]], plan: IndexPlan, name: str, done: Done, each: Each
) -> dict[str, Any]:
    told = " ".join(shard["vectors"]["sha256"] for shard in shards)
    key = sha256_bytes(f"{plan.factory} {SEED} {plan.train_rows} {faiss.__version__} {told}".encode())
    if found := done.get(key, name):
        return found
    share = plan.train_rows / plan.rows
    asked = [
        _SampleOf(store.uri, shard, plan.dim, min(shard["rows"], int(np.ceil(shard["rows"] * share))), (SEED, at))
        for at, shard in enumerate(shards)
    ]  # fmt: skip
    some: dict[int, F16] = dict(each(sample, asked, what="sample"))
    training = _Training(np.concatenate([some[at] for at in range(len(shards))]), plan.factory)
    ((_, blob),) = each(train_sample, [training], what="train", alone=True)
    store.write(name, blob)
    return done.note(key, {"name": name, "bytes": len(blob), "sha256": sha256_bytes(blob)})


class _ListsOf(NamedTuple):
    uri: str
    name: str
    shard: dict[str, Any]
    dim: int
    first: int
    trained: dict[str, Any]


def make_lists(of: _ListsOf) -> dict[str, Any]:
    """Writes a shard's inverted lists; what the manifest says of them. The trained index is checked by its hash."""
    store = open_store(of.uri)
    blob = store.read_checked(of.trained["name"], of.trained["sha256"])
    vectors = open_vectors(store, of.shard, of.dim)
    with store.written(of.name) as path:
        fit = write_lists(blob, _decoded(Shard(of.first, vectors)), path)
        file = {"name": of.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
    return {**file, "fit": round(fit, 4)}


def _with_lists(
    store: Store, shards: Sequence[dict[str, Any]], dim: int, trained: dict[str, Any], done: Done, each: Each
) -> list[dict[str, Any]]:
    wanted, first = list[tuple[int, str, _ListsOf]](), 0
    for at, shard in enumerate(shards):
        if "lists" not in shard:
            name = shard["vectors"]["name"].removesuffix(".npy") + ".lists"
            key = sha256_bytes(f"{trained['sha256']} {shard['vectors']['sha256']} {first}".encode())
            wanted.append((at, key, _ListsOf(store.uri, name, shard, dim, first, trained)))
        first += shard["rows"]
    made = done.each(each, make_lists, [(key, [of.name], of) for _, key, of in wanted], what="lists")
    listed = list(shards)
    for (at, _, _), lists in zip(wanted, made, strict=True):
        listed[at] = {**listed[at], "lists": lists}
    return listed


def _decoded(shard: Shard) -> Iterator[tuple[int, F32]]:
    for at in range(0, len(shard.vectors), BLOCK_ROWS):
        yield shard.first + at, shard.vectors[at : at + BLOCK_ROWS].astype(np.float32)


def _measure(
    store: Store, shards: Sequence[dict[str, Any]], plan: IndexPlan, trained: dict[str, Any],
    encode_texts: EncodeTexts | None,
) -> dict[str, Any]:  # fmt: skip
    """The tuning, on captions where there are some and a model to read them, else on vectors of the index."""
    chance = np.random.default_rng(SEED)
    firsts = np.cumsum([0, *(shard["rows"] for shard in shards)])
    chosen, rows = [], 0
    for number in chance.permutation(len(shards)):
        chosen.append(int(number))
        rows += shards[number]["rows"]
        if rows >= TUNE_ROWS:
            break
    some = [Shard(int(firsts[n]), open_vectors(store, shards[n], plan.dim)) for n in sorted(chosen)]
    blob = store.read_checked(trained["name"], trained["sha256"])
    files = [shards[n]["lists"] for n in sorted(chosen)]
    paths = [store.fetch(file["name"], file["sha256"]) for file in files]
    captions = [] if encode_texts is None else _captions(store, [shards[n] for n in chosen], chance)
    queries = encode_texts(captions) if encode_texts and captions else None
    own: I64 | None = None
    kind = "captions"
    if queries is None:
        each = np.concatenate([shard.first + np.arange(len(shard.vectors)) for shard in some])
        own = np.sort(chance.choice(each, min(TUNE_QUERIES, len(each)), replace=False))
        queries, kind = take(some, own).astype(np.float32), "pictures, a proxy"
    with ListShards(blob, paths, [len(shard.vectors) for shard in some], plan.dim) as lists:
        tuned = tune(lists, some, queries, target=plan.recall, rows=plan.rows, own=own)
    return {**tuned, "queries": len(queries), "queries_are": kind, "measured_rows": rows}


def _captions(store: Store, shards: Sequence[dict[str, Any]], chance: np.random.Generator) -> list[str]:
    """Different captions, chosen by chance."""
    found: set[str] = set()
    for shard in shards:
        table = read_metadata(store, shard)
        if "caption" in table.column_names:
            column = table["caption"].drop_null().unique()
            some = chance.choice(len(column), min(TUNE_QUERIES, len(column)), replace=False)
            found |= {str(caption) for caption in column.take(np.sort(some)).to_pylist()}
    ordered = sorted(caption for caption in found if caption.strip())
    return [str(caption) for caption in chance.permutation(np.array(ordered, object))[:TUNE_QUERIES]]
