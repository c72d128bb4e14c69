"""How many lists a search probes and how many candidates it reranks: the cheapest that meets the recall asked for.

Measured on queries against exact search. A candidate that is among the reranked has its exact score, so
recall is the share of true answers whose place in the compressed order is among the candidates: one
compressed search for each number of probes measures all numbers of candidates. What a setting costs is
counted in bytes that are read, not in seconds, which on a shared machine differ from run to run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llmvis.index.ann import ListShards
from llmvis.index.exact import F32, I64, Shard, nearest

TRUE = 10
"""Answers that recall is of."""
CANDIDATES = tuple(TRUE * 2**i for i in range(8))
STEP = 2**0.5
"""By which the lists probed grow from one try to the next."""
SEEK_BYTES = 8_192
"""Reading one vector at a random place takes as long as so many bytes in a row."""


def query_cost(rows: int, lists: int, code_bytes: int, dim: int, probes: int, candidates: int) -> int:
    """Bytes that a query reads: its lists' codes (with ids), and the vectors that it reranks."""
    return round(rows * probes / lists * (code_bytes + 8)) + candidates * (2 * dim + SEEK_BYTES)


def tune(
    lists: ListShards, shards: Sequence[Shard], queries: F32, *, target: float, rows: int, own: I64 | None
) -> dict[str, Any]:
    """`nprobe`, `candidates`, their `recall_at_10`, and the `curve` of settings none of which is beaten by another.

    A setting meets the target if its recall less one standard error does, so that other queries of the
    same kind find it met too. Where none does, the one of highest recall is chosen.

    lists, shards: the same shards, compressed and not. rows: of the whole index. own: the queries are
    vectors of these global rows; a row is no answer to itself.
    """
    dim = queries.shape[1]
    truth = nearest(shards, queries, TRUE + (own is not None))[1]
    if own is not None:
        truth = _without(truth, own)
    points: list[dict[str, Any]] = []
    probes, met = 1, 0
    while True:
        found = lists.search(
            queries, min(CANDIDATES[-1], sum(len(shard.vectors) for shard in shards)), probes
        )[1]
        place = _places(found, truth)
        for candidates in CANDIDATES:
            each = (place < candidates).mean(1)
            cost = query_cost(rows, lists.lists, lists.code_bytes, dim, probes, candidates)
            error = float(each.std() / len(each) ** 0.5)
            points.append(
                {"nprobe": probes, "candidates": candidates, "recall": float(each.mean()), "cost": cost}
                | {"sure": float(each.mean()) - error}
            )
        met += points[-1]["sure"] >= target
        if met == 3 or probes >= lists.lists:  # once more: probing more may let fewer candidates do
            break
        probes = min(max(probes + 1, round(probes * STEP)), lists.lists)
    good = [point for point in points if point["sure"] >= target]
    chosen = (
        min(good, key=lambda point: point["cost"])
        if good
        else max(points, key=lambda p: (p["recall"], -p["cost"]))
    )
    exact = rows * 2 * dim
    curve = [
        {"nprobe": p["nprobe"], "candidates": p["candidates"], "recall": round(p["recall"], 4)}
        | {"share_of_exact": round(p["cost"] / exact, 6)}
        for p in _front(points)
    ]
    return {
        "nprobe": chosen["nprobe"],
        "candidates": chosen["candidates"],
        "recall_at_10": round(chosen["recall"], 4),
        "share_of_exact": round(chosen["cost"] / exact, 6),
        "target": target,
        "curve": curve,
    }


def _without(truth: I64, own: I64) -> I64:
    """Each row of `truth (Q, k)` less the query's own, or less its last: `(Q, k - 1)`."""
    keep = truth != own[:, None]
    keep[keep.all(1), -1] = False
    others: I64 = truth[keep].reshape(len(truth), -1)
    return others


def _places(found: I64, truth: I64) -> I64:
    """Where in `found (Q, C)` each of `truth (Q, T)` is; C where it is not."""
    same = found[:, None, :] == truth[:, :, None]
    places: I64 = np.where(same.any(2), same.argmax(2), found.shape[1])
    return places


def _front(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By cost; each has a higher recall than all that cost less."""
    front: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["cost"], -p["recall"])):
        if not front or point["recall"] > front[-1]["recall"]:
            front.append(point)
    return front
