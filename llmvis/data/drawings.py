"""OpenMoji's colour drawings of the training names: the same things in a second hand.

Only trains: a drawing whose code points or name are held out in the embedded collection is
left out, and skin tones are. The art is CC BY-SA 4.0 (openmoji.org) and is not shipped; npm
`openmoji` has it as SVG, and rendering needs `resvg_py`. No torch, no Ray.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from llmvis.data import load_emoji
from llmvis.data.openclipart import cache_folder
from llmvis.data.packages import Package, unpack
from llmvis.schema import UserError

OPENMOJI = Package(
    name="openmoji",
    version="17.0.0",
    filename="openmoji-17.0.0.tgz",
    sha256="55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
    registry="npm",
)
SIZE = 224  # px
_EDITION = "3"  # raise it when the rules change: the cache file carries it
_NAMES = "data/openmoji.json"


def find_openmoji(folder: Path | str | None = None) -> Path | None:
    """The unpacked npm package: `folder`, or in the cache; None if it is not at hand."""
    root = Path(folder) if folder else cache_folder() / "unpacked" / f"{OPENMOJI.name}-{OPENMOJI.sha256[:8]}"
    for place in (root, root / "package"):
        if (place / _NAMES).is_file():
            return place
    if folder:
        raise UserError(f"no openmoji under {folder}: it needs {_NAMES} and color/svg/ of the npm package")
    return None


def fetch_openmoji() -> Path:
    """Download (4 MB) and unpack the npm package once; return its folder."""
    return unpack(OPENMOJI, cache_folder()) / "package"


def load_drawings(folder: Path) -> pa.Table:
    """Drawings with the embedded collection's columns `id, image, caption, keywords, split` (all train)."""
    cached = cache_folder() / f"openmoji-{OPENMOJI.version}-{_EDITION}-{SIZE}px.parquet"
    if not cached.exists():
        table = _render(folder)
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}.partial")
        pq.write_table(table, partial)
        partial.replace(cached)
    return pq.read_table(cached)


def _render(folder: Path) -> pa.Table:
    try:
        import resvg_py
    except ImportError as error:
        raise UserError("rendering OpenMoji needs resvg_py: pip install resvg_py") from error
    emoji = load_emoji(columns=["id", "caption", "keywords", "split"]).to_pylist()
    known = {_bare(row["id"]): row for row in emoji}
    held_names = {row["caption"].lower() for row in emoji if row["split"] != "train"}
    rows = []
    for entry in json.loads((folder / _NAMES).read_text()):
        svg = folder / "color" / "svg" / f"{entry['hexcode']}.svg"
        same = known.get(_bare(entry["hexcode"]))
        held = same is not None and same["split"] != "train"
        if entry["skintone"] or held or entry["annotation"].lower() in held_names or not svg.is_file():
            continue
        words = [word.strip() for word in f"{entry['tags']},{entry['openmoji_tags']}".split(",")]
        keywords = [*(same["keywords"] if same else []), *filter(None, words)]
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg.read_text(), width=SIZE, height=SIZE))
        rows.append(
            {
                "id": entry["hexcode"],
                "image": {"bytes": png, "path": svg.name},
                "caption": same["caption"] if same else entry["annotation"],
                "keywords": list(dict.fromkeys(keywords)),
                "split": "train",
            }
        )
    return pa.Table.from_pylist(rows)


def _bare(hexcode: str) -> str:
    """Code points without the variation selector."""
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")
