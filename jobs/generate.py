"""Make pictures from prompts: prompts × lists × seeds → model in a pool of actors → commit."""

from __future__ import annotations

from functools import partial
from typing import Any

from llmvis.cluster.jobs import Mapping
from llmvis.cluster.planned import Way, run_planned
from llmvis.config import parse
from llmvis.config_bulk import GenerateConfig
from llmvis.entry import entry
from llmvis.generate import LoadGenerator, ReadPrompts
from llmvis.made import made_schema, user_fields, users_columns
from llmvis.models.load_synthesis import MakeOptions, describe_synthesis, load_synthesis
from llmvis.present import About, present
from llmvis.sources.prompts import ADDED, PromptSource


def run(config: GenerateConfig) -> dict[str, Any]:
    """Runs or plans the job; returns the report that is printed."""
    source = PromptSource(
        config.prompts, seeds=range(config.seed, config.seed + config.variants), negative=config.negative,
        lists=config.lists, prompt_column=config.prompt_column,
    )  # fmt: skip
    make = MakeOptions(
        steps=config.steps, guidance=config.guidance, temperature=config.temperature,
        reference=config.reference,
    )  # fmt: skip
    info = describe_synthesis(config.model, make, "generate")
    device = "cpu" if config.gpus_per_actor == 0 else "auto"
    mapping = Mapping(
        job="generate",
        settings={"model_fingerprint": info.fingerprint, "cutout": config.cutout},
        about={"model": {"name": info.name, "fingerprint": info.fingerprint, "licence": info.licence}},
        prepare=ReadPrompts(),
        load=LoadGenerator(
            load=partial(load_synthesis, config.model, make, "generate", device=device, threads=1),
            info=info,
            cut=config.cutout,
        ),
        schema=made_schema(user_fields(users_columns(source.user_columns, ADDED))),
    )
    way = Way.of(
        config,
        what={"model": f"{info.name} ({info.licence})"},
        row_bytes=info.side**2 + 500,
    )
    about = About(title="Pictures from words", collection=config.prompts, assets=config.assets)
    return run_planned(mapping, source, way, finish=lambda report: present(config.out, about))


def main() -> None:
    run(parse(GenerateConfig, "python -m jobs.generate"))


if __name__ == "__main__":
    entry(main)
