"""Make a data set of made pictures: score → judge all at once → write what stays."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmvis.cluster.jobs import Mapping
from llmvis.cluster.planned import Way, run_planned
from llmvis.cluster.session import session
from llmvis.config import parse
from llmvis.config_bulk import DatasetConfig
from llmvis.dataset import Keep, LoadScore, LookAtMade, Nearest, ReadMade, judged, no_pictures, scored_schema
from llmvis.entry import entry
from llmvis.export import PACKINGS, write_imagefolder
from llmvis.gates import load_scorer
from llmvis.index import open_index
from llmvis.ledger import read_data, read_manifest
from llmvis.models.load import describe_encoder, load_encoder
from llmvis.models.protocols import EncoderInfo
from llmvis.present import About, present
from llmvis.schema import ROWS, SCORES
from llmvis.sources.made import MadeReader, MadeSource
from llmvis.storage import StorageError, Store, is_remote, local_path, open_store


def run(config: DatasetConfig) -> dict[str, Any]:
    """Runs or plans the job; returns the report that is printed."""
    if config.format == "imagefolder" and is_remote(config.out):
        raise StorageError(
            f"an imagefolder is many small files for a local disk; for {config.out} take --format parquet or webdataset"
        )
    source = MadeSource(config.made)
    if config.gates.scorer:
        load_scorer(config.gates.scorer)  # here too, where a mistake is a line and not a worker's traceback
    info = describe_encoder(config.model)
    nearest = _nearest(config, info)
    what = {"gates": _in_words(config), "scored by": info.name}
    asked = Way.of(config, what=what, row_bytes=2 * info.dim + 200)
    way = replace(asked, out=f"{config.out}/{SCORES}", json=None)
    if config.dry_run:
        return run_planned(_scoring(config, source, info), source, way)
    with session(config.num_cpus):
        run_planned(_scoring(config, source, info), source, way)
        scores = open_store(way.out)
        manifest = read_manifest(scores, "score")
        refused = judged((read_data(scores, file) for file in manifest["files"]), config.gates, nearest)
        refused |= no_pictures(read_data(scores, file) for file in manifest["dead"])
        about = {"config": asdict(config.gates), "index": config.index, "scores": manifest["fingerprint"]}
        kept = MadeSource(config.made, refused=refused, about=about)
        mapping = _writing(config, kept)
        folder = config.format == "imagefolder"
        rows = f"{config.out}/{ROWS}" if folder else config.out
        card = About(
            title="Made pictures", collection=", ".join(config.made), licence=config.licence,
            gates=config.gates, form=config.format,
        )  # fmt: skip

        def finish(report: dict[str, Any]) -> None:
            if folder:
                _unfold(open_store(rows), local_path(config.out) / "data")
            present(config.out, card, rows)

        what = {"format": config.format, "out": config.out}
        return run_planned(mapping, kept, replace(asked, out=rows, what=what, row_bytes=5000), finish)


def _unfold(rows: Store, folder: Path) -> None:
    manifest = read_manifest(rows, "dataset")
    tables = (read_data(rows, file) for file in manifest["files"])
    write_imagefolder(tables, folder, rows=manifest["rows"])


def _scoring(config: DatasetConfig, source: MadeSource, info: EncoderInfo) -> Mapping:
    """Pass 1, to the job engine."""
    device = "cpu" if config.gpus_per_actor == 0 else "auto"
    return Mapping(
        job="score",
        settings={"model_fingerprint": info.fingerprint, "scorer": config.gates.scorer},
        about={"model": {"name": info.name, "fingerprint": info.fingerprint, "dim": info.dim}},
        prepare=LookAtMade(
            reader=MadeReader(source.describe(), source.schema),
            preprocess=info.preprocess,
            scorer=config.gates.scorer,
        ),
        load=LoadScore(load=partial(load_encoder, config.model, device=device, threads=1)),
        schema=scored_schema(info.dim),
    )


def _writing(config: DatasetConfig, kept: MadeSource) -> Mapping:
    """Pass 2, to the job engine."""
    return Mapping(
        job="dataset",
        settings={"format": config.format},
        about={"model": kept.models[0], "models": kept.models},
        prepare=ReadMade(reader=MadeReader(kept.describe(), kept.schema)),
        load=Keep,
        schema=kept.schema,
        packing=PACKINGS[config.format],
    )


def _nearest(config: DatasetConfig, info: EncoderInfo) -> Nearest | None:
    if config.index is None:
        return None
    index = open_index(config.index, info.fingerprint)

    def nearest(vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return index.search(vectors, 1, exact=True)[0][:, 0]

    return nearest


def _in_words(config: DatasetConfig) -> str:
    given = {name: value for name, value in asdict(config.gates).items() if value not in (None, False)}
    return ", ".join(name if value is True else f"{name} {value}" for name, value in given.items()) or "none"


def main() -> None:
    run(parse(DatasetConfig, "python -m jobs.dataset"))


if __name__ == "__main__":
    entry(main)
