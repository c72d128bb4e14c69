"""The jobs under test, small, with real tiny models: on Ray as a driver of its own, or here and without it.

    python small_jobs.py encode|translate|generate|search|index|index-add|… WORK OUT

It knows nothing of faults.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiny
import tiny_search
import tiny_synthesis

from jobs import index, search
from llmvis import cli
from llmvis.cluster import jobs as engine
from llmvis.cluster import stages
from llmvis.cluster.jobs import Mapping, Pool, run_job
from llmvis.cluster.session import session
from llmvis.config import IndexConfig
from llmvis.config_bulk import BatchSearchConfig
from llmvis.config_ops import DeleteConfig
from llmvis.entry import entry
from llmvis.export import PICTURES
from llmvis.generate import LoadGenerator, ReadPrompts
from llmvis.index import in_turn, planner, read_info
from llmvis.ledger import read_manifest
from llmvis.made import made_schema
from llmvis.sources import Source, open_reader, open_source
from llmvis.sources.prompts import PromptSource
from llmvis.sources.variants import VariantSource
from llmvis.storage import LocalStore
from llmvis.translate import LoadTranslator, ReadSources

ENGINE_JOBS = ("encode", "translate", "generate", "search")
INFO = tiny_synthesis.INFO
ITEMS = {"encode": 97, "translate": 102, "generate": 102, "search": 97}
"""Of them one is broken (two of generate's a duplicate and an empty prompt); shards are of 8 items."""
SHARD_ITEMS = 8
SHARDS = {job: -(-items // SHARD_ITEMS) for job, items in ITEMS.items()}


class Words:
    """A picture of one colour that depends on prompt and seed."""

    info = INFO

    def generate(
        self, prompts: Sequence[str], *, negatives: Sequence[str | None], seeds: Sequence[int], ids: Sequence[str]
    ) -> np.ndarray:  # fmt: skip
        keys = [f"{p}/{s}".encode() for p, s in zip(prompts, seeds, strict=True)]
        colours = [np.frombuffer(hashlib.sha256(key).digest()[:3], np.uint8) for key in keys]
        return np.broadcast_to(np.stack(colours)[:, None, None], (len(keys), INFO.side, INFO.side, 3))


def prepare_work(work: Path, small: bool = False) -> None:
    """Inputs of all jobs. small: of two or three shards, for tests that run the job a thousand times."""
    tiny.pictures(work / "images", 13 if small else 96)
    (work / "images" / "00000-broken.png").write_bytes(b"no picture")
    tiny.pictures(work / "few", 16)
    (work / "few" / "00000-broken.png").write_bytes(b"no picture")
    prompts = [f"prompt {i}" for i in range(49)]
    (work / "prompts.csv").write_text("\n".join(["prompt", *prompts, prompts[0], '""']) + "\n")
    queries = [f"{word} {i}" for i in range(32) for word in ("red", "green", "blue")]
    (work / "queries.csv").write_text("\n".join(["text", *queries, '""']) + "\n")
    tiny_search.index_of(work / "searched", tiny_search.vectors_of(40))


def job_of(job: str, work: Path) -> tuple[Source, Mapping]:
    """A job on the engine."""
    if job == "encode":
        source: Source = open_source(str(work / "images"))
        return source, tiny.mapping(source)
    if job == "search":
        asked = BatchSearchConfig(
            index=str(work / "searched"), queries=str(work / "queries.csv"), out="", k=5
        )
        info = read_info(asked.index)
        queries = search.queries_of(asked, info)
        return queries, search.mapping(asked, queries, info, tiny.load)
    synthesis = {
        "job": job,
        "settings": {"model_fingerprint": INFO.fingerprint},
        "about": {"model": {"name": INFO.name, "fingerprint": INFO.fingerprint}},
        "schema": made_schema([]),
        "packing": PICTURES,
    }
    if job == "generate":
        prompts = PromptSource(str(work / "prompts.csv"), seeds=(0, 1))
        load_words = LoadGenerator(load=Words, info=INFO, cut=False)
        return prompts, Mapping(prepare=ReadPrompts(), load=load_words, **synthesis)
    variants = VariantSource(
        open_source(str(work / "few")), instructions=tiny_synthesis.INSTRUCTIONS, seeds=(0, 1)
    )
    read = ReadSources(
        reader=open_reader(variants.describe()), masks=None, side=INFO.side, whole=False,
        max_pixels=10**6, max_bytes=10**6,
    )  # fmt: skip
    load = LoadTranslator(load=partial(tiny_synthesis.Tint, "", 0), info=INFO, region=None, cut=False)
    return variants, Mapping(prepare=read, load=load, **synthesis)


def run_engine_job(job: str, work: Path, out: Path) -> dict[str, Any]:
    source, mapping = job_of(job, work)
    return run_job(mapping, source, str(out), Pool(shard_items=SHARD_ITEMS), quiet=True)


@dataclass(frozen=True, kw_only=True)
class IndexJob:
    """A command that changes an index. `base`: what it begins with. `options`: None: it deletes."""

    base: str
    options: dict[str, Any] | None
    spread: bool = False
    """In shards of `SHARD_ROWS`, so by tasks on Ray."""


LISTS = {"kind": "ivf_sq8", "recall": 0.9}
INDEX_JOBS = {
    "index": IndexJob(base="some", options={}),
    "index-add": IndexJob(base="some", options={"add": True}),
    "index-compact": IndexJob(base="all-less", options={"compact": True}),
    "index-delete": IndexJob(base="all-less", options=None),
    "lists": IndexJob(base="some-lists", options=LISTS, spread=True),
    "lists-add": IndexJob(base="some-lists", options={"add": True}, spread=True),
    "lists-compact": IndexJob(base="all-lists-less", options={"compact": True, "retrain": True}, spread=True),
}
SHARD_ROWS = 20


def run_index(job: str, work: Path, out: Path) -> None:
    """A job of `INDEX_JOBS` on the encoded pictures `<work>/new`, in this process, whatever its shards."""
    rows = SHARD_ROWS if INDEX_JOBS[job].spread else planner.SHARD_ROWS
    run, config = command_of(job, work, out)
    with without_ray(), mock.patch.object(planner, "SHARD_ROWS", rows):
        run(config)


def command_of(job: str, work: Path, out: Path) -> tuple[Callable[[Any], Any], Any]:
    """What runs a job of `INDEX_JOBS`, and what it is told."""
    options = INDEX_JOBS[job].options
    if options is None:
        return cli.run_delete, DeleteConfig(index=str(out), ids=str(work / "gone.txt"))
    embeddings = None if "compact" in options else str(work / "new")
    return index.run, IndexConfig(embeddings=embeddings, out=str(out), **options)


def prepare_indexes(work: Path) -> None:
    """What `INDEX_JOBS` begin with, of `<work>/new` and a part of it, `<work>/part/new`; and ids to be deleted."""
    names = [file["name"] for file in read_manifest(LocalStore(work / "new"), "encode")["files"]]
    tables = [pq.read_table(work / "new" / name, columns=["id"]) for name in names]
    ids = pa.concat_tables(tables)["id"].to_pylist()
    for base, job, embedded in (
        ("some", "index", "part"), ("some-lists", "lists", "part"), ("all", "index", "."), ("all-lists", "lists", "."),
    ):  # fmt: skip
        for _ in range(2):  # so that there is a version before the one in force
            run_index(job, work / embedded, work / base)
    (work / "gone.txt").write_text("\n".join(ids[::3]))
    for base in ("all", "all-lists"):
        shutil.copytree(work / base, work / f"{base}-less")
        run_index("index-delete", work, work / f"{base}-less")
    (work / "gone.txt").write_text("\n".join(ids[::2]))  # of which some are gone


@contextlib.contextmanager
def without_ray() -> Iterator[None]:
    """Inside, the engine's own stages and an index's tasks run one after the other, in this process."""

    def run_shards(
        mapping: Mapping,
        store: Any,
        source: Any,
        plan: Any,
        pool: Any,
        todo: list[int],
        quiet: bool,
        run: Any,
    ) -> None:
        known = {"tally": None, "limit": pool.timeout}
        actor = stages.ModelActor(mapping.load, **known)
        for shard in todo:
            row = actor(
                stages.prepare_shard({"shard": shard, "run": run}, store.uri, mapping.prepare, **known)
            )
            stages.commit_shard(row, store.uri, mapping.schema, mapping.packing, **known)

    def calm(*_: object, **__: object) -> contextlib.AbstractContextManager[bool]:
        return contextlib.nullcontext(False)

    with contextlib.ExitStack() as stack:
        for module, name, other in (
            (engine, "_run_shards", run_shards), (engine, "session", calm), (engine, "observe", mock.Mock()),
            (stages, "at_work", calm), (stages, "observe", mock.Mock()), (stages, "ray", mock.Mock()),
            (index, "session", calm), (index, "on_cluster", in_turn),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(module, name, other))
        yield


def run_calmly(job: str, work: Path, out: Path) -> None:
    """The job with no fault, for what its result is."""
    shutil.rmtree(out, ignore_errors=True)
    with without_ray():
        run_engine_job(job, work, out)


def main() -> None:
    job, work, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if job in INDEX_JOBS:
        run, config = command_of(job, work, out)
        run(config)
        return
    with session(num_cpus=2):
        run_engine_job(job, work, out)


if __name__ == "__main__":
    entry(main)
