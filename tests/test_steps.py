"""A file of steps: references to earlier ones, flags checked, mistakes told with their place."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.loop import CONFIGS
from llmvis.config_bulk import DatasetConfig
from llmvis.schema import UserError
from llmvis.steps import read_steps

CIRCLE = """
out: {out}
steps:
  seeds: {{job: seeds, index: idx, queries: [a red flower], k: 3}}
  styled: {{job: translate, images: "@seeds", instruction: mirror}}
  set: {{job: dataset, made: ["@styled"], near-duplicates: 0.9, out: elsewhere}}
  grown: {{job: index, embeddings: "@set", out: idx, add: true}}
"""


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "circle.yaml"
    file.write_text(text.format(out=tmp_path / "out"))
    return file


def test_steps_take_what_earlier_ones_make(tmp_path: Path) -> None:
    seeds, styled, made, grown = read_steps(write(tmp_path, CIRCLE), CONFIGS)
    assert (seeds.config.out, seeds.after) == (str(tmp_path / "out" / "seeds"), ())
    assert (styled.config.images, styled.after) == (seeds.config.out, ("seeds",))
    assert styled.config.instruction == ("mirror",) and styled.config.seeds == (0,)
    assert isinstance(made.config, DatasetConfig) and made.config.gates.near_duplicates == 0.9
    assert made.config.made == (styled.config.out,) and made.config.out == "elsewhere"
    assert grown.config.embeddings == "elsewhere" and grown.config.add


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("@seeds", "@seed"), "step styled: there is no step 'seed' before it"),
        (("job: index", "job: indeks"), "step grown: needs `job:`, one of seeds, translate"),
        (("k: 3", "kk: 3"), "step seeds: unknown kk; known: index, k, out, queries"),
        (("index: idx, ", ""), "step seeds: needs index"),
        (("near-duplicates: 0.9", "near-duplicates: 9"), "near-duplicates is 9"),
        (("steps:", "step:"), "must hold `out:` and `steps:`"),
        (("  styled", "  sty led"), "a step's name is letters, digits and _"),
    ],
)
def test_a_mistake_is_told_with_its_place(change: tuple[str, str], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        read_steps(write(tmp_path, CIRCLE.replace(*change)), CONFIGS)
