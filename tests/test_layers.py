"""Imports go one way, and the heavy ones stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [  # from the bottom; a module may import from its own layer and those before it
    {"config", "schema", "storage", "formats", "recipe"},
    {"sources", "data", "images", "plan", "ledger", "losses", "metrics", "summary", "index", "weights"}
    | {"preflight"}
    | {"retry", "events", "folders", "inspection", "cleanup"}
    | {"made", "edits", "edit_steps", "edit_words", "enhance", "degrade", "scene"},
    {"models"},
    {"encode", "search", "augment", "align_data", "pictures", "synthesis_data", "training", "presets"}
    | {"evaluation", "evaluation_synthesis", "evaluation_why", "explain", "report", "entry"}
    | {"export", "gates", "card", "config_bulk", "translate", "generate", "dataset", "seeds", "present"}
    | {"steps", "config_ops", "inspection_view", "evaluation_imagine", "evaluation_enhance"}
    | {"clip_retrieval", "indexing", "batch_search", "mining", "filtered"},
    {"cluster"},
    {"cli", "demo", "jobs"},
]
ONLY_IN = {"ray": {"cluster"}, "faiss": {"index"}}
HEAVY = {"torch", "ray", "faiss", "transformers"}


def modules() -> list[Path]:
    return sorted([*(ROOT / "llmvis").rglob("*.py"), *(ROOT / "jobs").glob("*.py")])


def part_of(path: Path) -> str:
    """The name under which a file stands in `LAYERS`."""
    inside = path.relative_to(ROOT)
    return inside.stem if inside.parts[0] == "llmvis" and len(inside.parts) == 2 else inside.parts[-2]


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(part: str) -> int:
    return next(i for i, parts in enumerate(LAYERS) if part in parts)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    part = part_of(path)
    if part in ("__init__", "weights", "llmvis"):
        return
    for name in imported(path):
        words = name.split(".")
        if words[0] == "jobs":
            assert part in ("jobs", "cli", "demo"), f"{path.name} imports {name}"
        if (
            words[0] == "llmvis"
            and len(words) > 1
            and (ROOT / "llmvis" / words[1]).exists() | (ROOT / "llmvis" / f"{words[1]}.py").exists()
        ):
            assert layer(words[1]) <= layer(part), f"{path.relative_to(ROOT)} imports upward: {name}"
        if words[0] in ONLY_IN:
            assert part in ONLY_IN[words[0]], f"{path.relative_to(ROOT)} imports {name}"


def test_every_module_is_in_a_layer() -> None:
    known = set().union(*LAYERS)
    assert {part_of(p) for p in modules()} - {"__init__", "llmvis"} <= known


def test_the_lowest_layers_and_the_driver_import_no_torch() -> None:
    light = (
        "llmvis.sources, llmvis.plan, llmvis.images, llmvis.encode, llmvis.cluster.jobs, llmvis.models.load"
    )
    code = f"import sys, {light}; print(*({{'torch', 'faiss', 'transformers'}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_no_file_is_much_over_400_lines() -> None:
    long = {str(p.relative_to(ROOT)): n for p in modules() if (n := len(p.read_text().splitlines())) > 430}
    assert not long
