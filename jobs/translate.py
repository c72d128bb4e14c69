"""Translate a collection: list × instructions × seeds → read, decode and edit on CPUs → models → commit."""

from __future__ import annotations

from functools import partial
from typing import Any

from llmvis.cluster.jobs import Mapping
from llmvis.cluster.planned import Way, run_planned
from llmvis.config import parse
from llmvis.config_bulk import TranslateConfig
from llmvis.edits import parse_edit
from llmvis.enhance import parse_enhancement
from llmvis.entry import entry
from llmvis.made import made_schema, user_fields, users_columns
from llmvis.models.load_restorer import describe_restorer, load_picture_restorer
from llmvis.models.load_synthesis import MakeOptions, describe_synthesis, load_synthesis
from llmvis.models.protocols import SynthesisInfo
from llmvis.present import About, present
from llmvis.schema import UserError
from llmvis.sources import SourceOptions, check_apart, open_masks, open_reader, open_source
from llmvis.sources.variants import ADDED, VariantSource
from llmvis.translate import LoadTranslator, ReadSources

NO_MODEL = SynthesisInfo(name="pillow", fingerprint="", side=1, licence="none needed")


def run(config: TranslateConfig) -> dict[str, Any]:
    """Runs or plans the job; returns the report that is printed."""
    options = SourceOptions(
        image_column=config.image_column, caption_column=config.caption_column, image_root=config.image_root
    )
    check_apart(config.images, config.out)
    inner = open_source(config.images, options)
    masks = None if config.mask is None else open_masks(config.mask, config.images, options)
    source = VariantSource(
        inner, instructions=config.instruction, seeds=config.seeds,
        instruction_column=config.instruction_column, masks=masks,
    )  # fmt: skip
    make = MakeOptions(
        steps=config.steps, guidance=config.guidance, temperature=config.temperature, strength=config.strength
    )
    column = config.instruction_column is not None  # may hold anything
    others = [text for text in config.instruction if not parse_enhancement(text)]
    needed = column or not all(map(parse_edit, others))
    if not needed and make != MakeOptions():
        raise UserError(
            "--steps, --guidance, --temperature and --strength are for a model, and no instruction asks for it"
        )
    info = describe_synthesis(config.model, make, "translate") if needed else NO_MODEL
    restorer = describe_restorer(config.model) if column or len(others) < len(config.instruction) else None
    models = [m for m in (info if needed else None, restorer) if m] or [NO_MODEL]
    described = [{"name": m.name, "fingerprint": m.fingerprint, "licence": m.licence} for m in models]
    device = "cpu" if config.gpus_per_actor == 0 else "auto"
    load = partial(load_synthesis, config.model, make, "translate", device=device, threads=1)
    load_other = partial(load_picture_restorer, config.model, device=device, threads=1)
    mapping = Mapping(
        job="translate",
        settings={
            "model_fingerprint": info.fingerprint,
            "region": config.region,
            "cutout": config.cutout,
            "max_pixels": config.max_pixels,
            "max_bytes": config.max_bytes,
            **({"restorer_fingerprint": restorer.fingerprint} if restorer else {}),
        },
        about={"model": described[0], "models": described},
        prepare=ReadSources(
            reader=open_reader(source.describe()),
            masks=None if masks is None else open_reader(masks.describe()),
            side=64 if info is NO_MODEL and config.region else info.side,
            whole=config.region is not None,
            max_pixels=config.max_pixels,
            max_bytes=config.max_bytes,
        ),
        load=LoadTranslator(
            load=load if needed else None,
            info=info,
            region=config.region,
            cut=config.cutout,
            restorer=None if restorer is None else (load_other, restorer),
        ),
        schema=made_schema(user_fields(users_columns(source.user_columns, ADDED))),
    )
    asked = ", ".join(repr(text) for text in config.instruction) or f"column {config.instruction_column}"
    way = Way.of(
        config,
        what={"asked": asked, "model": ", ".join(f"{m.name} ({m.licence})" for m in models)},
        row_bytes=info.side**2 + 500,
    )
    about = About(title="Translated pictures", collection=config.images, assets=config.assets)
    return run_planned(mapping, source, way, finish=lambda report: present(config.out, about))


def main() -> None:
    run(parse(TranslateConfig, "python -m jobs.translate"))


if __name__ == "__main__":
    entry(main)
