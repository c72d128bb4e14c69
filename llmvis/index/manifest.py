"""What an index's folder holds and says of itself: manifests, and the check of each before it is believed.

    CURRENT                → `000001 <sha256 of its manifest>`
    manifests/000001.json  → model, dimension, kind, shards with their hashes
    shards/000001-00000.npy, .arrow      fp16 vectors and metadata
    shards/000001-00000.lists            of an approximate index: compressed vectors in inverted lists
    shards/000001.trained                its centroids and ranges, from which every shard's lists are made
    shards/000002.deleted                a bit for each row, least bit first: the deleted ones

`rows` and global rows count the deleted ones too: they stay in their shards until an index is compacted.

Whoever can write an index can write a right hash too, so a manifest is checked like any foreign file.
Knows no faiss.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from llmvis.index.planner import KINDS
from llmvis.schema import FORMAT_VERSION, UserError
from llmvis.storage import StorageError, Store, open_store, sha256_bytes

SOURCE = "_source"
"""In a hit's metadata: which of the index's sources opens its picture."""

_ENDINGS = {"vectors": "npy", "metadata": "arrow", "lists": "lists"}


class QueryShapeError(UserError):
    """A question that no index can answer: no k, or a vector that is not finite."""


class IndexMismatchError(StorageError):
    """An index that does not go with the model or the question."""


@dataclass(frozen=True, kw_only=True)
class IndexInfo:
    """What an index is of: the encoder that made its vectors and the collection they stand for."""

    model: dict[str, Any]  # name, fingerprint, dim, licence
    source: dict[str, Any]  # opens the pictures again: sources.open_reader


def read_info(path: str) -> dict[str, Any]:
    """The manifest of the index at `path`, checked, without opening its vectors."""
    return read_current(open_store(path))


def read_current(store: Store) -> dict[str, Any]:
    """The manifest in force. Raises `StorageError` where there is none or it is not one of ours."""
    if not store.exists("CURRENT"):
        raise StorageError(f"{store.uri} is no index; make one with python -m jobs.index")
    match = re.fullmatch(rb"(\d{6}) ([0-9a-f]{64})\n", store.read("CURRENT"))
    if match is None:
        raise StorageError(f"{store.place('CURRENT')} is damaged; build the index anew")
    name = f"manifests/{match[1].decode()}.json"
    manifest = store.parse_object(name, store.read_checked(name, match[2].decode()))
    if manifest.get("format") != FORMAT_VERSION or manifest.get("kind") not in KINDS:
        raise StorageError(
            f"{store.uri} has format {manifest.get('format')}, kind {manifest.get('kind')!r}; "
            "this version cannot read it"
        )
    if problem := _problem(manifest):
        raise StorageError(f"{store.uri}: {name} is not one of llmvis: {problem}; build the index anew")
    return manifest


def manifest_hash(manifest: dict[str, Any]) -> str:
    """Hex sha256 of what a version of an index is: the same for the same files in the same order."""
    return sha256_bytes(json.dumps(manifest, sort_keys=True).encode())


def check_fingerprint(store: Store, manifest: dict[str, Any], fingerprint: str) -> None:
    """Raises `IndexMismatchError` unless the index was made by the encoder of that fingerprint."""
    model = manifest["model"]
    if model["fingerprint"] != fingerprint:
        raise IndexMismatchError(
            f"{store.uri} was made with {model['name']} ({model['fingerprint'][:12]}…), the query comes from a model "
            f"with fingerprint {fingerprint[:12]}…; search with the same model, or encode anew"
        )


def _problem(manifest: dict[str, Any]) -> str | None:
    """What is wrong with a manifest, whose hash is right: whoever can write an index can write that too."""
    model, sources, shards = (manifest.get(key) for key in ("model", "sources", "shards"))
    if not isinstance(model, dict) or not _whole(model.get("dim"), 1):
        return "it names no model with a dimension"
    if not all(isinstance(model.get(key), str) for key in ("name", "fingerprint")):
        return "its model has no name and fingerprint"
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        return "it has no list of sources"
    if not isinstance(shards, list):
        return "it has no list of shards"
    approximate = manifest["kind"] != "flat"
    parts = ("vectors", "metadata", "lists") if approximate else ("vectors", "metadata")
    for shard in shards:
        if not isinstance(shard, dict) or not _whole(shard.get("rows"), 1):
            return "a shard has no number of rows"
        if not _whole(shard.get("source"), 0) or shard["source"] >= len(sources):
            return f"a shard is of source {shard.get('source')!r}"
        for part in parts:
            if problem := _bad_file(shard.get(part), rf"shards/\d{{6}}-\d{{5}}\.{_ENDINGS[part]}"):
                return f"a shard's {part} {problem}"
    if approximate:
        if problem := _bad_file(manifest.get("trained"), r"shards/\d{6}\.trained"):
            return f"what it was trained to {problem}"
        if not all(_number(shard["lists"].get("fit")) for shard in shards):
            return "a shard's lists do not say how vectors fit them"
        if problem := _bad_tuning(manifest):
            return problem
    rows = sum(shard["rows"] for shard in shards)
    if manifest.get("rows") != rows:
        return f"it counts {manifest.get('rows')!r} rows for {rows}"
    return _bad_deleted(manifest["deleted"], rows) if "deleted" in manifest else None


def _bad_file(file: Any, pattern: str) -> str | None:
    if not isinstance(file, dict) or not isinstance(file.get("sha256"), str):
        return "has no hash"
    if not re.fullmatch(pattern, str(file.get("name"))):
        return f"is said to lie in {file.get('name')!r}"
    return None


def _bad_deleted(deleted: Any, rows: int) -> str | None:
    """What is wrong with the entry of the deleted rows. The bitmap is of the rows there were when it was written."""
    if problem := _bad_file(deleted, r"shards/\d{6}\.deleted"):
        return f"its list of deleted rows {problem}"
    if not _whole(deleted.get("bytes"), 1) or deleted["bytes"] > (rows + 7) // 8:
        return f"its list of deleted rows has {deleted.get('bytes')!r} bytes for {rows} rows"
    if not _whole(deleted.get("rows"), 1) or deleted["rows"] > rows:
        return f"it counts {deleted.get('rows')!r} deleted rows of {rows}"
    return None


def _bad_tuning(manifest: dict[str, Any]) -> str | None:
    tuned, trained = manifest.get("tuned"), manifest["trained"]
    if not _whole(trained.get("rows"), 1) or not all(
        _number(trained.get(key)) for key in ("fit", "share_of_exact")
    ):
        return "it does not say what it was trained for"
    if isinstance(tuned, dict) and not _number(tuned.get("share_of_exact")):
        return "it does not say what a search costs"
    if not isinstance(manifest.get("factory"), str):
        return "it does not say how its vectors are compressed"
    if not isinstance(tuned, dict) or not all(_whole(tuned.get(key), 1) for key in ("nprobe", "candidates")):
        return "it does not say how many lists and candidates a search looks at"
    if not all(_share(tuned.get(key)) for key in ("recall_at_10", "target")):
        return "it has no measured recall"
    if not _whole(tuned.get("queries"), 1) or not isinstance(tuned.get("queries_are"), str):
        return "it does not say what its recall was measured on"
    return None


def _whole(value: object, least: int) -> bool:
    return type(value) is int and value >= least


def _number(value: object) -> bool:
    return type(value) in (int, float)


def _share(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1
