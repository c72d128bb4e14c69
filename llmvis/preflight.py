"""What can't work, found out before the work: a folder, a disk or a cluster that is not enough. No Ray.

Pure parts, which take what is known of disks and nodes and give words; `cluster.checks` asks
the cluster. Knows nothing of a job but its figures.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmvis.schema import UserError
from llmvis.storage import Store, is_remote, local_path
from llmvis.summary import size

PROBE = ".aside-probe"
TIGHT = 0.8
"""Share of the free bytes from which an estimate of what is needed is worth a warning."""
SPILL_FULL = 0.9
"""Ray stops spilling objects to a disk that is 95 % full."""


class PreflightError(UserError):
    """Work that would fail as things are, refused before it begins; the message says what to do."""


def local_folder(uri: str) -> Path | None:
    """The local path of `uri`; None where it is in an object store."""
    return None if is_remote(uri) else local_path(uri)


def check_writable(out: str) -> None:
    """Raises `PreflightError` unless `out` is a local folder, or could be made, and may be written to.

    Writes nothing, so that a plan can ask; nothing is asked of object stores.
    """
    folder = local_folder(out)
    if folder is None:
        return
    there = _existing(folder)
    if not there.is_dir():
        raise PreflightError(f"cannot write to {folder}: {there} is a file; choose another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PreflightError(
            f"cannot write to {folder}: {there} is read-only or another user's; choose another --out"
        )


def check_writes(store: Store) -> None:
    """Writes a small file into `store` and takes it away. Raises `PreflightError` where that fails."""
    try:
        store.write(PROBE, bytes(2**16))
        store.delete(PROBE)
    except OSError as error:
        raise PreflightError(
            f"cannot write to {store.uri}: {error.strerror}; make room or choose another --out"
        ) from error


def disk_line(out: str, needed: int) -> tuple[str, str | None] | None:
    """A line of the plan on the disk under `out`, and a warning if it is tight; None for an object store.

    `needed`: estimated bytes of the whole output; what an earlier run left in `out` counts as
    there already. Raises `PreflightError` where the rest does not fit.
    """
    folder = local_folder(out)
    if folder is None:
        return None
    data = folder / "data"
    there = sum(p.stat().st_size for p in data.iterdir() if p.is_file()) if data.is_dir() else 0
    rest = max(0, needed - there)
    free = shutil.disk_usage(_existing(folder)).free
    line = f"  disk       needs about {size(rest)}, {size(free)} free"
    if rest > free:
        raise PreflightError(
            f"{folder} needs about {size(rest)} more and its disk has {size(free)} free; make room, or choose an "
            "--out on another disk"
        )
    tight = rest > TIGHT * free
    return (
        line,
        f"{folder}: {size(free)} are free and about {size(rest)} needed, by estimate" if tight else None,
    )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def cannot_fit(
    nodes: Sequence[Mapping[str, float]],
    *,
    actors: int,
    gpus_per_actor: float,
    actor_cpus: float,
    task_cpus: float,
) -> str | None:
    """Why a plan's actors or tasks can never all be run on `nodes`, each a dict of `CPU` and `GPU`, and what to do.

    `task_cpus`: of the largest task, which has to find room beside the actors. None: they can.
    """
    places = sum(_places(node, actor_cpus, gpus_per_actor) for node in nodes)
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    has = f"the cluster has {cpus:g} CPUs and {gpus:g} GPUs on {len(nodes)} node" + "s" * (len(nodes) != 1)
    wants = f"a copy of the model wants {actor_cpus:g} CPU and {gpus_per_actor:g} GPUs on one node"
    if not places:
        less = "--gpus-per-actor 0 keeps the model on CPUs; or add nodes" if gpus_per_actor else "add CPUs"
        return f"{wants}, and no node has that: {has}. {less}"
    most = min(places, max(0, int((cpus - task_cpus) / actor_cpus + 1e-9)))
    if actors > most:
        return (
            f"{actors} copies of the model can never all run: {wants}, reading needs {task_cpus:g} CPU beside them, "
            f"and {has}. Give --actors {max(1, most)} at most, or add nodes"
        )
    return None


def _places(node: Mapping[str, float], cpus: float, gpus: float) -> int:
    by_cpu = int(node.get("CPU", 0.0) / cpus + 1e-9)
    has = node.get("GPU", 0.0)
    if not gpus or math.isinf(has):
        return by_cpu
    # fractions share a GPU, but no actor lies across two
    return min(by_cpu, int(has / gpus + 1e-9) if gpus >= 1 else int(has) * int(1 / gpus + 1e-9))


def input_paths(description: Mapping[str, Any]) -> Iterator[str]:
    """Local files and folders that workers read, of what a source says of itself (`Source.describe`)."""
    if description.get("kind") in ("prompts", "text queries"):
        return  # they travel in the plan
    for key, value in description.items():
        if isinstance(value, Mapping):
            yield from input_paths(value)
        elif key in ("root", "image_root") and isinstance(value, str) and Path(value).is_absolute():
            yield value


def sample(path: str) -> str | None:
    """A path that is there only where what lies under `path` is: an entry of a folder, or the file itself.

    A folder alone proves nothing: a mount point is there without its mount. None: nothing is there.
    """
    if not os.path.isdir(path):  # noqa: PTH112
        return path if os.path.exists(path) else None  # noqa: PTH110
    with os.scandir(path) as entries:
        first = next(entries, None)
    return first and first.path


def unseen(places: Mapping[str, Sequence[bool]], paths: Sequence[str]) -> str | None:
    """Which of `paths` which nodes do not see, and what to do; None if all see all.

    `places`: by a node's name, for each of the paths whether it is there, the same as here.
    """
    lines = []
    for at, path in enumerate(paths):
        blind = sorted(node for node, sees in places.items() if not sees[at])
        if blind:
            shown = ", ".join(blind[:5]) + (", …" if len(blind) > 5 else "")
            lines.append(f"{path} is not there on {len(blind)} of {len(places)} nodes ({shown})")
    if not lines:
        return None
    return (
        f"{'; '.join(lines)}. Every node must see the input and the output: use a folder that all mount at the same "
        "place (NFS, EFS, …), or s3://"
    )


def spill_warning(folder: Path | str) -> str | None:
    """Words where the disk on which Ray spills objects is nearly full."""
    usage = shutil.disk_usage(_existing(Path(folder)))
    if usage.used < SPILL_FULL * usage.total:
        return None
    return (
        f"the disk of {folder}, where Ray puts objects that memory cannot hold, has {size(usage.free)} of "
        f"{size(usage.total)} free; a job that needs it stops there. Make room, or set RAY_TMPDIR to another disk"
    )
