"""A stage's work on one shard, item by item in a child process: what dies is one item, and known.

Used where workers died over a shard. One by one and not by halves, since a death is what is
dear here: every child starts an interpreter and perhaps loads a model, and a hang lasts until
its limit. Halving a shard of N for one bad item costs log2(N) deaths and more for each further
one; one by one costs one or two for each bad item, and N calls in a child that lives.

An item is to blame only if it kills a child that had done nothing before: damage that an
earlier item left in a child's memory, or a child killed from outside, then costs a second try
and not a good item. So there are at most two children an item, and an end.

Memory is watched from outside, as resident size: a limit on address space (RLIMIT_AS) would
refuse what CUDA merely reserves, and turns a good item's malloc into a crash.

Knows no stage, no model and no files; of Ray only its pickle, which takes functions of `__main__`.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing as mp
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil
from ray import cloudpickle

from llmvis.cluster.tally import JobError
from llmvis.schema import ItemError, Reason

Work = Callable[..., Any]
"""Called with the parts of one item; all it takes and gives must be picklable."""

POLL_S = 0.02
START_S = 60.0
"""Seconds that a child may take at least: an interpreter and its imports are no fault of the shard."""
LEAST_MEMORY = 256 * 2**20
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def item_limit(limit: float, items: int) -> float:
    """Seconds for one of a shard's `items`, of which all together may take `limit`.

    Five times its share, but a minute at least, since a first call may load more of a model.
    Two children for each of 256 items then take some `2 * 256 * 60` seconds at the very most.
    """
    return min(limit, max(5 * limit / max(items, 1), 60.0))


def one_by_one(
    make: Callable[[], Work], count: int, item: Callable[[int], tuple[Any, ...]], *, limit: float
) -> Iterator[Any]:
    """`make()(*item(i))` for each i < count, in a child process; in place of a result that killed it, an `ItemError`.

    `limit`: seconds for `make`, or `START_S` where that is more; an item's are derived from it by
    `item_limit`. Reasons are `crashed`, `timeout` and `out_of_memory`. Raises `JobError` where `make` itself does not
    end well, and `RuntimeError` with the child's traceback where an item raises anything but a
    want of memory.
    """
    packed: bytes = cloudpickle.dumps(make)  # type: ignore[no-untyped-call]
    seconds = item_limit(limit, count)
    child: _Child | None = None
    at = 0
    try:
        while at < count:
            fresh = child is None
            child = child or _Child(packed, limit)
            found = child.do(item(at), seconds)
            if isinstance(found, ItemError):
                child.close()
                child = None
                if not fresh:
                    continue  # perhaps what went before did it: once more, in a child of its own
            yield found
            at += 1
    finally:
        if child:
            child.close()


class _Child:
    """A process that has called `make` and waits for items."""

    def __init__(self, packed: bytes, limit: float) -> None:
        context = mp.get_context("spawn")  # a fork would inherit Ray's threads' locks, and CUDA not at all
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, packed, os.getpid()), daemon=True)
        self._process.start()
        theirs.close()
        self._most = float("inf")
        ready = self._answer(max(limit, START_S))
        if isinstance(ready, ItemError):
            self.close()
            raise JobError(f"the model or the decoder cannot be loaded in a process of its own: {ready}")
        self._most = self._size() + max(LEAST_MEMORY, room() / 2)

    def do(self, item: tuple[Any, ...], seconds: float) -> Any:
        """The result for an item, or the `ItemError` that says how it ended."""
        try:
            self._pipe.send(item)
        except OSError:
            return self._death()
        return self._answer(seconds)

    def close(self) -> None:
        """Ends the process, however it is."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self._pipe.close()

    def _answer(self, seconds: float) -> Any:
        until = time.monotonic() + seconds
        while True:
            ready = wait([self._pipe, self._process.sentinel], POLL_S)
            if self._pipe in ready:
                return self._received()
            if ready:
                return self._death()
            if self._size() > self._most:
                return ItemError(
                    Reason.OUT_OF_MEMORY,
                    f"took more than {self._most / 2**30:.1f} GiB, half of what was left",
                )
            if time.monotonic() > until:
                return ItemError(Reason.TIMEOUT, f"took longer than {seconds:g} s")

    def _received(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except (EOFError, OSError):
            return self._death()
        if kind == "error":
            raise RuntimeError(f"in a child process:\n{value}")
        return ItemError(Reason.OUT_OF_MEMORY, value) if kind == "memory" else value

    def _death(self) -> ItemError:
        self._process.join()
        code = self._process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"it ended the process with status {code}"
        return ItemError(Reason.CRASHED, how)

    def _size(self) -> int:
        try:
            return int(psutil.Process(self._process.pid).memory_info().rss)
        except psutil.NoSuchProcess:
            return 0


def _serve(pipe: Connection, packed: bytes, parent: int) -> None:
    """The child: makes the work, says so, and does one item after the other."""
    _die_with(parent)
    kind, work = _told(lambda: cloudpickle.loads(packed)())
    pipe.send((kind, None if kind == "done" else work))
    while kind != "error":
        try:
            item = pipe.recv()
        except EOFError:
            return
        kind, found = _told(partial(work, *item))
        pipe.send((kind, found))


def _told(call: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "done", call()
    except Exception as error:  # noqa: BLE001 - it goes to the parent, which raises it
        if lacks_memory(error):
            return "memory", str(error)
        return "error", "".join(traceback.format_exception(error))


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory, a GPU's too, is not enough."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's


def _die_with(parent: int) -> None:
    """Has the kernel kill this process when its parent is gone: one that hangs would stay for ever."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def room() -> float:
    """Bytes that can be taken before Ray's memory monitor kills workers, or the kernel what it likes.

    The monitor does not count a child's memory as its worker's, and would kill all of them.
    """
    monitor = float(os.environ.get("RAY_memory_usage_threshold", "0.95"))  # noqa: SIM112 - so Ray spells it
    free, total = free_memory()
    return max(0.0, free - (1 - monitor) * total)


def free_memory() -> tuple[int, int]:
    """Bytes that can still be had, and all: of the machine, or of the container where that has less."""
    free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    for folder, limit, used in _memory_groups():
        with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cache = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            taken = int((folder / used).read_text()) - cache  # a cache of files is given back when asked for
            most = int((folder / limit).read_text())
            free, total = min(free, most - taken), min(total, most)
    return int(free), int(total)


def _memory_groups() -> Iterator[tuple[Path, str, str]]:
    """Folders of this process's memory control groups, version 1 and 2, and names of files in them."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            v1 = kinds.split(",") == ["memory"]
            if not v1 and kinds:
                continue
            root = Path("/sys/fs/cgroup/memory" if v1 else "/sys/fs/cgroup")
            names = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
            )
            for folder in {root, root / path.lstrip("/")}:
                yield folder, *names
