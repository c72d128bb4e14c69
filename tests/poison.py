"""Pictures that kill, hang or devour what reads them or runs a model on them, by their names. For tests."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import tiny

from llmvis.cluster.jobs import Apply, Mapping, Pool, Prepare, run_job
from llmvis.cluster.session import session
from llmvis.sources import open_source


def devour() -> None:
    held = []
    while True:
        held.append(np.ones(2**23))  # 64 MiB, touched


def backtrack() -> None:
    re.match(r"(a+)+$", "a" * 64 + "b")  # in C, with the GIL, for years


FAULTS: dict[str, Callable[[], Any]] = {
    "segfault": lambda: ctypes.string_at(0),
    "exit": lambda: os._exit(3),
    "sleep": lambda: time.sleep(3600),
    "native": lambda: ctypes.PyDLL(None).sleep(3600),  # PyDLL keeps the GIL
    "regex": backtrack,
    "huge": lambda: np.ones(10**15),
    "devour": devour,
}


def meet(rows: pa.Table, faults: dict[str, str]) -> None:
    for name in rows["path"].to_pylist():
        if fault := faults.get(name):
            FAULTS[fault]()


@dataclass(frozen=True)
class PoisonedPrepare:
    prepare: Prepare
    faults: dict[str, str]

    def __call__(self, rows: pa.Table) -> Any:
        meet(rows, self.faults)
        return self.prepare(rows)


@dataclass(frozen=True)
class PoisonedApply:
    apply: Apply
    faults: dict[str, str]

    def __call__(self, rows: pa.Table, arrays: Any) -> Any:
        meet(rows, self.faults)
        return self.apply(rows, arrays)


@dataclass(frozen=True)
class PoisonedLoad:
    load: Callable[[], Apply]
    faults: dict[str, str]

    def __call__(self) -> Apply:
        if fault := self.faults.get("load"):
            FAULTS[fault]()
        return PoisonedApply(self.load(), self.faults)


def run(images: str, out: str, pool: Pool, *, prepare: dict[str, str], model: dict[str, str]) -> Any:
    """The tiny job with faults, picture's name → fault, in each stage; `load` stands for loading."""
    source = open_source(images)
    plain: Mapping = tiny.mapping(source)
    mapping = dataclasses.replace(
        plain, prepare=PoisonedPrepare(plain.prepare, prepare), load=PoisonedLoad(plain.load, model)
    )
    return run_job(mapping, source, out, pool, quiet=True)


if __name__ == "__main__":  # a driver of its own: images, out, stage, fault, name …
    stage, fault, *names = sys.argv[3:]
    faults = {"prepare": {}, "model": {}, stage: dict.fromkeys(names, fault)}
    with session(num_cpus=2):
        run(sys.argv[1], sys.argv[2], Pool(shard_items=8, timeout=60), **faults)
