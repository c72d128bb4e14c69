"""Every command in the README exists, with every flag that it is shown with; every file it points to is there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(?:sh|console)\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    """Lines that run Python or llmvis, less the prompt, the job submission around them and comments."""
    lines = [line.removeprefix("$ ").strip() for block in BLOCKS for line in block.splitlines()]
    lines = [line.split(" -- ", 1)[-1] for line in lines]
    return [line.split("   #")[0] for line in lines if line.startswith(("python -m ", "llmvis "))]


@cache
def help_of(module: tuple[str, ...]) -> str:
    run = subprocess.run([sys.executable, "-m", *module, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_readme_shows_commands() -> None:
    assert len(commands()) > 10


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_a_command_of_the_readme_exists_with_its_flags(line: str) -> None:
    words = shlex.split(line)
    if words[0] == "llmvis":
        words = ["python", "-m", "llmvis.cli", *words[1:]]
    module = tuple(words[2:4]) if words[2] == "llmvis.cli" else (words[2],)
    if words[2] == "jobs.train" and words[words.index("--stage") + 1] != "align":
        module = ("jobs.train", "--stage", "all")
    said = help_of(module)
    for flag in [w for w in words[3:] if re.match(r"--?[a-z]", w)]:
        assert re.search(rf"(^|[\s,│]){re.escape(flag)}\b", said), (
            f"{flag} is not in {' '.join(module)} --help"
        )


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\((?!http|#)([^)]+)\)", README))))
def test_what_the_readme_points_to_is_there(path: str) -> None:
    assert (ROOT / path).exists()


def test_no_output_is_left_to_fill_in() -> None:
    assert "@@" not in README


def test_make_knows_the_two_commands() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
