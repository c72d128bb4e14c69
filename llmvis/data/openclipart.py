"""The openclipart training collection: public-domain clip art with titles, from two Debian packages.

`load_openclipart()` finds (or fetches) openclipart-png and openclipart-svg, keeps what is
clean, and returns a table with the embedded collection's columns: `id, image, caption,
keywords, author, group, split`. What is dropped: symbolic links, files whose RDF licence
is not public domain, pictures without words, and near-copies. A title that many pictures
share ("Lemon SVG theme" x 416) says nothing; such a picture takes its file's name as
caption and only ever trains (`source = "file name"`). So does what a few authors titled
in Italian or French, by its English keywords (`source = "keywords"`): the language model
reads English. Flags, maps and signal codes are series, as in the embedded collection,
and train too.

Splits (by hash of names, fixed; whole groups or whole authors move together):
  authors     every picture of some small authors: a test of unseen styles
  test        the clip-art half of the mixed clean pool: emoji test + these = 576; one picture
              of each held-out group, the group's others go unused
  validation  for early stopping and for choosing the mix
  train       the rest; training still purges what looks or reads like a test picture

Pictures are cached at 256 px, because originals go to 16,000 px. No torch, no Ray.
"""

from __future__ import annotations

import hashlib
import html
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from llmvis.data.build import small_picture
from llmvis.data.groups import leak_groups
from llmvis.data.packages import OPENCLIPART_PNG, OPENCLIPART_SVG, unpack
from llmvis.schema import UserError

SIZE = 256  # px, longer side of a cached picture
MASS = 4  # a title shared by more pictures than this is no caption
MIXED_POOL = 576  # emoji test + clip-art test of the mixed clean split
_AUTHOR_ROWS, _VALIDATION_ROWS = 350, 250
_NEAR = 0.985
_MAX_GROUP = 4  # a larger group is a series and trains
_EDITION = "4"  # raise it when the rules change: the cache file carries it
_DROPPED_TITLES = {"gramastar"}  # 1,375 machine-made stars
_OTHER_LANGUAGES = {  # authors whose titles are Italian or French
    "Architetto Francesco Rollandin", "Francesco Rollandin", "yves GUILLOU", "Patricia Fidi", "Patricia FIDI",
    "Tanguy JACQ", "Mauro Olivo", "Franck Doucet",
}  # fmt: skip
_SERIES = re.compile(r"(^|/)(flags|geography|signal_flags|semaphore|maps)/|semaphore|maritime_signal")
_TREES = ("", "openclipart", *(f"{above}usr/share/openclipart" for above in ("", "x/", "deb/x/")))
_NOISE_KEYWORDS = {
    "",
    "hash",
    "unsorted",
    "theme",
    "lemon_theme_icon",
    "clip_art",
    "clipart",
    "mimetypes",
    "icons",
}

Split = Literal["train", "validation", "test", "authors"]


def find_openclipart(folder: Path | str | None = None) -> Path | None:
    """The folder that holds `png/` and `svg/`, or None if it is not at hand (nothing is downloaded).

    Looks at `folder`, then at the variable LLMVIS_OPENCLIPART, then in the cache; a folder
    may be the tree of the unpacked packages or any parent up to four levels above.
    """
    wanted = folder or os.environ.get("LLMVIS_OPENCLIPART")
    roots = [Path(wanted)] if wanted else [cache_folder() / "unpacked" / "openclipart"]
    for root in roots:
        for tail in _TREES:
            if (root / tail / "png").is_dir() and (root / tail / "svg").is_dir():
                return root / tail
    if folder:
        raise UserError(f"no openclipart under {folder}: it needs png/ and svg/ of the two Debian packages")
    return None


def fetch_openclipart() -> Path:
    """Download (156 MB) and unpack both packages into the cache once; return the folder above png/, svg/."""
    cache = cache_folder()
    together = cache / "unpacked" / "openclipart"
    together.mkdir(parents=True, exist_ok=True)
    for package, part in ((OPENCLIPART_PNG, "png"), (OPENCLIPART_SVG, "svg")):
        link = together / part
        if not link.exists():
            link.symlink_to(unpack(package, cache) / "usr/share/openclipart" / part)
    return together


def cache_folder() -> Path:
    """Where downloads and shrunken pictures lie: $LLMVIS_CACHE or ~/.cache/llmvis."""
    return Path(os.environ.get("LLMVIS_CACHE", Path.home() / ".cache" / "llmvis"))


def load_openclipart(root: Path, split: Split | None = None) -> pa.Table:
    """The clean collection under `root` (from `find_openclipart`), whole or one split of it.

    The first call shrinks some 5,000 pictures (two minutes on one core) and caches them.
    """
    cached = cache_folder() / f"openclipart-{_EDITION}-{SIZE}px.parquet"
    if not cached.exists():
        table = _collect(root)
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}.partial")
        pq.write_table(table, partial)
        partial.replace(cached)
    table = pq.read_table(cached)
    return table if split is None else table.filter(pc.equal(table["split"], split))


def read_metadata(svg: str) -> dict[str, Any]:
    """Title, keywords, author and licences from the RDF of an SVG file; missing parts are empty."""
    found = re.search(r"<metadata.*?</metadata>", svg, re.DOTALL)
    rdf = html.unescape(html.unescape(found.group(0))) if found else ""  # many titles are escaped twice
    creator = re.search(r"<dc:creator>.*?<dc:title>([^<]*)</dc:title>", rdf, re.DOTALL)
    title = re.search(r"<dc:title>([^<]*)</dc:title>", rdf)
    return {
        "title": clean_title(title.group(1)) if title else "",
        "keywords": [
            word
            for raw in re.findall(r"<rdf:li>([^<]*)</rdf:li>", rdf)
            if (word := raw.strip().replace("_", " ").lower()) not in _NOISE_KEYWORDS
            and not word.startswith("0x")
        ],
        "author": creator.group(1).strip() if creator else "",
        "licences": re.findall(r'<(?:cc:)?license[^>]*rdf:resource="([^"]*)"', rdf),
    }


def clean_title(title: str) -> str:
    """'Clipart by Nicu Buculei - arrow08_4' → 'arrow'; digits, underscores and credits go."""
    title = re.sub(r"^clipart by [^-]* - ", "", title.strip(), flags=re.IGNORECASE)
    title = re.sub(r"[_/]+", " ", title)
    title = re.sub(r"(?<=[A-Za-z])\d+\b|\b\d+\b|\(\s*\)", " ", title)
    return " ".join(title.split()).strip(" -.,:#")


def file_words(path: str, author: str) -> str:
    """Words of a file's name without numbers and the author: 'mimetypes/pancake_bw' → 'pancake bw'."""
    author_words = {part.lower()[:4] for part in re.findall(r"[A-Za-z]+", author)}
    words = re.findall(r"[A-Za-z]+", Path(path).stem.replace("-", " "))
    kept = [w for w in words if w.lower()[:4] not in author_words and (len(w) > 1)]
    return " ".join(kept)


def _collect(root: Path) -> pa.Table:
    rows = _described(root)
    shared = Counter(row["caption"].lower() for row in rows)
    kept = []
    for row in rows:
        row["source"] = "title"
        if row["author"] in _OTHER_LANGUAGES:
            row["caption"], row["source"] = ", ".join(row["keywords"]), "keywords"
        elif shared[row["caption"].lower()] > MASS or len(row["caption"]) < 3:
            row["caption"], row["source"] = file_words(row["id"], row["author"]), "file name"
        if len(row["caption"]) < 3:
            continue
        try:
            row["image"] = {"bytes": _shrunken(root / "png" / row["id"]), "path": row["id"]}
        except (OSError, ValueError, Image.DecompressionBombError):  # a handful of broken or bomb-sized files
            continue
        kept.append(row)
    pixels = np.stack([small_picture(row["image"]["bytes"]) for row in kept])
    fresh = [not bool((pixels[:i] @ pixels[i] > _NEAR).any()) for i in range(len(kept))]
    kept = [row for row, is_fresh in zip(kept, fresh, strict=True) if is_fresh]
    pixels = pixels[np.array(fresh)]
    for row, group in zip(
        kept, leak_groups([row["caption"].lower() for row in kept], pixels, 0.93), strict=True
    ):
        row["group"] = "series: flags and maps" if _SERIES.search(row["id"]) else group
    for row, split in zip(kept, _splits(kept), strict=True):
        row["split"] = split
    return pa.Table.from_pylist(kept)


def _described(root: Path) -> list[dict[str, Any]]:
    """Every real, public-domain file with its words, in path order."""
    rows = []
    for svg in sorted((root / "svg").rglob("*.svg")):
        relative = svg.relative_to(root / "svg").with_suffix(".png")
        png = root / "png" / relative
        if svg.is_symlink() or png.is_symlink() or not png.is_file():
            continue
        told = read_metadata(svg.read_text(encoding="utf8", errors="replace"))
        public = told["licences"] and all("publicdomain" in name.lower() for name in told["licences"])
        if not public or told["title"] in _DROPPED_TITLES:
            continue
        rows.append(
            {
                "id": relative.as_posix(),
                "caption": told["title"],
                "keywords": list(dict.fromkeys(told["keywords"])),
                "author": told["author"] or "unknown",
            }
        )
    return rows


def _shrunken(path: Path) -> bytes:
    """The picture at no more than SIZE px, as PNG bytes (alpha kept)."""
    with Image.open(path) as picture:
        if picture.width * picture.height > 60_000_000:
            raise ValueError(f"{path}: {picture.size} is too large")
        small = picture.convert("RGBA")
    small.thumbnail(
        (SIZE, SIZE), Image.Resampling.BOX if max(small.size) > 4 * SIZE else Image.Resampling.LANCZOS
    )
    out = io.BytesIO()
    small.save(out, "PNG")
    return out.getvalue()


def _splits(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Split of each row: first whole authors, then whole groups, in the order of their hash."""
    fair = [row["source"] == "title" and not row["group"].startswith("series") for row in rows]
    per_author = Counter(row["author"] for row, is_fair in zip(rows, fair, strict=True) if is_fair)
    held: set[str] = set()
    taken = 0
    for author in sorted(per_author, key=_order):
        if taken < _AUTHOR_ROWS and per_author[author] <= 60 and author != "unknown":
            held.add(author)
            taken += per_author[author]
    groups: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        groups[row["group"]].append(i)
    splits = ["authors" if row["author"] in held else "train" for row in rows]
    wanted = {"test": MIXED_POOL - _emoji_test_rows(), "validation": _VALIDATION_ROWS}
    for group in sorted(groups, key=_order):
        members = groups[group]
        name = next((name for name, left in wanted.items() if left), None)
        fit = [i for i in members if fair[i]]
        if not name or not fit or len(members) > _MAX_GROUP or any(splits[i] == "authors" for i in members):
            continue
        # the whole group leaves training and its first picture enters the pool: one right answer a title
        for i in members:
            splits[i] = "unused"
        splits[fit[0]] = name
        wanted[name] -= 1
    # pictures of a held-out author that are no fair test do not train either
    return [
        "unused" if split == "authors" and not is_fair else split
        for split, is_fair in zip(splits, fair, strict=True)
    ]


def _emoji_test_rows() -> int:
    from llmvis.data import load_emoji

    return len(load_emoji("test", columns=["id"])["id"])


def _order(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
