"""From a preset and a recipe to a stage that can be trained, and its place among the others on disk.

    <out>/tokenizer/  language/  branch/      the model so far: what `load_synthesizer` takes
    <out>/restorer/                           denoises, deblurs, enlarges; needs none of the others
    <out>/train-<stage>/                      metrics, samples, states of a stage; its settings in run.json
    <out>/data/                               fitted pictures and code words

Each stage begins from what lies in `out`: the language model needs the tokeniser, the branch
needs both, the restorer nothing. What can be wrong is found before anything is written (`check`). Knows no Ray.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmvis.models.language import LanguageConfig
from llmvis.models.language_model import language_model_folder
from llmvis.models.restorer import Restorer, load_restorer
from llmvis.models.synthesizer import Synthesizer
from llmvis.models.synthesizer_files import load_synthesizer, made_for, new_language
from llmvis.models.tokenizer import ImageTokenizer
from llmvis.models.tokenizer_files import encoder_digest, load_tokenizer
from llmvis.models.two_tower import load_two_tower
from llmvis.pictures import MapRows
from llmvis.presets import Preset
from llmvis.recipe import Recipe
from llmvis.schema import UserError
from llmvis.synthesis_data import code_all, counted, fit_recipe, open_recipe
from llmvis.training.branch import BranchStage
from llmvis.training.common import ALONE, Every, Stage, World, run_alone, usual_modes
from llmvis.training.language import LanguageStage
from llmvis.training.restore import RestoreStage
from llmvis.training.tokenize import TokenizeStage

STAGES = ("tokenize", "language", "branch")
"""Of the synthesis model, in their order: "all"."""
CHOICES = (*STAGES, "restore", "all")
"""What a `--stage` may be; the restorer stands for itself."""
PART_OF = {"tokenize": "tokenizer", "language": "language", "branch": "branch", "restore": "restorer"}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a model is trained and with what.

    start: a model folder whose weights to begin from. Its language model knows the code words of
    its tokeniser, so the encoder stays as it is, unless `train_encoder` says otherwise.
    """

    out: Path
    preset: Preset
    recipe: Recipe
    start: Path | None = None
    train_encoder: bool = False
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
        usual_modes(partial)
        self._put(partial, stage)

    def adopt_tokenizer(self) -> None:
        """Where `out` has no tokeniser, that of `start` becomes its own."""
        if not self.is_done("tokenize"):
            partial = self.out / f".{PART_OF['tokenize']}"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(_tokenizer_folder(self), partial)
            self._put(partial, "tokenize")

    def _put(self, partial: Path, stage: str) -> None:
        shutil.rmtree(self.part_of(stage), ignore_errors=True)
        partial.rename(self.part_of(stage))


def stages_of(asked: str, recipe: Recipe) -> tuple[str, ...]:
    """The stages behind a `--stage`; "all" goes without the branch where the recipe has no pairs for it."""
    if asked != "all":
        return (asked,)
    return STAGES if recipe.pairs else STAGES[:2]


def check(names: Sequence[str], place: Place, language_model: str | None = None) -> None:
    """Whether these stages can be trained one after the other; writes nothing.

    language_model: one that the user asked for by name.

    Raises `UserError` where all are trained, or a part that one builds on is missing or does not fit.
    """
    todo = [name for name in names if not place.is_done(name)]
    if not todo:
        raise UserError(f"{place.out} is trained already: take it, or give another --out")
    if "branch" in todo and not place.recipe.pairs:
        raise UserError("the branch is for translation: give a recipe with pairs")
    if place.train_encoder and place.start is None:
        raise UserError("--train-encoder goes with --start; without it the encoder is trained in any case")
    if todo == ["restore"]:
        if place.start is not None:
            load_restorer(place.start / "restorer")
        return
    kept = None if "tokenize" in todo else _tokenizer(place)
    started = load_synthesizer(place.start) if place.start and "language" in todo else None
    if place.start and kept is None:
        load_tokenizer(place.start / "tokenizer")
    if started is None and "language" in todo:
        language_model_folder(place.preset.language_model)
    if started is not None and language_model not in (None, started.language.config.language_model):
        raise UserError(
            f"{place.start} has a language model of its own, begun from {started.language.config.language_model!r}: "
            "leave --language-model out, or --start"
        )
    if started is not None and kept is not None:
        _check_code_words(place, kept, started)
    if "branch" in todo and "language" not in todo:
        if not place.is_done("language"):
            raise UserError(f"{place.out} has no language/: train --stage language first")
        if kept is None or made_for(place.part_of("language")) not in (None, encoder_digest(kept)):
            raise UserError(
                f"{place.out}: language/ was trained for the code words of another tokenizer/: move it away "
                "and train --stage language again"
            )


def _check_code_words(place: Place, kept: ImageTokenizer, started: Synthesizer) -> None:
    """Raises `UserError` where the tokeniser in `out` makes other code words than `start`'s language model knows."""
    sizes = [(c.grid, c.groups, c.levels) for c in (kept.config, started.language.config)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{place.out}: the sizes of tokenizer/ are not those of {place.start}: give another --out"
        )
    if encoder_digest(kept) != encoder_digest(started.tokenizer) and not place.train_encoder:
        raise UserError(
            f"{place.out}: tokenizer/ makes other code words than the language model of {place.start} knows: give "
            "another --out, or --train-encoder to let it learn them"
        )


def prepare(name: str, place: Place, map_rows: MapRows = map) -> Path:
    """Fits a stage's pictures, tells what was left out, and claims the stage; returns the pictures' folder."""
    pictures = fit_recipe(place.recipe, side_of(name, place), place.out / "data", map_rows, place.max_rows)
    for line in counted(open_recipe(place.recipe, pictures)):
        print(line, flush=True)
    claim(name, place, pictures.name)
    if name not in ("tokenize", "restore"):
        place.adopt_tokenizer()
    return pictures


def make_stage(
    name: str, place: Place, pictures: Path, *,
    world: World = ALONE, device: str = "cpu", wait: Callable[[], None] = lambda: None,
) -> Stage:  # fmt: skip
    """The stage `name` on the pictures that `prepare` fitted, ready to step.

    `wait` returns when all workers have come to it.
    """
    preset = place.preset
    loaded = open_recipe(place.recipe, pictures)
    if name == "tokenize":
        torch.manual_seed(preset.tokenize.optim.seed)
        begun = place.start and load_tokenizer(place.start / "tokenizer")
        model = begun or ImageTokenizer(preset.tokenizer)
        frozen = preset.tokenize.freeze_encoder or (place.start is not None and not place.train_encoder)
        config = replace(preset.tokenize, freeze_encoder=frozen)
        trunk = load_two_tower().model.trunk
        return TokenizeStage(model, loaded.weighted(), config, trunk=trunk, world=world, device=device)
    if name == "restore":
        torch.manual_seed(preset.restore.optim.seed)
        start = place.start and load_restorer(place.start / "restorer")
        net = start or Restorer(preset.restorer)
        return RestoreStage(net, loaded.weighted(), preset.restore, world=world, device=device)
    tokenizer = _tokenizer(place).to(device)
    data = code_all(
        loaded, tokenizer, preset.language.views, place.out / "data",
        device=device, rank=world.rank, world=world.size, wait=wait,
    )  # fmt: skip
    if name == "language":
        return LanguageStage(_begun(place, tokenizer, device), data, loaded, preset.language, world=world)
    whole = load_synthesizer(place.out, device)
    return BranchStage(whole, data, loaded, preset.branch, trunk=load_two_tower().model.trunk, world=world)


def side_of(name: str, place: Place) -> int:
    """Side of the pictures that a stage trains on, px."""
    if name == "restore":
        return place.preset.restore.side
    if name != "tokenize":
        return _tokenizer(place).config.image_size
    if place.start is not None:
        return load_tokenizer(place.start / "tokenizer").config.image_size
    return place.preset.tokenizer.image_size


def _tokenizer(place: Place) -> ImageTokenizer:
    return load_tokenizer(_tokenizer_folder(place))


def _tokenizer_folder(place: Place) -> Path:
    """Of the tokeniser that a later stage builds on: that of `out`, or else that of `start`."""
    for folder in (place.out, place.start):
        if folder is not None and (folder / "tokenizer" / "model.safetensors").is_file():
            return folder / "tokenizer"
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
    check([name], place)
    stage = make_stage(name, place, prepare(name, place), device=device)
    run_alone(stage, place.files_of(name), every)
    place.finish(name, stage)


def claim(name: str, place: Place, pictures: str) -> None:
    """Writes the stage's `run.json`, or checks that its run was begun with the same settings and pictures.

    Every stage has its own, so that stages may differ. Raises `UserError` that names what is another.
    """
    file = place.files_of(name) / "run.json"
    told = asdict(place.preset)
    of_stage = {
        "tokenize": ("tokenizer", "tokenize"),
        "language": ("language", "language_model", "words"),
        "branch": ("branch",),
        "restore": ("restorer", "restore"),
    }[name]
    settings = {
        "preset": {key: told[key] for key in of_stage},
        "recipe": place.recipe.describe(),
        "start": str(place.start) if place.start else None,
        "train_encoder": place.train_encoder,
        "max_rows": place.max_rows,
        "pictures": pictures,
    }
    mine = dict(_flat(json.loads(json.dumps(settings))))
    if file.exists():
        its = dict(_flat(json.loads(file.read_text())))
        if changed := sorted(key for key in mine.keys() | its.keys() if mine.get(key) != its.get(key)):
            raise UserError(
                f"{file.parent} holds a run with another {', '.join(changed)}: give the same or another --out"
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(".run.json")
    partial.write_text(json.dumps(settings, indent=1))
    partial.replace(file)


def _flat(told: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested settings under dotted names."""
    for key, value in told.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
