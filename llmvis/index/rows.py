"""The rows of an index without their vectors: metadata, ids, which are alive, which fulfil a condition.

Reads metadata and the bitmap of deleted rows alone, so that what needs no vectors (deleting, leaving out what
is there already) does not read them. Rows are global: they count the deleted ones too. Knows no faiss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from llmvis.index.manifest import SOURCE
from llmvis.index.shard import read_metadata, several
from llmvis.index.where import mask, parse_where
from llmvis.storage import StorageError, Store

I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Rows:
    """Metadata of every shard, memory-mapped, each file checked by its hash; and which rows are alive.

    Raises `StorageError` where a file is damaged, or not what the manifest says.
    """

    def __init__(self, store: Store, manifest: dict[str, Any]) -> None:
        self.total = int(manifest["rows"])
        self._shards: list[dict[str, Any]] = manifest["shards"]
        counts = [shard["rows"] for shard in self._shards]
        self._firsts = np.cumsum([0, *counts], dtype=np.int64)[:-1]
        self._tables = several(lambda shard: read_metadata(store, shard), self._shards)
        self._columns = [
            [(name, table[name].combine_chunks()) for name in table.column_names] for table in self._tables
        ]  # a row of a column is found in a third of the time that a row of a table is
        self.living: Mask | None = _living(store, manifest) if "deleted" in manifest else None
        """`(total,)`; None where nothing is deleted."""
        self.count = self.total - (manifest["deleted"]["rows"] if "deleted" in manifest else 0)
        """Rows that are alive."""

    @property
    def fields(self) -> list[pa.Field]:
        """The columns of any shard, in order of appearance, each with the type that it has first."""
        found: dict[str, pa.Field] = {}
        for table in self._tables:
            for field in table.schema:
                found.setdefault(field.name, field)
        return list(found.values())

    def allowed(self, where: str | None) -> Mask | None:
        """Living rows that fulfil a condition: `(total,)`, None for all. A column that a shard lacks is null there.

        Raises `WhereError` for a condition that cannot be read.
        """
        if where is None:
            return self.living
        fields = {field.name: field for field in self.fields}
        condition = parse_where(where, list(fields))
        found = np.zeros(self.total, np.bool_)
        for first, table in zip(self._firsts, self._tables, strict=True):
            for name in fields.keys() - set(table.column_names):
                table = table.append_column(name, pa.nulls(table.num_rows, fields[name].type))
            found[first : first + table.num_rows] = mask(table, condition)
        if self.living is not None:
            found &= self.living
        return found

    def metadata(self, rows: I64) -> list[dict[str, Any]]:
        """The metadata of global rows `(N,)`, in their order; `SOURCE` is a place in the manifest's `sources`."""
        found = []
        shards = np.searchsorted(self._firsts, rows, side="right") - 1
        for shard, place in zip(shards.tolist(), (rows - self._firsts[shards]).tolist(), strict=True):
            row = {name: column[place].as_py() for name, column in self._columns[shard]}
            found.append({**row, SOURCE: self._shards[shard]["source"]})
        return found

    def columns(self, rows: I64, names: Sequence[str]) -> pa.Table:
        """These text columns of the metadata of global rows `(N,)`, in their order, and `SOURCE` (see `metadata`)."""
        order = np.argsort(rows, kind="stable")
        ends = np.searchsorted(rows[order], [*self._firsts[1:], self.total])
        schema = pa.schema([*((name, pa.string()) for name in names), (SOURCE, pa.int64())])
        found, begin = [schema.empty_table()], 0
        for number, end in enumerate(ends):
            here = (
                self._tables[number]
                .select(list(names))
                .take(pa.array(rows[order[begin:end]] - self._firsts[number]))
            )
            source = pa.array(np.full(end - begin, self._shards[number]["source"], np.int64))
            found.append(here.append_column(SOURCE, source).cast(schema))
            begin = end
        back = np.empty(len(rows), np.int64)
        back[order] = np.arange(len(rows))
        return pa.concat_tables(found).take(pa.array(back))

    def batches(self, rows: int) -> Iterator[tuple[I64, pa.Table]]:
        """Living rows `(N,)` and the metadata of each, with `SOURCE`, in order, at most `rows` at a time."""
        for first, table, shard in zip(self._firsts, self._tables, self._shards, strict=True):
            for at in range(0, table.num_rows, rows):
                part = table.slice(at, rows)
                numbers = first + np.arange(at, at + part.num_rows)
                source = pa.array(np.full(part.num_rows, shard["source"], np.int64))
                part = part.append_column(SOURCE, source)
                if self.living is not None:
                    alive = self.living[numbers]
                    numbers, part = numbers[alive], part.filter(pa.array(alive))
                yield numbers, part

    def ids(self) -> set[str]:
        """The `id` of every living row."""
        found: set[str] = set()
        for first, table in zip(self._firsts, self._tables, strict=True):
            column = table["id"]
            if self.living is not None:
                column = column.filter(pa.array(self.living[first : first + len(column)]))
            found.update(column.to_pylist())
        return found

    def rows_of(self, ids: pa.Array) -> I64:
        """The global row of each of `ids (N,)`, texts, among the living: the first one; -1 where there is none.

        Reads every id of the index once, shard by shard; memory goes with N.
        """
        asked = ids.cast(pa.string()).dictionary_encode()
        first_row = np.full(len(asked.dictionary), -1, np.int64)
        for rows, places in self._with(asked.dictionary):
            new = first_row[places] < 0
            rows, places = rows[new], places[new]
            first_row[places[::-1]] = rows[::-1]  # of several the first: the last that is written stays
        found: I64 = np.append(first_row, -1)[asked.indices.fill_null(len(first_row)).to_numpy()]
        return found

    def having(self, ids: pa.Array) -> tuple[Mask, Mask]:
        """Of `ids (N,)`, different texts: `(total,)` the living rows that have one; `(N,)` those that one has."""
        found, known = np.zeros(self.total, np.bool_), np.zeros(len(ids), np.bool_)
        for rows, places in self._with(ids):
            found[rows], known[places] = True, True
        return found, known

    def _with(self, ids: pa.Array) -> Iterator[tuple[I64, I64]]:
        """For each shard its living rows whose id is one of `ids`, which are all different; and which one."""
        for first, table in zip(self._firsts, self._tables, strict=True):
            places = pc.index_in(table["id"], value_set=ids, skip_nulls=True).combine_chunks()
            rows = np.flatnonzero(places.is_valid().to_numpy(zero_copy_only=False))
            if self.living is not None:
                rows = rows[self.living[first + rows]]
            yield first + rows, places.take(pa.array(rows)).to_numpy().astype(np.int64)

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._tables, self._columns = [], []


def _living(store: Store, manifest: dict[str, Any]) -> Mask:
    """`(rows,)`: what the bitmap of deleted rows leaves. Rows that it does not reach were added later: alive."""
    deleted, total = manifest["deleted"], int(manifest["rows"])
    data = np.frombuffer(store.read_checked(deleted["name"], deleted["sha256"]), np.uint8)
    dead = np.unpackbits(data, count=total, bitorder="little").astype(np.bool_)
    if len(data) != deleted["bytes"] or np.count_nonzero(dead) != deleted["rows"]:
        raise StorageError(
            f"{store.place(deleted['name'])} does not mark {deleted['rows']:,} rows of {total:,} as deleted; "
            "build the index anew"
        )
    return ~dead
