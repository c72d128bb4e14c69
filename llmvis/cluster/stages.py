"""What the job engine does to one shard: prepare it, apply the model, commit it. One Ray row each.

Between stages a shard travels as raw bytes: `head` (JSON), `rows` (Arrow) and `arrays`. Each
stage tells the tally when it begins and ends; where workers died over a shard, it is done item
by item in a child process and what is deadly becomes a dead letter (see `tally`, `careful`).
Knows no plan of a whole job and no model.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import ray

from llmvis.cluster import observe
from llmvis.cluster.careful import lacks_memory, one_by_one
from llmvis.cluster.tally import LOAD, at_work
from llmvis.ledger import Packing, dead_row, publish_shard
from llmvis.plan import DUPLICATE, read_shard
from llmvis.schema import DEAD_LETTER, ItemError, Reason
from llmvis.storage import open_store

Row = dict[str, Any]
Arrays = npt.NDArray[Any]
Prepared = tuple[pa.Table, Arrays, list[Row], dict[str, float]]
Applied = tuple[pa.Table, list[Row]]
ResultT = TypeVar("ResultT")


class Prepare(Protocol):
    """Runs in CPU tasks: listing rows → rows that can be used, one array row each, and dead letters.

    Picklable. Returns `(rows, array (N, …), dead rows, seconds by stage)`.
    """

    def __call__(self, rows: pa.Table) -> Prepared: ...


class Apply(Protocol):
    """Runs in an actor: prepared rows and arrays → output rows and dead letters."""

    def __call__(self, rows: pa.Table, arrays: Arrays, /) -> Applied: ...


def prepare_shard(row: Row, out: str, prepare: Prepare, tally: Any, limit: float) -> Row:
    """Stage 1, a task: reads and decodes one shard."""
    shard = int(row["shard"])
    observe.began(row["run"], shard, "prepare")
    listing = read_shard(open_store(out), shard)
    duplicate = pa.compute.equal(listing["reason"], DUPLICATE).fill_null(False)
    bad = listing.filter(pa.compute.and_not(listing["reason"].is_valid(), duplicate))
    dead = [
        dead_row(r["id"], r["path"], "list", ItemError(Reason(r["reason"]), r["detail"] or ""))
        for r in bad.select(["id", "path", "reason", "detail"]).to_pylist()
    ]
    good = listing.filter(listing["reason"].is_null())
    with at_work(tally, "prepare", shard, limit, by_item=True) as careful:
        done = None if careful else _unless_memory(lambda: prepare(good))
        rows, arrays, more, seconds = done or _prepare_one_by_one(prepare, good, limit, tally, shard)
    return {
        "head": json.dumps(
            {
                "shard": shard,
                "run": row["run"],
                "items": listing.num_rows,
                "duplicates": int(pa.compute.sum(duplicate).as_py() or 0),
                "shape": arrays.shape,
                "dtype": str(arrays.dtype),
                "dead": dead + more,
                "seconds": seconds,
            }
        ),
        "rows": to_bytes(rows),
        "arrays": np.ascontiguousarray(arrays).tobytes(),
    }


class ModelActor:
    """Stage 2, an actor: holds the model, which is loaded here and never sent."""

    def __init__(self, load: Callable[[], Apply], tally: Any, limit: float) -> None:
        self._load, self._tally, self._limit = load, tally, limit
        self._apply: Apply | None = None
        self._loaded()

    def __call__(self, row: Row) -> Row:
        head = json.loads(row["head"])
        observe.began(head["run"], head["shard"], "model")
        arrays = np.frombuffer(row["arrays"], head["dtype"]).reshape(head["shape"])
        rows = from_bytes(row["rows"])
        apply = self._loaded()
        begun = time.perf_counter()
        # when this shard would have been begun, had the model been there
        head["started"] = time.time() - sum(head["seconds"].values())
        if rows.num_rows:
            with at_work(self._tally, "model", head["shard"], self._limit, by_item=True) as careful:
                done = None if careful else _unless_memory(lambda: apply(rows, arrays))
                if done is None:
                    del apply
                    self._free()
                    done = _apply_one_by_one(
                        self._load, rows, arrays, self._limit, self._tally, head["shard"]
                    )
            rows, dead = done
            head["dead"] += dead
        head["seconds"]["model"] = time.perf_counter() - begun
        return {"head": json.dumps(head), "rows": to_bytes(rows)}

    def _loaded(self) -> Apply:
        if self._apply is None:
            me = ray.get_runtime_context().get_actor_id()  # the same after a restart
            with at_work(self._tally, LOAD, me, self._limit):
                self._apply = self._load()
        return self._apply

    def _free(self) -> None:
        """Gives the model's memory back: the child process needs it for its own copy."""
        self._apply = None
        gc.collect()
        if torch := sys.modules.get("torch"):
            torch.cuda.empty_cache()


def commit_shard(row: Row, out: str, schema: pa.Schema, packing: Packing, tally: Any, limit: float) -> Row:
    """Stage 3, a task: publishes the shard's files and its marker."""
    head = json.loads(row["head"])
    observe.began(head["run"], head["shard"], "commit")
    with at_work(tally, "commit", head["shard"], limit):
        rows = from_bytes(row["rows"])
        rows = rows.select(schema.names).cast(schema) if rows.num_rows else schema.empty_table()
        dead = pa.Table.from_pylist(head["dead"], DEAD_LETTER)
        marker = publish_shard(
            open_store(out), head["shard"], rows, dead, items=head["items"], duplicates=head["duplicates"],
            seconds=head["seconds"], started=head["started"], packing=packing,
        )  # fmt: skip
    observe.committed(head["run"], marker)
    return {"shard": head["shard"]}


def _unless_memory(work: Callable[[], ResultT]) -> ResultT | None:
    """The result, or None where memory did not suffice: alone, most items will do."""
    try:
        return work()
    except Exception as error:
        if lacks_memory(error):
            return None
        raise


def _prepare_one_by_one(prepare: Prepare, rows: pa.Table, limit: float, tally: Any, shard: int) -> Prepared:
    found = one_by_one(lambda: prepare, rows.num_rows, lambda i: (_row(rows, i),), limit=limit)
    tables, arrays, dead = list[pa.Table](), list[Arrays](), list[Row]()
    seconds: dict[str, float] = {}
    for at, one in enumerate(_told(found, tally, "prepare", shard)):
        if isinstance(one, ItemError):
            dead.append(_blamed(rows, at, "decode", one))
            continue
        table, array, more, spent = one
        dead += more
        seconds = {key: seconds.get(key, 0.0) + value for key, value in spent.items()}
        if table.num_rows:
            tables.append(table)
            arrays.append(array)
    if tables:
        return pa.concat_tables(tables), np.concatenate(arrays), dead, seconds
    none, empty, _, spent = prepare(rows.slice(0, 0))
    return none, empty, dead, seconds or spent


def _apply_one_by_one(
    load: Callable[[], Apply], rows: pa.Table, arrays: Arrays, limit: float, tally: Any, shard: int
) -> Applied:
    found = one_by_one(load, rows.num_rows, lambda i: (_row(rows, i), arrays[i : i + 1]), limit=limit)
    tables, dead = list[pa.Table](), list[Row]()
    for at, one in enumerate(_told(found, tally, "model", shard)):
        if isinstance(one, ItemError):
            dead.append(_blamed(rows, at, "model", one))
        else:
            tables.append(one[0])
            dead += one[1]
    # where none is left, the commit makes the empty table of the job's schema
    return (pa.concat_tables(tables) if tables else rows.slice(0, 0)), dead


def _told(found: Iterator[Any], tally: Any, stage: str, shard: int) -> Iterator[Any]:
    for one in found:
        tally.goes_on.remote(stage, shard)
        yield one


def _row(rows: pa.Table, at: int) -> pa.Table:
    """One row as a table of its own: a slice would be pickled with the whole table's buffers."""
    return rows.take(pa.array([at]))


def _blamed(rows: pa.Table, at: int, stage: str, error: ItemError) -> Row:
    row_id = rows["id"][at].as_py()
    source = rows["path"][at].as_py() if "path" in rows.column_names else row_id
    return dead_row(row_id, source, stage, error)


def to_bytes(table: pa.Table) -> bytes:
    """An Arrow table as IPC bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def from_bytes(data: bytes) -> pa.Table:
    """The table that `to_bytes` packed."""
    return pa.ipc.open_stream(pa.py_buffer(data)).read_all()
