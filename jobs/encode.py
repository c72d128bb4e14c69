"""Encode a collection: list → read and decode on CPUs → model in a pool of actors → commit."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from llmvis.cluster.jobs import Mapping, Pool, run_job
from llmvis.cluster.session import session
from llmvis.config import EncodeConfig, parse
from llmvis.encode import LoadEncoder, ReadPictures
from llmvis.entry import entry
from llmvis.ledger import committed
from llmvis.models.load import describe_encoder, load_encoder
from llmvis.models.protocols import EncoderInfo
from llmvis.plan import Plan, check_same, existing, plan_aside
from llmvis.schema import encoded
from llmvis.sources import Source, SourceOptions, open_reader, open_source
from llmvis.storage import Store
from llmvis.summary import plan_lines, report_lines


def mapping(config: EncodeConfig, source: Source, info: EncoderInfo) -> Mapping:
    """What encoding is, to the job engine."""
    device = "cpu" if config.gpus_per_actor == 0 else "auto"
    model = {"name": info.name, "fingerprint": info.fingerprint, "dim": info.dim, "licence": info.licence}
    return Mapping(
        job="encode",
        settings={
            "model_fingerprint": info.fingerprint,
            "max_pixels": config.max_pixels,
            "max_bytes": config.max_bytes,
        },
        about={"model": model},
        prepare=ReadPictures(
            reader=open_reader(source.describe()),
            preprocess=info.preprocess,
            max_pixels=config.max_pixels,
            max_bytes=config.max_bytes,
        ),
        load=LoadEncoder(
            load=partial(load_encoder, device=device, threads=1),
            model=config.model,
            fingerprint=info.fingerprint,
        ),
        schema=encoded(info.dim, source.user_columns),
    )


def run(config: EncodeConfig) -> dict[str, Any]:
    """Runs or plans the job; returns the report that is printed."""
    options = SourceOptions(
        image_column=config.image_column,
        caption_column=config.caption_column,
        id_column=config.id_column,
        image_root=config.image_root,
    )
    source = open_source(config.images, options)
    info = describe_encoder(config.model)
    job = mapping(config, source, info)

    def announce(plan: Plan) -> None:
        what = {"model": f"{info.name}, {info.dim} dimensions ({info.licence})", "out": config.out}
        print(
            "\n".join(plan_lines(plan, source.notes(), what=what, row_bytes=2 * info.dim + 100)), flush=True
        )

    if config.dry_run:
        with plan_aside(
            job=job.job, source=source, settings=job.settings, shard_items=config.shard_items
        ) as (plan, listing):
            announce(plan)
            _compare(Store(config.out), plan, listing)
        return {}
    pool = Pool(actors=config.actors, gpus_per_actor=config.gpus_per_actor, shard_items=config.shard_items)
    with session(config.num_cpus):
        report = run_job(job, source, config.out, pool, announce=announce)
    print("\n".join(report_lines(report, config.out)))
    if config.json:
        Path(config.json).write_text(json.dumps(report, indent=1) + "\n")
    return report


def _compare(store: Store, plan: Plan, listing: Path) -> None:
    """Says how far the job in `store` is; raises `PlanError` where it is another one."""
    old = existing(store)
    if old is None:
        return
    check_same(store, old, plan, listing)
    print(
        f"  so far     {len(committed(store)):,} of {old.shards:,} shards are done; the job goes on from there"
    )


def main() -> None:
    run(parse(EncodeConfig, "python -m jobs.encode"))


if __name__ == "__main__":
    entry(main)
