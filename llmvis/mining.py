"""Neighbours at or above a cosine → groups of near-same pictures, and which of each could go.

What a search of an index with its own pictures wrote is read file by file; in memory are the pictures that
have a neighbour, and the pairs. Two pictures are in one group if a chain of pairs links them. A picture with
more near-same ones than hits were asked for is linked to the others through those it found: where copies
are that many, they find each other in turn. What no chain reaches stays apart. Opens no vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from llmvis.index import SOURCE, Rows, read_info
from llmvis.ledger import parquet_bytes, read_data, read_manifest
from llmvis.report import QueryResult, sheet
from llmvis.schema import ItemError
from llmvis.search import Hit, read_pictures
from llmvis.storage import Store, open_store

I64 = npt.NDArray[np.int64]
SHOWN_GROUPS, SHOWN_PICTURES = 12, 6
DUPLICATES = pa.schema(
    [
        ("group", pa.int64()),
        ("id", pa.string()),
        ("path", pa.string()),
        ("kept", pa.bool_()),
        ("cosine", pa.float32()),
    ]
)
"""A row a picture of a group: groups and pictures in the index's order, the first of a group is kept. `cosine` is
that with the kept one; null where only others link them."""


def write_duplicates(store: Store, index: str) -> dict[str, Any]:
    """`duplicates.parquet`, `redundant.txt` and `duplicates.png` of the finished search in `store`.

    redundant.txt: ids of the pictures that are not kept, one a line. duplicates.png: some pictures of the
    largest groups. Returns `{groups, pictures, redundant}`.
    """
    table = duplicates(store)
    store.write("duplicates.parquet", parquet_bytes(table))
    redundant = table.filter(pc.invert(table["kept"]))["id"].to_pylist()
    store.write("redundant.txt", "".join(f"{row_id}\n" for row_id in redundant).encode())
    with store.written("duplicates.png") as path:
        _draw(table, index, path)
    return {
        "groups": table.num_rows - len(redundant),
        "pictures": table.num_rows,
        "redundant": len(redundant),
    }


def duplicates(store: Store) -> pa.Table:
    """The groups as `DUPLICATES`, from the hits in the finished search in `store`."""
    numbers: dict[str, int] = {}  # of each picture that is in a pair
    pairs: list[npt.NDArray[Any]] = [np.empty((2, 0), np.int64)]
    scores = [np.empty(0, np.float32)]
    for table in _tables(store):
        hits = table["hits"].combine_chunks()
        counts = pc.list_value_length(hits).to_numpy()
        flat = hits.flatten()
        asked = np.repeat(table["id"].to_numpy(), counts)
        ends = [
            [numbers.setdefault(i, len(numbers)) for i in ids]
            for ids in (asked, flat.field("id").to_pylist())
        ]
        pairs.append(np.array(ends, np.int64).reshape(2, -1))
        scores.append(flat.field("score").to_numpy())
    pair = np.concatenate(pairs, axis=1)
    ids, paths, order = [""] * len(numbers), [""] * len(numbers), np.zeros(len(numbers), np.int64)
    row = 0
    for table in _tables(store):
        for row_id, path in zip(table["id"].to_pylist(), table["path"].to_pylist(), strict=True):
            if (number := numbers.get(row_id)) is not None:
                ids[number], paths[number], order[number] = row_id, path, row
            row += 1
    place = np.argsort(order)  # numbers in the index's order
    rank = np.empty_like(place)
    rank[place] = np.arange(len(place))
    root = linked(rank[pair], len(numbers))  # of each rank the least that it is linked with
    cosine = _with_kept(rank[pair], np.concatenate(scores), root)
    rows = np.lexsort((np.arange(len(root)), root))
    kept = root == np.arange(len(root))
    group = np.cumsum(kept)[root] - 1
    return pa.table(
        [
            pa.array(group[rows]),
            pa.array([ids[place[r]] for r in rows], pa.string()),
            pa.array([paths[place[r]] for r in rows], pa.string()),
            pa.array(kept[rows]),
            pa.array(cosine[rows], pa.float32(), mask=np.isnan(cosine[rows])),
        ],
        schema=DUPLICATES,
    )


def linked(pairs: I64, count: int) -> I64:
    """Of `count` things, with `pairs (2, P)` of them linked: the least that a chain links each with, `(count,)`."""
    root = list(range(count))

    def find(one: int) -> int:
        while root[one] != one:
            root[one] = root[root[one]]
            one = root[one]
        return one

    for left, right in pairs.T.tolist():
        a, b = find(left), find(right)
        root[max(a, b)] = min(a, b)
    return np.array([find(one) for one in range(count)], np.int64)


def _with_kept(pairs: I64, scores: npt.NDArray[np.float32], root: I64) -> npt.NDArray[np.float32]:
    """The cosine of each with the kept one of its group: 1 for that itself, NaN where there is no pair of the two."""
    found = np.full(len(root), np.nan, np.float32)
    for one, other in (pairs, pairs[::-1]):
        direct = root[one] == other
        found[one[direct]] = scores[direct]
    found[root == np.arange(len(root))] = 1
    return found


def _tables(store: Store) -> Iterator[pa.Table]:
    for file in read_manifest(store, "search")["files"]:
        yield read_data(store, file).select(["id", "path", "hits"])


def _draw(table: pa.Table, index: str, path: Path) -> None:
    """A sheet with a row of pictures for each of the largest groups."""
    sizes = np.bincount(table["group"].to_numpy()) if table.num_rows else np.empty(0, np.int64)
    largest = np.argsort(-sizes, kind="stable")[:SHOWN_GROUPS]
    shown = {
        group: table.filter(pc.equal(table["group"], int(group))).slice(0, SHOWN_PICTURES)
        for group in largest
    }
    wanted = pa.array([row_id for rows in shown.values() for row_id in rows["id"].to_pylist()], pa.string())
    store, manifest = open_store(index), read_info(index)
    with Rows(store, manifest) as rows:
        places = rows.rows_of(wanted)
        known = {row["id"]: row for row in rows.metadata(places[places >= 0])}
    results = []
    for group, rows in shown.items():
        hits = [_hit(rank, row, known[row["id"]]) for rank, row in enumerate(rows.to_pylist(), 1)]
        found = [
            None if isinstance(data, ItemError) else data for data in read_pictures(manifest["sources"], hits)
        ]
        text = f"group {group}: {sizes[group]:,} pictures"
        results.append(QueryResult(text=text, hits=list(zip(hits, found, strict=True))))
    sheet(results, path, columns=SHOWN_PICTURES)


def _hit(rank: int, row: dict[str, Any], known: dict[str, Any]) -> Hit:
    score = f"{row['cosine']:.3f} " if row["cosine"] is not None and not row["kept"] else ""
    return Hit(
        rank=rank, id=row["id"], score=row["cosine"] or 0.0, path=row["path"],
        caption=score + (known["caption"] or Path(row["path"]).name), width=known["width"],
        height=known["height"], locator=known["locator"], source=known[SOURCE],
    )  # fmt: skip
