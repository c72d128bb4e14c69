"""Made pictures as a collection: the rows that manifests of finished jobs name, and no other file.

Knows no models and no pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from llmvis.ledger import read_manifest
from llmvis.schema import MAKERS, ItemError, Reason
from llmvis.sources.base import SourceError, listing_table
from llmvis.storage import open_store, rows_of_job

T = TypeVar("T")

Refused = Mapping[str, tuple[Reason, str]]
"""Why gates refused rows, by id."""


class MadeSource:
    """Rows of one or several finished jobs of `MAKERS`, in the order given; ids stay as they are.

    Args:
        refused: rows that become dead letters of the reason given.
        about: JSON-able, part of the fingerprint: the gates and what they judged by.

    Raises:
        SourceError: a job wrote no Parquet, or no row at all.
        StorageError: a job is not finished.
    """

    user_columns: list[pa.Field] = []  # noqa: RUF012 - rows are read whole, by MadeReader

    def __init__(
        self, folders: Sequence[str], *, refused: Refused | None = None, about: dict[str, Any] | None = None
    ) -> None:
        self._files: list[dict[str, Any]] = []
        self.models: list[dict[str, Any]] = []
        for folder in folders:
            store = rows_of_job(folder)
            manifest = read_manifest(store, *MAKERS)
            for file in manifest["files"]:
                if not file["name"].endswith(".parquet"):
                    raise SourceError(
                        f"{store.uri} is no data set in Parquet, and only such can be read again"
                    )
                self._files.append({"store": store.uri, **file})
            models = manifest.get("models", [manifest["model"]])
            self.models += [model for model in models if model not in self.models]
        if not self._files:
            raise SourceError(f"{', '.join(map(str, folders))}: finished, and without a single picture")
        self._refused, self._about = refused or {}, about
        self.schema = pa.unify_schemas(
            [_with_table(file, lambda table: table.schema_arrow) for file in self._files]
        )

    def describe(self) -> dict[str, Any]:
        gates = {} if self._about is None else {"gates": self._about}
        return {
            "kind": "made",
            "root": self._files[0]["store"],
            "shown_root": "",
            "files": self._files,
            **gates,
        }

    def notes(self) -> list[str]:
        return []

    def listing(self) -> Iterator[pa.Table]:
        """Rows in the order of files; the locator is `file:row group:row`."""
        for number, file in enumerate(self._files):
            for group, rows in enumerate(_with_table(file, _ids_and_captions)):
                ids = rows["id"].to_pylist()
                found = [self._refused.get(i, (None, None)) for i in ids]
                yield listing_table(
                    {
                        "id": ids,
                        "path": [f"{i}.png" for i in ids],
                        "locator": [f"{number}:{group}:{at}".encode() for at in range(len(ids))],
                        "caption": rows["caption"].to_pylist(),
                        "reason": [None if reason is None else str(reason) for reason, _ in found],
                        "detail": [detail for _, detail in found],
                    }
                )


class MadeReader:
    """Reads whole rows of made pictures by `file:row group:row`; small and picklable."""

    def __init__(self, description: dict[str, Any], schema: pa.Schema) -> None:
        self._files, self._schema = description["files"], schema

    def rows(self, locators: Sequence[bytes]) -> pa.Table:
        """Rows in the order of the locators, under the schema of all files. Raises `ItemError` if a file is gone."""
        wanted: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for place, locator in enumerate(locators):
            file, group, row = map(int, locator.split(b":"))
            wanted.setdefault((file, group), []).append((row, place))
        tables, places = [], list[int]()
        for (file, group), rows in wanted.items():
            try:
                found = _with_table(self._files[file], lambda table, at=group: table.read_row_group(at))  # type: ignore[misc]
            except (OSError, pa.ArrowException) as error:
                raise ItemError(Reason.UNREADABLE, f"{self._files[file]['name']}: {error}") from error
            tables.append(found.take([row for row, _ in rows]))
            places += [place for _, place in rows]
        if not tables:
            return self._schema.empty_table()
        joined = pa.concat_tables(tables, promote_options="default").combine_chunks()
        order = sorted(range(len(places)), key=places.__getitem__)
        columns = [
            joined[field.name] if field.name in joined.column_names else pa.nulls(len(joined), field.type)
            for field in self._schema
        ]
        return pa.Table.from_arrays(columns, schema=self._schema).take(order)


def _with_table(file: dict[str, Any], use: Callable[[pq.ParquetFile], T]) -> T:
    """What `use` gives of an open file of a manifest, wherever it lies."""
    store = open_store(file["store"])

    def opened() -> T:
        with store.open(file["name"]) as data, pq.ParquetFile(data) as table:
            return use(table)

    return store.attempt(opened)


def _ids_and_captions(table: pq.ParquetFile) -> list[pa.Table]:
    """One table a row group."""
    groups = range(table.num_row_groups)
    return [table.read_row_group(group, columns=["id", "caption"]) for group in groups]
