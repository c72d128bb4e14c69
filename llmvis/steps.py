"""A file of steps: jobs whose outputs are others' inputs, in one YAML. Parsed and checked here, run by `jobs.loop`.

    out: loop
    steps:
      seeds:  {job: seeds, index: idx, queries: [a red flower], k: 24}
      styled: {job: translate, images: "@seeds", instruction: [draw it as Twemoji]}
      drawn:  {job: generate, prompts: "a {colour} flower", fill: ["colour=red,blue"]}
      set:    {job: dataset, made: ["@styled", "@drawn"], near_duplicates: 0.97}
      coded:  {job: encode, images: "@set"}
      grown:  {job: index, embeddings: "@coded", out: idx, add: true}

`@name` is the output of an earlier step, `<out>/<name>` unless the step has an `out` of its
own. All other keys are the job's flags. Knows no jobs: who runs them brings their configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from llmvis.schema import UserError


@dataclass(frozen=True, kw_only=True)
class Step:
    """One job of a file; `config` has paths in place of `@name`s, `after` the steps that it waits for."""

    name: str
    job: str
    config: Any
    after: tuple[str, ...]


def read_steps(file: str | Path, configs: Mapping[str, type[Any]]) -> list[Step]:
    """The steps of a file, in its order. Raises `UserError` that says what is wrong where."""
    try:
        told = yaml.safe_load(Path(file).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: {error}") from error
    if not isinstance(told, dict) or set(told) != {"out", "steps"} or not isinstance(told["steps"], dict):
        raise UserError(f"{file} must hold `out:` and `steps:`, the steps by name")
    steps: list[Step] = []
    outs: dict[str, str] = {}
    for name, given in told["steps"].items():
        where = f"{file}, step {name}"
        if not isinstance(name, str) or not name.isidentifier():
            raise UserError(f"{where}: a step's name is letters, digits and _")
        if not isinstance(given, dict) or given.get("job") not in configs:
            raise UserError(f"{where}: needs `job:`, one of {', '.join(configs)}")
        values = {str(key).replace("-", "_"): value for key, value in given.items()}
        job = values.pop("job")
        values.setdefault("out", str(Path(told["out"]) / name))
        after: list[str] = []
        values = {key: _resolved(value, outs, after, where) for key, value in values.items()}
        steps.append(
            Step(name=name, job=job, config=_config(configs[job], values, where), after=tuple(after))
        )
        outs[name] = str(values["out"])
    return steps


def _resolved(value: Any, outs: Mapping[str, str], after: list[str], where: str) -> Any:
    """`value` with the places of earlier steps in place of their names."""
    if isinstance(value, list):
        return tuple(_resolved(item, outs, after, where) for item in value)
    if not isinstance(value, str) or not value.startswith("@"):
        return value
    if value[1:] not in outs:
        raise UserError(f"{where}: there is no step {value[1:]!r} before it")
    after.append(value[1:])
    return outs[value[1:]]


def _config(kind: type[Any], values: dict[str, Any], where: str) -> Any:
    """A config from flat values; those of a nested config (gates) stand among them, as its flags do."""
    hints = get_type_hints(kind)
    nested = {f.name: hints[f.name] for f in fields(kind) if is_dataclass(hints[f.name])}
    known = {f.name for f in fields(kind)} - set(nested)
    for name, inner in nested.items():
        own = {f.name for f in fields(inner)}
        known |= own
        values[name] = inner(**{key: values.pop(key) for key in own & set(values)})
    if unknown := sorted(set(values) - known - set(nested)):
        raise UserError(f"{where}: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    needed = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in values]:
        raise UserError(f"{where}: needs {', '.join(missing)}")
    listed = {
        f.name for f in fields(kind) if str(hints[f.name]).startswith(("tuple", "typing.Annotated[tuple"))
    }
    return kind(
        **{
            key: (value,) if key in listed and not isinstance(value, tuple) else value
            for key, value in values.items()
        }
    )
