"""A collection's pictures, each once for every instruction and seed: the plan of a one-to-many job.

One listing row is one output, so a retry can neither lose nor repeat one. Knows no models and
no pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from llmvis.schema import Reason, item_id
from llmvis.sources.base import Source, SourceError

ADDED = [
    pa.field("source_id", pa.string()),
    pa.field("instruction", pa.string()),
    pa.field("seed", pa.int64()),
    pa.field("mask_locator", pa.binary()),
]
"""What each row carries beside the inner source's columns."""


class VariantSource:
    """`inner`'s rows × instructions × seeds, in that order.

    Args:
        instructions: what to do; or none, and `instruction_column` names a column of `inner`.
        masks: a source of masks, joined by path without its ending or, from one table, by place.
        about: JSON-able, part of the fingerprint.
    """

    def __init__(
        self, inner: Source, *, instructions: Sequence[str], seeds: Sequence[int],
        instruction_column: str | None = None, masks: Source | None = None,
    ) -> None:  # fmt: skip
        names = [field.name for field in inner.user_columns]
        if instruction_column is not None and instruction_column not in names:
            raise SourceError(
                f"there is no column {instruction_column!r} to take instructions from; "
                f"there are: {', '.join(names) or 'none'}"
            )
        self._inner, self._masks = inner, masks
        self._instructions = [None] if instruction_column else list(instructions)
        self._seeds, self._column = list(seeds), instruction_column
        added = {field.name for field in ADDED}
        self._names = [f"source_{name}" if name in added else name for name in names]
        kept = [
            field.with_name(name)
            for field, name in zip(inner.user_columns, self._names, strict=True)
            if name not in added
        ]
        self.user_columns = [*kept, *ADDED]

    def describe(self) -> dict[str, Any]:
        asked = {"instructions": self._instructions, "column": self._column, "seeds": self._seeds}
        masks = {} if self._masks is None else {"masks": self._masks.describe()}
        return {**self._inner.describe(), "variants": asked, **masks}

    def notes(self) -> list[str]:
        return self._inner.notes()

    def listing(self) -> Iterator[pa.Table]:
        """Chunks of the inner listing, each row repeated; ids are of source, instruction and seed."""
        masks = self._masks_by_key()
        row = 0
        for chunk in self._inner.listing():
            keys = [self._key(str(path), row + i) for i, path in enumerate(chunk["path"].to_pylist())]
            row += chunk.num_rows
            yield self._repeated(chunk, [masks.get(key) for key in keys])

    def _repeated(self, chunk: pa.Table, masks: list[bytes | None]) -> pa.Table:
        many = len(self._instructions) * len(self._seeds)
        place = np.repeat(np.arange(chunk.num_rows), many)
        table = chunk.take(pa.array(place))
        given = chunk[self._column].to_pylist() if self._column else None
        sources = chunk["id"].to_pylist()
        ids, instructions, seeds, found, reasons, details = [], [], [], [], [], []
        bad = list(zip(chunk["reason"].to_pylist(), chunk["detail"].to_pylist(), strict=True))
        for i, source in enumerate(sources):
            for instruction in self._instructions if given is None else [given[i]]:
                text = None if instruction is None else str(instruction)
                for seed in self._seeds:
                    ids.append(item_id(f"{source}\0{text}\0{seed}".encode("utf-8", "surrogatepass")))
                    instructions.append(text)
                    seeds.append(seed)
                    found.append(masks[i])
                    reason, detail = bad[i]
                    if reason is None and not (text or "").strip():
                        reason, detail = str(Reason.EMPTY), "no instruction in this row"
                    elif reason is None and self._masks is not None and masks[i] is None:
                        reason, detail = str(Reason.MISSING), "there is no mask of this name"
                    reasons.append(reason)
                    details.append(detail)
        columns: dict[str, pa.Array] = {
            "id": pa.array(ids, pa.string()),
            "reason": pa.array(reasons, pa.string()),
            "detail": pa.array(details, pa.string()),
        }
        for name, column in columns.items():
            table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
        table = table.rename_columns([*table.column_names[: -len(self._names) or None], *self._names])
        added = (
            pa.array(np.repeat(np.array(sources, object), many), pa.string()),
            pa.array(instructions, pa.string()),
            pa.array(seeds, pa.int64()),
            pa.array(found, pa.binary()),
        )
        for field, column in zip(ADDED, added, strict=True):
            table = table.append_column(field, column)
        return table

    def _masks_by_key(self) -> dict[str, bytes]:
        if self._masks is None:
            return {}
        found, row = {}, 0
        for chunk in self._masks.listing():
            for path, locator, reason in zip(
                *(chunk[name].to_pylist() for name in ("path", "locator", "reason")), strict=True
            ):
                if reason is None:
                    found[self._key(str(path), row)] = locator
                row += 1
        return found

    def _key(self, path: str, row: int) -> str:
        """What a picture and its mask share."""
        table = self._masks is not None and self._masks.describe()["kind"] == "parquet"
        return str(row) if table else str(PurePosixPath(path).with_suffix(""))
