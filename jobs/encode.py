"""Encode a collection: list → read and decode on CPUs → model in a pool of actors → commit."""

from __future__ import annotations

from functools import partial
from typing import Any

from llmvis.cluster.jobs import Mapping
from llmvis.cluster.planned import Way, run_planned
from llmvis.config import EncodeConfig, parse
from llmvis.encode import LoadEncoder, ReadPictures
from llmvis.entry import entry
from llmvis.models.load import describe_encoder, load_encoder
from llmvis.models.protocols import EncoderInfo
from llmvis.schema import encoded
from llmvis.sources import Source, SourceOptions, open_reader, open_source


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
    way = Way.of(
        config,
        what={"model": f"{info.name}, {info.dim} dimensions ({info.licence})"},
        row_bytes=2 * info.dim + 100,
    )
    return run_planned(mapping(config, source, info), source, way)


def main() -> None:
    run(parse(EncodeConfig, "python -m jobs.encode"))


if __name__ == "__main__":
    entry(main)
