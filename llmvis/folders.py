"""What lies in a folder that a job or an index was written to: which it is, what is there, what is wrong with it.

For looking and cleaning, so nothing here trusts what it reads: a damaged marker is a `Problem` and no
exception. Reads plans, manifests and markers, and no data. Writes nothing; knows no Ray and no terminal.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from llmvis.ledger import LedgerError, check_ledger, marker_name
from llmvis.plan import SHARDS_A_FILE, Plan, PlanError
from llmvis.retry import RETRY
from llmvis.schema import ROWS, SCORES
from llmvis.storage import Owner, StorageError, Store, open_store

Kind = Literal["job", "index", "empty", "foreign", "missing"]

AGAIN = "run the same command again: it makes what is missing"
DELETE = "delete that file, then run the same command again"
ANEW = "choose a new --out, or restore the folder from a copy"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is wrong with a folder, and what to do; `hides` where files that count may be unknown for it."""

    what: str
    do: str
    hides: bool = False


@dataclass(frozen=True, kw_only=True)
class Part:
    """A folder below the one asked for (`name` is "" for that itself) that holds one job or one index."""

    name: str
    kind: Kind
    store: Store


@dataclass(kw_only=True)
class JobState:
    """All that a job's folder says of it. `plan` is None where it is not made yet, damaged, or of another form."""

    store: Store
    job: str = "unknown"
    plan: Plan | None = None
    manifest: dict[str, Any] | None = None
    markers: dict[int, dict[str, Any]] = field(default_factory=dict)
    there: dict[str, int] = field(default_factory=dict)
    """Files in data/ and dead/ with their bytes, half-written ones too."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Files that the manifest or a marker names."""
    problems: list[Problem] = field(default_factory=list)
    retry: bool = False
    owner: Owner | None = None

    @property
    def published(self) -> bool:
        """Whether the manifest is that of the markers, all of them."""
        if self.manifest is None or self.retry or not self.store.exists("report.json"):
            return self.manifest is not None and self.plan is None  # seeds have a manifest and no more
        return self.plan is not None and len(self.markers) == self.plan.shards

    @property
    def unreferenced(self) -> dict[str, int]:
        """Files in data/ and dead/ that nothing names, with their bytes; what is being written is among them."""
        return {name: size for name, size in self.there.items() if name not in self.files}


def parts_of(path: str) -> list[Part]:
    """The jobs and indexes at `path`: one, those of a data set's two passes, or those of a loop's steps.

    A folder that is none comes back as one part that says so. Raises `StorageError` for a place that cannot be read.
    """
    root = open_store(path)
    try:
        return _parts(root, "") or [Part(name="", kind=_other(root), store=root)]
    except OSError as error:
        raise StorageError(f"{root.uri} cannot be read: {error.strerror or error}") from error


def _parts(store: Store, name: str, deep: int = 1) -> list[Part]:
    found = [
        Part(name=f"{name}/{sub}".lstrip("/"), kind="job", store=store.below(sub))
        for sub in (SCORES, ROWS)
        if _kind(store.below(sub)) == "job"
    ]
    kind = _kind(store)
    if kind is not None:
        return [*found, Part(name=name, kind=kind, store=store)]
    if found or not deep:
        return found
    for child in store.folders():
        found += _parts(store.below(child), child, deep - 1)
    return found


def _kind(store: Store) -> Kind | None:
    """By the names in a folder; None where it holds neither job nor index."""
    names = set(store.top())
    if "CURRENT" in names or {"manifests", "shards"} <= names:
        return "index"
    if {"plan.json", "_commits"} & names:
        return "job"
    if ".lock" in names and ("plan" in names or any("plan" in name for name in store.unfinished())):
        return "job"  # stopped while it listed
    return None


def _other(store: Store) -> Kind:
    names = store.top()
    if names and names != [".lock"]:
        return "foreign"
    return "empty" if names or store.is_there() else "missing"


def read_job(store: Store) -> JobState:
    """The state of the job in `store`, damaged or not."""
    state = JobState(store=store)
    state.owner = store.owner()
    state.retry = store.exists(RETRY)
    _read_plan(state)
    for name in store.names("_commits"):
        _read_marker(state, name)
    _read_manifest(state)
    # last, so that what a running job has committed by now is there
    half = {name: size for name, size in store.unfinished().items() if name.startswith(("data/", "dead/"))}
    state.there = half | store.sizes("data") | store.sizes("dead")
    for name, file in state.files.items():
        size = state.there.get(name)
        if size != file["bytes"]:
            what = "is missing" if size is None else f"has {size:,} bytes, {file['bytes']:,} were written"
            state.problems.append(Problem(what=f"{name} {what}", do=AGAIN))
    return state


def _read_plan(state: JobState) -> None:
    store = state.store
    if not store.exists("plan.json"):
        if state.owner is None:
            what = "there is no plan.json"
            begun = bool(store.names("_commits"))
            do = ANEW if begun else "it was stopped while it listed its input: run the same command again"
            state.problems.append(Problem(what=what, do=do, hides=begun))
        return
    try:
        told = store.read_json("plan.json")
        state.job = str(told["job"])
        if "fingerprint" in told:
            state.plan = Plan.from_json(told)
            for number in range(0, state.plan.shards, SHARDS_A_FILE):
                if not store.exists(name := f"plan/{number // SHARDS_A_FILE:05}.parquet"):
                    state.problems.append(Problem(what=f"{name} is missing", do=ANEW))
    except (StorageError, PlanError, OSError) as error:
        state.problems.append(Problem(what=str(error), do=ANEW, hides=True))
    except (KeyError, TypeError, ValueError) as error:
        state.problems.append(Problem(what=f"plan.json is no plan of ours ({error!r})", do=ANEW, hides=True))


def _read_marker(state: JobState, name: str) -> None:
    """Adds a marker, or what is wrong with it."""
    try:
        marker = state.store.read_json(name)
        for part in ("data", "dead"):
            if marker[part] is not None:
                _check_file(marker[part], part)
        counts = [marker["shard"], marker["items"], marker["duplicates"], *marker["reasons"].values()]
        times = [marker["started"], marker["ended"], *marker["seconds"].values()]
        if not all(isinstance(n, int) for n in counts) or not all(isinstance(t, float | int) for t in times):
            raise TypeError("a count or a time is no number")
        if name != marker_name(marker["shard"]):
            raise ValueError(f"it is of shard {marker['shard']}")
    except (StorageError, OSError) as error:
        state.problems.append(Problem(what=f"{name} is damaged: {error}", do=DELETE, hides=True))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        state.problems.append(Problem(what=f"{name} is no marker of ours ({error!r})", do=DELETE, hides=True))
    else:
        if state.plan and marker["shard"] >= state.plan.shards:
            state.problems.append(Problem(what=f"{name} is of no shard of the plan", do=DELETE))
            return
        state.markers[marker["shard"]] = marker
        state.files |= {marker[part]["name"]: marker[part] for part in ("data", "dead") if marker[part]}


def _check_file(file: dict[str, Any], folder: str) -> None:
    """Raises `ValueError`, `KeyError` or `TypeError` where this is no entry for a file in `folder`."""
    if not re.fullmatch(rf"{folder}/[\w.-]+", file["name"]) or not isinstance(
        file["rows"] + file["bytes"], int
    ):
        raise ValueError(f"{file['name']!r} is no file of {folder}/")
    if not re.fullmatch(r"[0-9a-f]{64}", file["sha256"]):
        raise ValueError(f"{file['name']} has no sha256")


def _read_manifest(state: JobState) -> None:
    """The manifest, its files, and whether its books balance."""
    if not state.store.exists("manifest.json"):
        return
    try:
        manifest = state.store.read_json("manifest.json")
        files, dead = manifest["files"], manifest.get("dead", [])
        for file, folder in [*((f, "data") for f in files), *((f, "dead") for f in dead)]:
            _check_file(file, folder)
        if (
            sum(file["rows"] for file in files) != manifest["rows"]
            or manifest["rows"] != manifest["ledger"]["written"]
        ):
            raise ValueError("its rows do not add up")
        if state.plan:
            check_ledger(manifest["ledger"], state.plan)
    except LedgerError as error:
        state.problems.append(
            Problem(what=f"manifest.json: its ledger does not balance: {error}", do=DELETE, hides=True)
        )
    except (StorageError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        why = str(error) if isinstance(error, StorageError) else repr(error)
        state.problems.append(Problem(what=f"manifest.json is damaged: {why}", do=DELETE, hides=True))
    else:
        state.manifest = manifest
        state.files |= {file["name"]: file for file in [*files, *dead]}


def kept_versions(store: Store) -> list[int]:
    """The versions of an index whose manifests are there, oldest first."""
    names = store.names("manifests")
    return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"manifests/(\d{6})\.json", name)))


def files_of_manifest(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The files that a version of an index names, and what it says of each."""
    files = [file for shard in manifest["shards"] for file in files_of_shard(shard)]
    files += [manifest[part] for part in ("trained", "deleted") if part in manifest]
    return {file["name"]: file for file in files}


def files_of_shard(shard: dict[str, Any]) -> list[dict[str, Any]]:
    """Its vectors and metadata, and where it has them its inverted lists."""
    return [shard[part] for part in ("vectors", "metadata", "lists") if part in shard]


def files_of_versions(store: Store, versions: Iterable[int]) -> set[str]:
    """The files that these versions of an index name. Raises `StorageError` where a manifest is damaged."""
    found: set[str] = set()
    for version in versions:
        name = f"manifests/{version:06}.json"
        try:
            found |= files_of_manifest(store.read_json(name)).keys()
        except (KeyError, TypeError) as error:
            raise StorageError(
                f"{store.place(name)} is damaged ({error!r}); build the index again"
            ) from error
    return found
