"""Train a synthesis model in one process, without Ray: `python -m llmvis.training --out runs/small --device cuda`.

For a machine that has torch and transformers and no cluster. The same stages, files and figures
as `python -m jobs.train`; run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llmvis.entry import entry
from llmvis.presets import PRESETS
from llmvis.recipe import PACKAGED_RECIPE, read_recipe
from llmvis.training.common import Every
from llmvis.training.stages import CHOICES, Place, check, stages_of, train_alone


def _count(text: str) -> int:
    """A whole number of at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return number


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m llmvis.training", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--stage", choices=CHOICES, default="all")
    parser.add_argument("--preset", choices=list(PRESETS), default="small")
    parser.add_argument("--recipe", type=Path, default=PACKAGED_RECIPE)
    parser.add_argument("--start", type=Path, help="folder of a model to begin from; its code words stay")
    parser.add_argument(
        "--train-encoder", action="store_true",
        help="with --start: train the encoder too; the language model must then learn the new code words",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument("--steps", type=_count, help="of each stage, for another length than the preset's")
    parser.add_argument("--batch-size", type=_count)
    parser.add_argument(
        "--max-rows", type=_count, help="use only so many pictures of each part (a quick trial)"
    )
    parser.add_argument("--evaluate-every", type=_count, default=500)
    given = parser.parse_args()
    preset = PRESETS[given.preset]().changed(steps=given.steps, batch_size=given.batch_size, seed=None)
    place = Place(
        out=given.out.resolve(), preset=preset, recipe=read_recipe(given.recipe),
        start=given.start and given.start.resolve(), train_encoder=given.train_encoder, max_rows=given.max_rows,
    )  # fmt: skip
    stages = stages_of(given.stage, place.recipe)
    check(stages, place)
    for stage in stages:
        if not place.is_done(stage):
            train_alone(stage, place, Every(evaluate=given.evaluate_every), given.device)
    print(f"model: {place.out}")


if __name__ == "__main__":
    entry(main)
