"""What `llmvis gc` removes: files that no manifest, marker or kept version names, and what killed writers left.

Only in folders that are a job's or an index's, only in the sub-folders that these write, only under
their lock, and not at all where something is damaged that could name a file. `work/` of a data
set is cleaned and not removed: its next run goes on from it. A reader that has a file open or
mapped keeps it; on a disk of this machine it is there until it is closed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from llmvis.folders import Part, files_of_versions, kept_versions, parts_of, read_job
from llmvis.index import read_info
from llmvis.storage import StorageError, Store, open_store


@dataclass(frozen=True, kw_only=True)
class Stray:
    """A file to remove: its name below the folder that was asked for, its bytes, and why."""

    name: str
    bytes: int
    why: str


def clean(path: str, *, keep: int = 2, dry_run: bool = False) -> list[Stray]:
    """Removes what is stray in the job, the index or the loop of jobs at `path`; returns what it was.

    keep: versions of an index, the current one among them.

    Raises:
        StorageError: nothing of ours is there, or a file is damaged that says what counts; nothing is
            removed anywhere then.
        LockedError: a job or a build is at work.
    """
    parts = parts_of(path)
    if strange := [part for part in parts if part.kind not in ("job", "index")]:
        raise StorageError(
            f"{strange[0].store.uri} is {strange[0].kind}: no job or index of llmvis, so nothing is removed. "
            "Give the --out of a job, or an index"
        )
    _refuse_mixed(open_store(path), parts)
    with ExitStack() as locks:
        for part in parts:
            locks.enter_context(part.store.lock())
        found = [(part, list(_strays(part, keep))) for part in parts]
        for part, strays in [] if dry_run else found:
            part.store.clear_unfinished()
            for name, _, _ in strays:
                part.store.delete(name)
    return [
        Stray(name=f"{part.name}/{name}".lstrip("/"), bytes=count, why=why)
        for part, strays in found
        for name, count, why in strays
    ]


def _refuse_mixed(store: Store, parts: list[Part]) -> None:
    """Raises `StorageError` where jobs lie among other things: that is no loop's folder, but somebody's."""
    ours = {part.name.split("/")[0] for part in parts if part.name}
    if "work" in ours or not ours:
        return  # a data set, or a single job
    if others := [name for name in store.top() if name not in ours]:
        raise StorageError(
            f"{store.uri} holds {len(ours)} jobs or indexes, and other things ({others[0]}, …): clean one by one"
        )


def _strays(part: Part, keep: int) -> Iterator[tuple[str, int, str]]:
    """Name, bytes and why of each."""
    store = part.store
    named = _named_by_job(store) if part.kind == "job" else _named_by_index(store, keep)
    for folder in ("data", "dead") if part.kind == "job" else ("manifests", "shards"):
        for name, count in store.sizes(folder).items():
            if name not in named:
                yield name, count, "no manifest names it"
    for name, count in store.unfinished().items():
        yield name, count, "a killed writer left it"


def _named_by_job(store: Store) -> set[str]:
    """Files that count, of a job. Raises `StorageError` where that cannot be known."""
    state = read_job(store)
    if damaged := [problem for problem in state.problems if problem.hides]:
        raise StorageError(
            f"{store.uri}: {damaged[0].what}; what counts cannot be told, so nothing is removed. {damaged[0].do}"
        )
    return set(state.files)


def _named_by_index(store: Store, keep: int) -> set[str]:
    """Manifests and files of the versions that stay. Raises `StorageError` where the index is damaged."""
    current = int(read_info(store.uri)["version"])
    stay = [version for version in kept_versions(store) if version <= current][-keep:]
    return files_of_versions(store, stay) | {f"manifests/{version:06}.json" for version in stay}
