"""What a build that may be killed has finished: each file by what it was made from, so that the next one takes it over.

Noted in `shards/building.json` by the driver alone, under the index's lock. Knows nothing of vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llmvis.index.parts import Each
from llmvis.storage import StorageError, Store

BUILDING = "shards/building.json"

_PARTS = ("vectors", "metadata")


class Done:
    """Entries of a manifest (a file, or a shard of two files) that are made already, by key."""

    def __init__(self, store: Store) -> None:
        self._store = store
        try:
            self._entries = store.read_json(BUILDING)
        except (FileNotFoundError, StorageError):
            self._entries = {}

    def get(self, key: str, *names: str) -> dict[str, Any] | None:
        """The entry of `key` if its files have these names and are whole; it is made anew otherwise."""
        entry = self._entries.get(key) if key else None
        if not isinstance(entry, dict):
            return None
        files = [entry] if "name" in entry else [entry[part] for part in _PARTS if part in entry]
        try:
            if files and [file["name"] for file in files] != list(names):
                return None
            for file in files:
                self._store.fetch(file["name"], file["sha256"])
        except (StorageError, KeyError, TypeError):
            return None
        return entry

    def note(self, key: str, entry: dict[str, Any]) -> dict[str, Any]:
        """Remembers a finished entry, and returns it."""
        if key:
            self._entries[key] = entry
            self._store.write_json(BUILDING, self._entries)
        return entry

    def each(
        self,
        each: Each,
        function: Callable[[Any], dict[str, Any]],
        work: Sequence[tuple[str, list[str], Any]],
        *,
        what: str,
    ) -> list[dict[str, Any]]:
        """The entries of `(key, names, item)`, in order: `function(item)`, but for those that are done."""
        found = [self.get(key, *names) for key, names, _ in work]
        todo = [at for at, entry in enumerate(found) if entry is None]
        for place, entry in each(function, [work[at][2] for at in todo], what=what):
            at = todo[place]
            found[at] = self.note(work[at][0], entry)
        return [entry for entry in found if entry is not None]
