"""From a preset and a recipe to a stage that can be trained, and its place among the others on disk.

    <out>/tokenizer/  language/  branch/      the model so far: what `load_synthesizer` takes
    <out>/train-<stage>/                      metrics, samples, states of a stage
    <out>/data/                               fitted pictures and code words

Each stage begins from what lies in `out`: the language model needs the tokeniser, the branch
needs both. Knows no Ray.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llmvis.models.language import LanguageConfig
from llmvis.models.synthesizer import Synthesizer
from llmvis.models.synthesizer_files import load_synthesizer, new_language
from llmvis.models.tokenizer import ImageTokenizer
from llmvis.models.tokenizer_files import load_tokenizer
from llmvis.models.two_tower import load_two_tower
from llmvis.presets import Preset
from llmvis.recipe import Recipe
from llmvis.schema import UserError
from llmvis.synthesis_data import code_all, load_recipe
from llmvis.training.branch import BranchStage
from llmvis.training.common import ALONE, Every, Stage, World, run_alone
from llmvis.training.language import LanguageStage
from llmvis.training.tokenize import TokenizeStage

STAGES = ("tokenize", "language", "branch")
PART_OF = {"tokenize": "tokenizer", "language": "language", "branch": "branch"}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a model is trained and with what. `start`: a model folder whose weights to begin from."""

    out: Path
    preset: Preset
    recipe: Recipe
    start: Path | None = None
    max_rows: int | None = None

    def files_of(self, stage: str) -> Path:
        """Metrics, samples and states of a stage."""
        return self.out / f"train-{stage}"

    def part_of(self, stage: str) -> Path:
        """Where a trained stage's part of the model lies."""
        return self.out / PART_OF[stage]

    def is_done(self, stage: str) -> bool:
        """The stage's part is there."""
        return (self.part_of(stage) / "model.safetensors").is_file()

    def finish(self, stage: str, trained: Stage) -> None:
        """Put a stage's part in its place, whole or not at all."""
        partial = self.out / f".{PART_OF[stage]}"
        shutil.rmtree(partial, ignore_errors=True)
        trained.export(partial)
        shutil.rmtree(self.part_of(stage), ignore_errors=True)
        partial.rename(self.part_of(stage))


def make_stage(
    name: str, place: Place, *, world: World = ALONE, device: str = "cpu", wait: Callable[[], None] = lambda: None,
) -> Stage:  # fmt: skip
    """The stage `name`, ready to step. `wait` returns when all workers have come to it.

    Raises `UserError` where a part that it builds on is missing.
    """
    preset = place.preset
    loaded = load_recipe(place.recipe, side_of(name, place), place.out / "data", max_rows=place.max_rows)
    if name == "tokenize":
        torch.manual_seed(preset.tokenize.optim.seed)
        begun = place.start and load_tokenizer(place.start / "tokenizer")
        model = begun or ImageTokenizer(preset.tokenizer)
        trunk = load_two_tower().model.trunk
        return TokenizeStage(
            model, loaded.weighted(), preset.tokenize, trunk=trunk, world=world, device=device
        )
    tokenizer = _tokenizer(place).to(device)
    data = code_all(
        loaded, tokenizer, preset.language.views, place.out / "data",
        device=device, rank=world.rank, world=world.size, wait=wait,
    )  # fmt: skip
    if name == "language":
        return LanguageStage(_begun(place, tokenizer, device), data, loaded, preset.language, world=world)
    if not place.is_done("language"):
        raise UserError(f"{place.out} has no language/: train --stage language first")
    whole = load_synthesizer(place.out, device)
    return BranchStage(whole, data, loaded, preset.branch, trunk=load_two_tower().model.trunk, world=world)


def side_of(name: str, place: Place) -> int:
    """Side of the pictures that a stage trains on, px."""
    if name != "tokenize":
        return _tokenizer(place).config.image_size
    if place.start is not None:
        return load_tokenizer(place.start / "tokenizer").config.image_size
    return place.preset.tokenizer.image_size


def _tokenizer(place: Place) -> ImageTokenizer:
    for folder in (place.out, place.start):
        if folder is not None and (folder / "tokenizer" / "model.safetensors").is_file():
            if folder != place.out:
                shutil.copytree(folder / "tokenizer", place.part_of("tokenize"), dirs_exist_ok=True)
            return load_tokenizer(folder / "tokenizer")
    raise UserError(f"{place.out} has no tokenizer/: train --stage tokenize first, or --start from a model")


def _begun(place: Place, tokenizer: ImageTokenizer, device: str) -> Synthesizer:
    """A synthesiser whose language model is a pre-trained one, or that of `start`."""
    if place.start is not None:
        started = load_synthesizer(place.start, device)
        return Synthesizer(tokenizer, started.language, started.words, device=device)
    torch.manual_seed(place.preset.language.optim.seed)
    config = LanguageConfig.of(tokenizer.config, place.preset.language_model, place.preset.words)
    return Synthesizer(tokenizer, *new_language(config, tokenizer), device=device)


def train_alone(name: str, place: Place, every: Every, device: str = "cpu") -> None:
    """Train a stage in this process, without Ray; the same call goes on where it stopped."""
    if place.is_done(name):
        raise UserError(f"{place.part_of(name)} is trained: take it, or give another --out")
    stage = make_stage(name, place, device=device)
    run_alone(stage, place.files_of(name), every)
    place.finish(name, stage)


def claim(place: Place) -> None:
    """Writes `run.json`, or checks that the run there was begun with the same preset, recipe, start and rows."""
    file = place.out / "run.json"
    told_of = {
        "preset": asdict(place.preset),
        "recipe": place.recipe.describe(),
        "start": str(place.start) if place.start else None,
        "max_rows": place.max_rows,
    }
    settings = json.loads(json.dumps(told_of))
    if file.exists():
        told = json.loads(file.read_text())
        if told != settings:
            changed = sorted(k for k in settings.keys() | told.keys() if settings.get(k) != told.get(k))
            raise UserError(
                f"{place.out} holds a run with another {', '.join(changed)}: give the same or another --out"
            )
    place.out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1))
