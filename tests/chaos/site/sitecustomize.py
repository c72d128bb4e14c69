"""Makes faults fire inside the processes of a job, from outside: the product has no hooks for it.

Python imports this file by itself where its folder is on PYTHONPATH; without CHAOS in the environment it does
nothing. CHAOS names a folder in which the harness keeps

    faults.json   what is to happen: [{"id": "3", "role": "commit", "point": "before marker", "shard": 5, "do": "kill"}]
    fired/3       written by fault 3 as it fires, so each fires once and the harness can tell that it did

Roles are the functions that the engine runs: driver, prepare, actor, commit; and task, a piece of work of an
index. Points are named after what is written, `before | half | whole | after` it (half: half of its bytes are in
the file aside; whole: all are, and it has not been renamed yet), or after what is done: `begin | end prepare`,
`load`, `begin | end apply`, `begin | end write_shard` and the like, `row` (a shard has come back to the driver),
`before sweep`. CHAOS_SHARD_ROWS in the environment makes shards of an index as small. It knows nothing of what
should come of it.
"""

from __future__ import annotations

import errno
import functools
import importlib.machinery
import json
import os
import signal
import sys
from contextlib import contextmanager
from types import SimpleNamespace

FOLDER = os.environ.get("CHAOS", "")
WRITERS = ("llmvis.storage.local", "LocalStore")  # where files are published, and by which class
STAGES = ("llmvis.cluster.stages", "prepare_shard", "ModelActor", "commit_shard")
"""Where the engine's stages are, and their names."""
now = SimpleNamespace(role="driver", shard=None)


def kind_of(name: str) -> str:
    """What a published file is, by its name in a store."""
    folder, _, last = name.rpartition("/")
    kinds = {"data": "data", "dead": "dead", "_commits": "marker", "manifests": "manifest"}
    if folder == "shards":  # building.json, or of vectors, metadata, lists, trained, deleted
        stem, _, ending = last.rpartition(".")
        return {"npy": "vectors", "arrow": "metadata", "json": stem}.get(ending, ending)
    return kinds.get(folder) or name.removesuffix(".json").lower()


def wanted(point: str) -> list[dict]:
    """The faults that are to fire here and have not yet."""
    try:
        with open(f"{FOLDER}/faults.json") as file:
            faults = json.load(file)
    except FileNotFoundError:
        return []
    here = [f for f in faults if f["role"] == now.role and f["point"] == point]
    return [
        f
        for f in here
        if f.get("shard") in (None, now.shard) and not os.path.exists(f"{FOLDER}/fired/{f['id']}")
    ]


def hit(point: str) -> None:
    """This process has come to a point."""
    for fault in wanted(point):
        try:
            proof = os.open(f"{FOLDER}/fired/{fault['id']}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:  # another process was first
            continue
        node = os.getppid() if fault["do"] == "kill node" else None
        os.write(proof, json.dumps({**fault, "pid": os.getpid(), "raylet": node}).encode())
        os.close(proof)
        if fault["do"] == "disk full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if node is not None:
            with open(f"/proc/{node}/comm") as file:
                assert file.read().strip() == "raylet", "only a node's own process may die here"
            os.kill(node, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


class Half:
    """A file that stops at the half of its first write, where a fault asks for it."""

    def __init__(self, file, point: str) -> None:
        self._file, self._point = file, point

    def write(self, data):
        if wanted(self._point):
            self._file.write(bytes(data)[: len(data) // 2])
            self._file.flush()
            hit(self._point)
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)


def patch_storage(module) -> None:
    store = getattr(module, WRITERS[1])
    store.create, store.sweep = creating(store.create), sweeping(store.sweep)
    store.written = writing(store.written)


def creating(create):
    @contextmanager
    @functools.wraps(create)
    def wrapped(self, name):
        kind = kind_of(name)
        hit(f"before {kind}")
        with create(self, name) as file:
            yield Half(file, f"half {kind}")
            file.flush()
            hit(f"whole {kind}")
        hit(f"after {kind}")

    return wrapped


def writing(written):
    """Of a file that a library writes by itself (lists): it is not stopped at half."""

    @contextmanager
    @functools.wraps(written)
    def wrapped(self, name):
        kind = kind_of(name)
        hit(f"before {kind}")
        with written(self, name) as path:
            yield path
            hit(f"whole {kind}")
        hit(f"after {kind}")

    return wrapped


def sweeping(sweep):
    @functools.wraps(sweep)
    def wrapped(self, folder, keep):
        hit("before sweep")
        return sweep(self, folder, keep)

    return wrapped


def acting(function, role: str, verb: str):
    """A stage of the engine, which tells role and shard, with a point at its begin and its end."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        row = next(a for a in args if isinstance(a, dict))
        shard = row["shard"] if "shard" in row else json.loads(row["head"])["shard"]
        now.role, now.shard = role, int(shard)
        hit(f"begin {verb}")
        result = function(*args, **kwargs)
        hit(f"end {verb}")
        return result

    return wrapped


def patch_stages(module) -> None:
    prepare, actor, commit = STAGES[1:]
    setattr(module, prepare, acting(getattr(module, prepare), "prepare", "prepare"))
    setattr(module, commit, acting(getattr(module, commit), "commit", "commit"))
    model = getattr(module, actor)
    model.__call__ = acting(model.__call__, "actor", "apply")
    model.__init__ = loading(model.__init__)


def patch_tasks(module) -> None:
    module._run = working(module._run)


def patch_planner(module) -> None:
    if rows := os.environ.get("CHAOS_SHARD_ROWS"):
        module.SHARD_ROWS = int(rows)


def working(run):
    @functools.wraps(run)
    def wrapped(function, item):
        now.role = "task"
        hit(f"begin {function.__name__}")
        result = run(function, item)
        hit(f"end {function.__name__}")
        return result

    return wrapped


def patch_driver(module) -> None:
    module._progress = counting(module._progress)


def loading(init):
    @functools.wraps(init)
    def wrapped(self, *args, **kwargs):
        now.role, now.shard = "actor", None
        hit("load")
        init(self, *args, **kwargs)

    return wrapped


def counting(progress):
    """The driver's progress bar: it moves when a shard has come back, and `row` counts these as its shard."""

    @functools.wraps(progress)
    def wrapped(*args, **kwargs):
        bar = progress(*args, **kwargs)
        update, rows = bar.update, iter(range(1, 10**9))

        def updated(items):
            update(items)
            now.shard = next(rows)
            hit("row")
            now.shard = None

        bar.update = updated
        return bar

    return wrapped


PATCHES = [
    (WRITERS[0], patch_storage),
    (STAGES[0], patch_stages),
    ("llmvis.cluster.jobs", patch_driver),
    ("llmvis.cluster.tasks", patch_tasks),
    ("llmvis.index.planner", patch_planner),
]


class PatchAfterImport:
    """A finder that patches a module as soon as it has been imported."""

    @staticmethod
    def find_spec(name, path, target=None):
        patches = [patch for module, patch in PATCHES if module == name]
        if not patches:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            for patch in patches:
                patch(module)

        spec.loader.exec_module = exec_module
        return spec


if FOLDER:
    sys.meta_path.insert(0, PatchAfterImport)
