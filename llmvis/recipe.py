"""What a synthesis model is trained on: a small YAML file of collections, pairs and tasks.

    collections:
      - {name: mine, images: photos/, style: photograph}
    pairs:
      - {name: colour, source: sketches/, target: paintings/, instructions: [paint it, "paint it: {caption}"]}
    tasks: {generate: 2, translate: 2, inpaint: 1, caption: 1}

`images`, `source` and `target` are folders or Parquet files as `jobs.encode` takes them, or
the name of a packaged set: emoji, openmoji, openmoji-line, twemoji, fluent-flat, or
openclipart where it is at hand. Two sides of a pair belong together by id (packaged sets)
or by path without its ending (folders). Knows no pictures, no torch, no Ray.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from llmvis.schema import UserError

TASKS = ("generate", "translate", "inpaint", "caption")
PACKAGED_RECIPE = Path(__file__).with_name("data") / "recipe.yaml"
PartT = TypeVar("PartT")


@dataclass(frozen=True, kw_only=True)
class Collection:
    """Captioned pictures. `style` is added to the words, so that it can be asked for."""

    name: str
    images: str
    style: str = ""
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pictures before and after. In an instruction, `{caption}` stands for the picture's caption.

    box: cut both sides to what is drawn, so that two hands' drawings of a thing lie on each other.
    """

    name: str
    source: str
    target: str
    instructions: tuple[str, ...]
    box: bool = False
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that one model is trained on; `tasks` are relative weights."""

    collections: tuple[Collection, ...] = ()
    pairs: tuple[Pairs, ...] = ()
    tasks: dict[str, float] = field(default_factory=lambda: {"generate": 1.0})

    def __post_init__(self) -> None:
        if unknown := set(self.tasks) - set(TASKS):
            raise UserError(f"unknown tasks {', '.join(sorted(unknown))}: there are {', '.join(TASKS)}")
        weights = [
            *self.tasks.values(),
            *(p.weight for p in self.collections),
            *(p.weight for p in self.pairs),
        ]
        if not all(isinstance(weight, int | float) and 0 <= weight < math.inf for weight in weights):
            raise UserError(f"weights are numbers from 0 up, not {', '.join(map(str, weights))}")
        if not any(self.tasks.values()):
            raise UserError("tasks: at least one of them needs a weight above 0")
        for parts in (self.collections, self.pairs):
            if parts and not any(part.weight for part in parts):
                raise UserError("of collections, and of pairs, at least one needs a weight above 0")
        if not self.collections and not self.pairs:
            raise UserError("a recipe needs collections or pairs")
        if self.tasks.get("translate") and not self.pairs:
            raise UserError("the task translate needs pairs")
        if any(self.tasks.get(task) for task in TASKS if task != "translate") and not self.collections:
            raise UserError("generate, inpaint and caption need collections")
        if not all(part.instructions for part in self.pairs):
            raise UserError("instructions is a list of texts, with at least one")
        names = [part.name for part in self.collections] + [part.name for part in self.pairs]
        if wrong := [name for name in names if not re.fullmatch(r"\w[\w -]*", name)]:  # they become folders
            raise UserError(f"a part's name is letters, digits, spaces and hyphens, not {wrong[0]!r}")
        if len(set(names)) < len(names):
            raise UserError("two parts of a recipe have one name")

    def describe(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


def read_recipe(file: Path | str = PACKAGED_RECIPE) -> Recipe:
    """Parse a recipe; raises `UserError` with what is wrong where."""
    try:
        told = yaml.safe_load(Path(file).read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{file}: {error}") from error
    if not isinstance(told, dict) or (wrong := set(told) - {f.name for f in fields(Recipe)}):
        known = ", ".join(f.name for f in fields(Recipe))
        raise UserError(f"{file}: must hold {known}" + (f", not {', '.join(sorted(wrong))}" if told else ""))
    parts = {
        "collections": tuple(_part(Collection, row, file) for row in told.get("collections") or []),
        "pairs": tuple(_part(Pairs, row, file) for row in told.get("pairs") or []),
    }
    return Recipe(**parts, **({"tasks": told["tasks"]} if "tasks" in told else {}))  # type: ignore[arg-type]


def _part(kind: type[PartT], row: dict[str, Any], file: Path | str) -> PartT:
    if isinstance(row.get("instructions"), str):
        raise UserError(f"{file}: instructions is a list of texts, with at least one")
    try:
        return kind(**{key: tuple(v) if isinstance(v, list) else v for key, v in row.items()})
    except TypeError as error:
        raise UserError(f"{file}: {kind.__name__.lower()}: {error}") from error
