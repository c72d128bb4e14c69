"""The embedded collection: 1,898 emoji drawings with names and keywords in ten languages.

Noto Color Emoji art (Apache-2.0 / OFL) with emojibase names (MIT) and Unicode CLDR
annotations, as one Parquet file inside the package; `licences/` has the texts, `build.py`
the way it is made. A fixed split by leak group is part of the data. No torch, no Ray.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

EMOJI_LANGUAGES = ("de", "es", "fr", "it", "ja", "ko", "pt", "ru", "zh")
"""Languages besides English with columns `name_<language>` and `keywords_<language>`."""


def emoji_path() -> Path:
    """The Parquet file of the embedded collection."""
    return Path(__file__).with_name("emoji.parquet")


def load_emoji(
    split: Literal["train", "validation", "test"] | None = None, columns: list[str] | None = None
) -> pa.Table:
    """The embedded collection, whole or one side of its fixed split, in Unicode's order.

    Columns: `id` (code points in hex), `image` (struct of PNG bytes, 136 x 128 RGBA, and a
    path), `emoji`, `caption` (English name), `keywords`, `name_<language>`,
    `keywords_<language>`, `category`, `subcategory`, `group` (leak group), `split`.
    """
    wanted = None if columns is None else list(dict.fromkeys([*columns, "split"]))
    table = pq.read_table(emoji_path(), columns=wanted)
    if split is not None:
        table = table.filter(pc.equal(table["split"], split))
    return table if columns is None else table.select(columns)
