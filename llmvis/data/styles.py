"""The same emoji in further hands, for image translation: line art, colour, two flat styles.

One Parquet file inside the package, `styles.parquet`: OpenMoji as pixel-aligned line and
colour drawings (CC BY-SA 4.0), Twemoji (CC BY 4.0) and Fluent Emoji flat (MIT); `licences/`
has the texts and whose work it is, `build_styles.py` the way it is made. Ids, groups and
sides of the split are those of the embedded collection, which is the style `noto` here.
It knows nothing of models, sizes or backgrounds: pictures are transparent as they are.
No torch, no Ray.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from llmvis.data import load_emoji
from llmvis.schema import UserError

NOTO = "noto"
STYLES = ("openmoji-line", "openmoji", "twemoji", "fluent-flat")
"""Styles of the file, in its order. `noto`, the embedded collection, goes wherever one of them does."""
LICENCES = {
    "openmoji-line": "CC-BY-SA-4.0",
    "openmoji": "CC-BY-SA-4.0",
    "twemoji": "CC-BY-4.0",
    "fluent-flat": "MIT",
}
COLUMNS = ("id", "style", "image", "caption", "keywords", "group", "split")

Split = Literal["train", "validation", "test", "unused"]
"""`unused`: a drawing outside the collection that resembles a held-out emoji."""


def styles_path() -> Path:
    """The Parquet file of the further styles."""
    return Path(__file__).with_name("styles.parquet")


def load_style(style: str, split: Split | None = None, columns: list[str] | None = None) -> pa.Table:
    """Drawings in one style, whole (with `unused`) or one side of the split, in order of id.

    Columns: `id` (code points in hex, as in the embedded collection), `style`, `image`
    (struct of WebP bytes, of PNG for `noto`, and a path), `caption`, `keywords`, `group`
    (leak group), `split`.
    """
    wanted = list(dict.fromkeys([*(COLUMNS if columns is None else columns), "id", "split"]))
    if unknown := [name for name in wanted if name not in COLUMNS]:
        raise UserError(f"no column {unknown[0]!r}: choose from {', '.join(COLUMNS)}")
    if style == NOTO:
        table = load_emoji(columns=[name for name in wanted if name != "style"])
        table = table.append_column("style", pa.repeat(style, table.num_rows)).sort_by("id")
    elif style in STYLES:
        # The filter's own column must be read, and the pictures of the other styles not.
        read = list(dict.fromkeys([*wanted, "style"]))
        table = pq.read_table(styles_path(), columns=read, filters=[("style", "=", style)])
    else:
        raise UserError(f"no style {style!r}: choose from {', '.join((NOTO, *STYLES))}")
    if split is not None:
        table = table.filter(pc.equal(table["split"], split))
    return table.select(list(COLUMNS) if columns is None else columns)


def load_pairs(source_style: str, target_style: str, split: Split | None = None) -> pa.Table:
    """Every emoji that both styles draw, in order of id.

    Columns: `id`, `caption`, `keywords`, `group`, `split`, and the two pictures `source` and
    `target`. Only `openmoji-line` and `openmoji` lie on each other pixel by pixel. Order and
    rows depend on nothing but the arguments and the file.
    """
    source, target = load_style(source_style, split), load_style(target_style, split)
    row_of = {code: row for row, code in enumerate(source["id"].to_pylist())}
    both = [(row_of[code], row) for row, code in enumerate(target["id"].to_pylist()) if code in row_of]
    source = source.take(pa.array([row for row, _ in both], pa.int64()))
    target = target.take(pa.array([row for _, row in both], pa.int64()))
    pairs = source.select(["id", "caption", "keywords", "group", "split"])
    if split is None:  # what one side leaves out of training, the pair does
        splits = zip(source["split"].to_pylist(), target["split"].to_pylist(), strict=True)
        joined = ["unused" if "unused" in pair else pair[0] for pair in splits]
        pairs = pairs.set_column(4, "split", pa.array(joined))
    return pairs.append_column("source", source["image"]).append_column("target", target["image"])
