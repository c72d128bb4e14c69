"""Deletes rows of an index: a new version with the same shards and a new bitmap of the rows that are dead.

Vectors and lists are neither read nor written, so it takes as long for a large index as its metadata take to
read. The rows stay in their shards, unseen, until the index is compacted. Knows no faiss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from llmvis.index.manifest import read_current
from llmvis.index.publish import in_force, next_version, publish, sweep
from llmvis.index.rows import Rows
from llmvis.schema import UserError
from llmvis.storage import Store, sha256_bytes

EXAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class Deletion:
    """What was deleted, or would be."""

    manifest: dict[str, Any]
    """Of the version that is in force now."""
    asked: int | None
    """Different ids that were given; None where none were."""
    not_found: int
    """Of these, those that no living row has."""
    deleted: int
    """Rows."""
    dead: int
    """Rows that are deleted in all, before and now."""
    examples: list[dict[str, Any]]
    """Metadata of a few of the rows."""

    @property
    def rows(self) -> int:
        """That stay."""
        return int(self.manifest["rows"]) - self.dead


def delete(
    store: Store, *, ids: pa.Array | None = None, where: str | None = None, dry_run: bool = False
) -> Deletion:
    """Publishes a version without the rows that have one of `ids` and fulfil `where`, of which one may be left out.

    Where there is no such row (any more), the version in force stays. Call it under `store.lock()`, but for a
    dry run, which writes nothing.

    Raises:
        StorageError: there is no index, or it is damaged.
        WhereError: a condition that cannot be read.
        UserError: neither ids nor a condition.
    """
    if ids is None and where is None:
        raise UserError("say what is to be deleted: --ids, --where, or both")
    manifest = read_current(store)
    with Rows(store, manifest) as rows:
        allowed = rows.allowed(where)
        chosen = np.ones(rows.total, np.bool_) if allowed is None else allowed
        asked, not_found = None, 0
        if ids is not None:
            given = ids.cast(pa.string()).unique().drop_null()
            having, known = rows.having(given)
            chosen = chosen & having
            asked, not_found = len(given), int(np.count_nonzero(~known))
        places = np.flatnonzero(chosen)
        examples = rows.metadata(places[:EXAMPLES])
        dead = chosen if rows.living is None else chosen | ~rows.living
    if len(places) and not dry_run:
        manifest = _publish(store, manifest, dead)
    elif not dry_run:
        sweep(store, manifest)  # the run that deleted them may have been killed before it did
    return Deletion(
        manifest=manifest, asked=asked, not_found=not_found, deleted=len(places),
        dead=int(np.count_nonzero(dead)), examples=examples,
    )  # fmt: skip


def _publish(store: Store, old: dict[str, Any], dead: np.ndarray) -> dict[str, Any]:
    store.clear_unfinished()
    version = next_version(store)
    data = np.packbits(dead, bitorder="little").tobytes()
    name = f"shards/{version:06}.deleted"
    store.write(name, data)
    deleted = {"name": name, "bytes": len(data), "sha256": sha256_bytes(data)}
    manifest = {
        **old,
        "version": version,
        "replaces": in_force(store),
        "deleted": {**deleted, "rows": int(np.count_nonzero(dead))},
    }
    publish(store, manifest)
    return manifest
