"""The same names in other hands: OpenMoji (line and colour) and Microsoft's Fluent emoji (flat).

A drawing takes the split of its name in the embedded collection, so a held-out name is held
out in every style; OpenMoji's own names train. Neither set is shipped: OpenMoji is CC BY-SA
4.0 (openmoji.org), Fluent MIT. Both are SVG in npm packages, and rendering needs
`resvg_py`. No torch, no Ray.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llmvis.data import load_emoji
from llmvis.data.openclipart import cache_folder
from llmvis.data.packages import Package, unpack

OPENMOJI = Package(
    name="openmoji",
    version="17.0.0",
    filename="openmoji-17.0.0.tgz",
    sha256="55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
    registry="npm",
)
FLUENT = Package(
    name="@iconify-json/fluent-emoji-flat",
    version="1.2.6",
    filename="iconify-json-fluent-emoji-flat-1.2.6.tgz",
    sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    registry="npm",
)
SIZE = 224  # px
_EDITION = "2"  # raise it when the rules change: the cache file carries it
_PROOF = {OPENMOJI: "data/openmoji.json", FLUENT: "icons.json"}


def find_drawings(package: Package, folder: Path | str | None = None) -> Path | None:
    """The unpacked npm package: `folder`, or in the cache; None if it is not at hand."""
    root = Path(folder) if folder else cache_folder() / "unpacked" / _tree(package)
    for place in (root, root / "package"):
        if (place / _PROOF[package]).is_file():
            return place
    if folder:
        raise ValueError(f"no {package.name} under {folder}: it needs {_PROOF[package]} of the npm package")
    return None


def fetch_drawings(package: Package) -> Path:
    """Download and unpack the npm package once; return its folder."""
    return unpack(package, cache_folder()) / "package"


def load_drawings(package: Package, folder: Path) -> pa.Table:
    """Drawings with the embedded collection's columns `id, image, caption, keywords, split`."""
    cached = cache_folder() / f"drawings-{package.sha256[:8]}-{_EDITION}-{SIZE}px.parquet"
    if not cached.exists():
        svgs = _openmoji(folder) if package == OPENMOJI else _fluent(folder)
        table = _render(svgs)
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}.partial")
        pq.write_table(table, partial)
        partial.replace(cached)
    return pq.read_table(cached)


def _openmoji(folder: Path) -> Iterator[dict[str, Any]]:
    """Colour drawings without skin tones: hexcode, name, keywords, SVG text."""
    for entry in json.loads((folder / "data" / "openmoji.json").read_text()):
        svg = folder / "color" / "svg" / f"{entry['hexcode']}.svg"
        if not entry["skintone"] and svg.is_file():
            words = [word.strip() for word in f"{entry['tags']},{entry['openmoji_tags']}".split(",")]
            yield {
                "id": entry["hexcode"],
                "name": entry["annotation"],
                "keywords": [word for word in words if word],
                "svg": svg.read_text(),
            }


def _fluent(folder: Path) -> Iterator[dict[str, Any]]:
    """Flat drawings; their names are those of the embedded collection."""
    icons = json.loads((folder / "icons.json").read_text())
    for hexcode, name in sorted(json.loads((folder / "chars.json").read_text()).items()):
        icon = icons["icons"].get(name)
        if icon is not None:
            box = f"0 0 {icon.get('width', icons.get('width', 32))} {icon.get('height', icons.get('height', 32))}"
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'
            yield {"id": hexcode, "name": None, "keywords": [], "svg": svg}


def _render(drawings: Iterator[dict[str, Any]]) -> pa.Table:
    try:
        import resvg_py
    except ImportError as error:
        raise ValueError("rendering SVG drawings needs resvg_py: pip install resvg_py") from error
    emoji = load_emoji(columns=["id", "caption", "keywords", "split"]).to_pylist()
    known = {_bare(row["id"]): row for row in emoji}
    held_names = {row["caption"].lower() for row in emoji if row["split"] != "train"}
    rows = []
    for drawing in drawings:
        same = known.get(_bare(drawing["id"]))
        own_name = drawing["name"] if same is None else None
        if same is None and (own_name is None or own_name.lower() in held_names):
            continue
        rows.append(
            {
                "id": drawing["id"],
                "image": {
                    "bytes": bytes(resvg_py.svg_to_bytes(svg_string=drawing["svg"], width=SIZE, height=SIZE))
                },
                "caption": same["caption"] if same else own_name,
                "keywords": list(dict.fromkeys([*(same["keywords"] if same else []), *drawing["keywords"]])),
                "split": same["split"] if same else "train",
            }
        )
    return pa.Table.from_pylist(rows)


def _bare(hexcode: str) -> str:
    """Code points without the variation selector."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def _tree(package: Package) -> str:
    return f"{package.name.replace('/', '-')}-{package.sha256[:8]}"
