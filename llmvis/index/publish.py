"""The steps by which every change of an index becomes the version in force: number, manifest, CURRENT, sweep.

New files come first and CURRENT last, so a reader has one version or the next and never a mix. Call all of it
under the store's lock. Knows nothing of what a version holds.
"""

from __future__ import annotations

import json
import re
from typing import Any

from llmvis.folders import files_of_versions, kept_versions
from llmvis.storage import Store, sha256_bytes


def next_version(store: Store) -> int:
    """A number that no version has, not even one whose build was killed."""
    return 1 + max(kept_versions(store), default=0)


def in_force(store: Store) -> int:
    """The version that readers open now; 0 where there is none that they can."""
    match = re.match(rb"(\d{6}) ", store.read("CURRENT")) if store.exists("CURRENT") else None
    return int(match[1]) if match else 0


def publish(store: Store, manifest: dict[str, Any]) -> None:
    """Makes `manifest` the version in force, and removes all but it and the one that it `replaces`."""
    name = f"{manifest['version']:06}"
    data = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
    store.write(f"manifests/{name}.json", data)
    store.write("CURRENT", f"{name} {sha256_bytes(data)}\n".encode())
    sweep(store, manifest)


def sweep(store: Store, current: dict[str, Any]) -> None:
    """Removes all but the current version and the one that it replaced: a reader may be opening that one.

    What tasks that died left unfinished goes, too.
    """
    store.clear_unfinished()
    stay = (current["version"], current.get("replaces", current["version"] - 1))
    kept = [version for version in kept_versions(store) if version in stay]
    store.sweep("manifests", {f"manifests/{version:06}.json" for version in kept})
    store.sweep("shards", files_of_versions(store, kept))
