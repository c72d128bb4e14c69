"""What `llmvis inspect` says of a folder, as a dict for machines: plan, progress, ledger, dead letters, files, index.

Reads markers and manifests, a few dead letters for examples, and data only to check hashes. Never
raises for what a folder holds: what is damaged is listed under `problems`, with what to do.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from llmvis.folders import (
    AGAIN,
    JobState,
    Kind,
    Part,
    Problem,
    files_of_manifest,
    files_of_shard,
    files_of_versions,
    kept_versions,
    parts_of,
    read_job,
)
from llmvis.index import advice, drift, read_info
from llmvis.schema import printable
from llmvis.storage import StorageError, Store
from llmvis.summary import STAGES

_WHAT_TO_DO: dict[Kind, Problem] = {
    "missing": Problem(what="there is no such folder", do="give the --out of a job, or an index"),
    "empty": Problem(what="the folder is empty", do="give the --out of a job that was begun, or an index"),
    "foreign": Problem(
        what="no job and no index of llmvis lies here", do="give the --out of a job, or an index"
    ),
}


def inspect_folder(path: str, *, check_hashes: bool = False, examples: int = 3) -> dict[str, Any]:
    """All that can be said of `path`: `{path, healthy, parts: [{name, kind, state, problems, …}]}`.

    Args:
        check_hashes: read every file and compare its sha256.
        examples: dead letters shown of each reason.

    Raises `StorageError` only where `path` itself cannot be read.
    """
    parts = [_part(part, check_hashes, examples) for part in parts_of(path)]
    return {"path": path, "healthy": not any(part["problems"] for part in parts), "parts": parts}


def _part(part: Part, check_hashes: bool, examples: int) -> dict[str, Any]:
    if part.kind == "job":
        found = _job(part.store, check_hashes, examples)
    elif part.kind == "index":
        found = _index(part.store, check_hashes)
    else:
        found = {"state": part.kind, "problems": [asdict(_WHAT_TO_DO[part.kind])]}
    return {"name": part.name, "kind": part.kind, "path": part.store.uri, **found}


def _job(store: Store, check_hashes: bool, examples: int) -> dict[str, Any]:
    try:
        state = read_job(store)
        dead, problems = _dead(state, examples)
        if check_hashes:
            problems += _hashes(store, state.files, state.there)
    except OSError as error:
        return {"state": "unreadable", "problems": [asdict(_no_access(error))]}
    problems = state.problems + problems
    return {
        "job": state.job,
        "state": _state(state),
        "owner": state.owner and str(state.owner),
        "plan": None if state.plan is None else state.plan.to_json(),
        "progress": _progress(state),
        "ledger": _ledger(state),
        "dead": dead,
        "files": _files(state),
        "seconds": _seconds(state),
        "verified": check_hashes,
        "problems": [asdict(problem) for problem in problems],
    }


def _no_access(error: OSError) -> Problem:
    return Problem(
        what=f"{error.filename} cannot be read: {error.strerror}", do="ask for access, or run as its owner"
    )


def _state(state: JobState) -> str:
    """`running`, `finished`, `retry` (the last result stands until the command is run again), `damaged`, `stopped`."""
    if state.owner is not None:
        return "running"
    if state.published:
        return "finished"
    if state.manifest is not None and (state.retry or not state.store.exists("report.json")):
        return "retry"
    return "damaged" if state.problems else "stopped"


def _progress(state: JobState) -> dict[str, Any] | None:
    """Shards, items and rows done; while a driver is at it, items a second of its run and the seconds left."""
    if state.plan is None:
        return None
    markers = list(state.markers.values())
    items = sum(marker["items"] for marker in markers)
    found = {
        "shards_done": len(markers),
        "shards": state.plan.shards,
        "items_done": items,
        "rows": sum(marker["data"]["rows"] for marker in markers if marker["data"]),
        "items_per_second": None,
        "seconds_left": None,
    }
    if state.owner is not None:
        run = [marker for marker in markers if marker["ended"] >= state.owner.since]
        span = time.time() - min((marker["started"] for marker in run), default=0.0)
        rate = sum(marker["items"] for marker in run) / max(span, 1e-3)
        if run and rate:
            left = round((state.plan.items - items) / rate, 1)
            found |= {"items_per_second": round(rate, 2), "seconds_left": left}
    return found


def _ledger(state: JobState) -> dict[str, Any]:
    """The manifest's ledger, or while there is none the sums of what is committed."""
    if state.manifest is not None:
        ledger = state.manifest["ledger"]
        so_far = False
    else:
        markers = state.markers.values()
        reasons = sum((Counter(marker["reasons"]) for marker in markers), Counter[str]())
        ledger = {
            "input": sum(marker["items"] for marker in markers),
            "written": sum(marker["data"]["rows"] for marker in markers if marker["data"]),
            "dead_lettered": sum(marker["dead"]["rows"] for marker in markers if marker["dead"]),
            "duplicates": sum(marker["duplicates"] for marker in markers),
            "dead_by_reason": dict(sorted(reasons.items())),
        }
        so_far = True
    out = ledger["written"] + ledger["dead_lettered"] + ledger["duplicates"]
    balances = out == ledger["input"] and sum(ledger["dead_by_reason"].values()) == ledger["dead_lettered"]
    return {**ledger, "so_far": so_far, "balances": balances}


def _dead(state: JobState, examples: int) -> tuple[list[dict[str, Any]], list[Problem]]:
    """Reasons with counts and the first few letters of each, by as few files as will do."""
    files = {m["dead"]["name"]: set(m["reasons"]) for m in state.markers.values() if m["dead"]}
    counts: Counter[str] = Counter()
    if state.manifest is not None:  # what readers have; after a retry not all of it has a marker
        counts.update(state.manifest["ledger"]["dead_by_reason"])
        for file in state.manifest.get("dead", []):
            files.setdefault(file["name"], set(counts))
    else:
        for marker in state.markers.values():
            counts.update(marker["reasons"])
    shown: dict[str, list[dict[str, str]]] = {reason: [] for reason in counts}
    problems: list[Problem] = []
    for name, reasons in files.items():
        if name not in state.there or all(len(shown[reason]) >= examples for reason in reasons):
            continue
        try:
            data = pa.BufferReader(state.store.read(name))
            rows = pq.read_table(data, columns=["source", "stage", "reason", "detail"])
        except (OSError, pa.ArrowException, KeyError) as error:
            problems.append(Problem(what=f"{name} cannot be read: {error}", do=f"delete it, then {AGAIN}"))
            continue
        for row in rows.to_pylist():
            if len(letters := shown.setdefault(str(row["reason"]), [])) < examples:
                letters.append({key: printable(str(row[key])) for key in ("source", "stage", "detail")})
    found = [{"reason": reason, "count": n, "examples": shown[reason]} for reason, n in counts.most_common()]
    return found, problems


def _files(state: JobState) -> dict[str, Any]:
    named = [name for name in state.files if name in state.there]
    stray = state.unreferenced
    return {
        "data": sum(name.startswith("data/") for name in named),
        "dead": sum(name.startswith("dead/") for name in named),
        "bytes": sum(state.there[name] for name in named),
        "unreferenced": len(stray),
        "unreferenced_bytes": sum(stray.values()),
    }


def _seconds(state: JobState) -> dict[str, float]:
    """Worker seconds by stage, of all committed shards, whichever run they are of."""
    total: Counter[str] = Counter()
    for marker in state.markers.values():
        total.update(marker["seconds"])
    known = [stage for stage in STAGES if stage in total]
    return {stage: round(total[stage], 3) for stage in [*known, *sorted(total.keys() - set(known))]}


def _hashes(store: Store, files: dict[str, dict[str, Any]], there: dict[str, int]) -> list[Problem]:
    """Files whose content is not what was written; what is missing or too short is known already."""
    whole = {name: file for name, file in files.items() if there.get(name) == file["bytes"]}
    found = []
    with tqdm(total=sum(f["bytes"] for f in whole.values()), unit="B", unit_scale=True, delay=3) as bar:
        for name, file in whole.items():
            if store.sha256(name) != file["sha256"]:
                found.append(
                    Problem(what=f"{name} is damaged: its sha256 differs", do=f"delete it, then {AGAIN}")
                )
            bar.update(file["bytes"])
    return found


def _index(store: Store, check_hashes: bool) -> dict[str, Any]:
    """An index's version, model and files; each file's presence, size and, if asked, sha256."""
    again = "build it again with python -m jobs.index"
    try:
        manifest = read_info(store.uri)
        files = files_of_manifest(manifest)
        rows = sum(shard["rows"] for shard in manifest["shards"])
        versions = kept_versions(store)
        there = store.sizes("shards")
        older = files_of_versions(store, {*versions} - {manifest["version"]})
    except (StorageError, OSError, KeyError, TypeError, ValueError) as error:
        why = str(error) if isinstance(error, StorageError) else repr(error)
        return {"state": "damaged", "problems": [asdict(Problem(what=why, do=again))]}
    problems = []
    for name, file in files.items():
        if there.get(name) != file["bytes"]:
            what = "is missing" if name not in there else f"has {there[name]:,} bytes, not {file['bytes']:,}"
            problems.append(Problem(what=f"{name} {what}", do=again))
    if rows != manifest["rows"]:
        problems.append(
            Problem(what=f"shards have {rows:,} rows, the manifest {manifest['rows']:,}", do=again)
        )
    if check_hashes:
        problems += [Problem(what=p.what, do=again) for p in _hashes(store, files, there)]
    stray = {name: size for name, size in there.items() if name not in files.keys() | older}
    dead = manifest["deleted"]["rows"] if "deleted" in manifest else 0
    return {
        "state": "damaged" if problems else "finished",
        "version": manifest["version"],
        "kept": versions,
        "rows": rows,
        "deleted": dead,
        "advice": advice(manifest, store.uri),
        "drift": drift(manifest),
        "index_kind": manifest["kind"],
        "tuned": manifest.get("tuned"),
        "model": manifest["model"],
        "sources": [str(source.get("root")) for source in manifest["sources"]],
        "shards": [
            {
                "rows": shard["rows"],
                "files": [
                    {"name": f["name"], "bytes": f["bytes"], "there": there.get(f["name"]) == f["bytes"]}
                    for f in files_of_shard(shard)
                ],
            }
            for shard in manifest["shards"]
        ],
        "files": {
            "bytes": sum(file["bytes"] for file in files.values()),
            "unreferenced": len(stray),
            "unreferenced_bytes": sum(stray.values()),
        },
        "verified": check_hashes,
        "problems": [asdict(problem) for problem in problems],
    }
