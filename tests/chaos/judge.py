"""What came of a job, read from its files alone: it takes no count, no hash and no name on trust.

It uses nothing of llmvis but the names that its README promises. An engine job's folder is judged by
`judge_job`, an index by `judge_index`; `Watch` looks at a manifest all through a run.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

OURS = re.compile(
    r"(plan|manifest|report)\.json|\.lock|plan/\d{5}\.parquet|_commits/\d{6}\.json|_logs/[^/]+\.jsonl"
)
"""What may lie in a finished job's folder beside the files that its manifest names."""


@dataclass
class Verdict:
    """Counts of what must not be, and words for each."""

    lost: int = 0
    duplicated: int = 0
    unreadable: int = 0
    other: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not (self.lost or self.duplicated or self.unreadable or self.other)


def named_files(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """All files that an engine job's manifest or an index's one names."""
    of_shard = ("vectors", "metadata", "lists")
    shards = [shard[part] for shard in manifest.get("shards", []) for part in of_shard if part in shard]
    others = [manifest[part] for part in ("trained", "deleted") if part in manifest]
    return [*manifest.get("files", []), *manifest.get("dead", []), *shards, *others]


def unreadable(out: Path, manifest: dict[str, Any]) -> list[str]:
    """Names of files that are missing, are not what the manifest says, or do not open."""
    bad = []
    for file in named_files(manifest):
        try:
            data = (out / file["name"]).read_bytes()
            if len(data) != file["bytes"] or hashlib.sha256(data).hexdigest() != file["sha256"]:
                raise ValueError
            if (
                file["name"].endswith(".parquet")
                and pq.read_table(pa.BufferReader(data)).num_rows != file["rows"]
            ):
                raise ValueError
        except (OSError, ValueError, pa.ArrowInvalid):
            bad.append(file["name"])
    return bad


def manifest_of(out: Path) -> dict[str, Any]:
    """An engine job's manifest."""
    manifest: dict[str, Any] = json.loads((out / "manifest.json").read_bytes())
    return manifest


def rows_of(out: Path, part: str) -> list[dict[str, Any]]:
    """The rows of the manifest's `files` or `dead`."""
    manifest = manifest_of(out)
    return [row for file in manifest[part] for row in pq.read_table(out / file["name"]).to_pylist()]


def judge_job(out: Path, calm: Path) -> Verdict:
    """A finished job against one that nothing happened to: each item once, the same rows, nothing left lying."""
    verdict = Verdict()
    manifest = manifest_of(out)
    verdict.unreadable = len(unreadable(out, manifest))
    if verdict.unreadable:
        return verdict
    rows, dead = rows_of(out, "files"), rows_of(out, "dead")
    expected, expected_dead = rows_of(calm, "files"), rows_of(calm, "dead")
    found = Counter(row["id"] for row in rows + dead)
    asked = Counter(row["id"] for row in expected + expected_dead)
    verdict.lost, verdict.duplicated = (asked - found).total(), (found - asked).total()
    listed = sum(pq.read_metadata(file).num_rows for file in (out / "plan").iterdir())
    ledger = manifest["ledger"]
    if not listed == ledger["input"] == len(rows) + len(dead) + ledger["duplicates"]:
        verdict.other.append(f"{listed} items listed, books say {ledger}")
    for kind, these, those in (("rows", rows, expected), ("dead letters", dead, expected_dead)):
        if by_id(these) != by_id(those):
            verdict.other.append(f"other {kind} than without faults")
    named = {file["name"] for file in named_files(manifest)}
    lying = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} - named
    left = {name for name in lying if not OURS.fullmatch(name)}
    if left:
        verdict.other.append(f"left behind: {sorted(left)}")
    return verdict


def by_id(rows: list[dict[str, Any]]) -> list[str]:
    return sorted(repr(sorted(row.items())) for row in rows)


def current_index(out: Path) -> dict[str, Any]:
    """The manifest that CURRENT names. Raises `ValueError` where its hash is another."""
    version, sha256 = (out / "CURRENT").read_text().split()
    data = (out / "manifests" / f"{version}.json").read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"manifest {version} is not what CURRENT says")
    manifest: dict[str, Any] = json.loads(data)
    return manifest


def index_rows(out: Path) -> dict[str, bytes]:
    """id → vector of an index's living rows. Raises `ValueError` for an id that is there twice."""
    found: dict[str, bytes] = {}
    manifest = current_index(out)
    dead = np.zeros(manifest["rows"], np.uint8)
    if "deleted" in manifest:
        bits = np.fromfile(out / manifest["deleted"]["name"], np.uint8)
        dead = np.unpackbits(bits, count=len(dead), bitorder="little")
    rows = iter(dead)
    for shard in manifest["shards"]:
        ids = pa.ipc.open_file(out / shard["metadata"]["name"]).read_all()["id"].to_pylist()
        vectors = np.load(out / shard["vectors"]["name"])
        for row_id, vector in zip(ids, vectors, strict=True):
            if next(rows):
                continue
            if row_id in found:
                raise ValueError(f"{row_id} is there twice")
            found[row_id] = vector.tobytes()
    return found


def judge_index(out: Path, calm: Path) -> Verdict:
    """An index against one that nothing happened to: the same vectors under the same ids, nothing left lying."""
    verdict = Verdict()
    manifest, asked = current_index(out), current_index(calm)
    verdict.unreadable = len(unreadable(out, manifest))
    if verdict.unreadable:
        return verdict
    for part in ("kind", "rows"):  # rows: the dead ones too
        if manifest[part] != asked[part]:
            verdict.other.append(f"{part}: {manifest[part]} instead of {asked[part]}")
    try:
        found = index_rows(out)
    except ValueError:
        verdict.duplicated += 1
        return verdict
    expected = index_rows(calm)
    verdict.lost = len(expected.keys() - found.keys())
    verdict.duplicated = len(found.keys() - expected.keys())
    if found != expected:
        verdict.other.append("other vectors than without faults")
    kept = [json.loads(p.read_bytes()) for p in (out / "manifests").iterdir()]
    named = {file["name"] for one in kept for file in named_files(one)}
    lying = {f"shards/{p.name}" for p in (out / "shards").iterdir()} - named
    lying |= {p.name for p in out.rglob(".aside-*")}
    if lying or len(kept) > 2:
        verdict.other.append(f"left behind: {sorted(lying)}, {len(kept)} manifests")
    return verdict


class Watch:
    """Looks at a job's manifest again and again while it runs: it must be absent, or whole with all its files."""

    def __init__(self, out: Path) -> None:
        self._out, self._stop = out, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.looks, self.unreadable = 0, 0
        self._known: set[bytes] = set()

    def _look(self) -> None:
        while not self._stop.wait(0.02):
            self.look()

    def look(self) -> None:
        """Once: all bytes of what a new manifest names, later only that the files are there."""
        self.looks += 1
        try:
            data = (self._out / "manifest.json").read_bytes()
        except FileNotFoundError:
            return
        try:
            manifest = json.loads(data)
        except ValueError:
            self.unreadable += 1
            return
        if data not in self._known:
            self.unreadable += len(unreadable(self._out, manifest))
            self._known.add(data)
        self.unreadable += sum(not (self._out / file["name"]).exists() for file in named_files(manifest))

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self.look()
