"""The card of a data set: `README.md` with front matter that the Hugging Face hub reads, and a contact sheet.

It says what the rows are, whose models and pictures they come from and under which licences, what
was left out and why, and how to load them. Names and captions are other people's text: they are
escaped, never interpreted. It does not know how the files came about (export, ledger) or what gates do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import yaml

from llmvis.made import MADE
from llmvis.report import QueryResult, sheet
from llmvis.storage import Store

Layout = Literal["parquet", "webdataset", "imagefolder"]

SHEET = "contact-sheet.png"
SHOWN = 24
"""Pictures on the contact sheet, at most."""

_FILES: dict[Layout, str] = {
    "parquet": "data/*.parquet",
    "webdataset": "data/*.tar",
    "imagefolder": "data/**",
}
_LOAD: dict[Layout, str] = {
    "parquet": """from datasets import load_dataset

rows = load_dataset("parquet", data_files="data/*.parquet", split="train")
rows[0]["image"]  # a PIL picture""",
    "webdataset": """import glob
import webdataset

rows = webdataset.WebDataset(sorted(glob.glob("data/*.tar")), shardshuffle=False).decode("pil")
next(iter(rows))["png"]  # a PIL picture; "txt" is its caption, "json" the other columns""",
    "imagefolder": """from datasets import load_dataset

rows = load_dataset("imagefolder", data_dir="data", split="train")
rows[0]["image"]  # a PIL picture""",
}
_MEANING = {
    "id": "stable id of the request that made the picture",
    "image": "PNG",
    "width": "pixels",
    "height": "pixels",
    "caption": "describes the picture",
    "prompt": "what was asked: the prompt, or the instruction",
    "negative": "what was to be avoided",
    "seed": "of chance; null where none was involved",
    "source": "path of the picture that it was made from",
    "source_id": "id of that picture",
    "model": "what made it",
    "model_fingerprint": "sha256 over the model",
}
_HUB_LICENCES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "ofl-1.1", "cc0-1.0", "unknown"),
    *("cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nd-4.0"),
    *("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "openrail", "openrail++", "creativeml-openrail-m"),
)  # names that the hub knows, as far as we meet them; all others are "other"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A model or a collection that made pictures come from."""

    name: str
    licence: str = "unknown"
    """SPDX, such as `CC-BY-4.0`."""
    attribution: str = ""
    """Who is to be named."""
    fingerprint: str = ""
    """sha256: of a model's files, of a collection's listing."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a data set says of itself."""

    title: str
    about: str
    """A sentence or two: what the pictures are."""
    layout: Layout
    schema: pa.Schema
    """Of the rows: `made.made_schema`."""
    ledger: Mapping[str, Any]
    """Of the manifest: input, written, dead_lettered, duplicates, dead_by_reason."""
    models: Sequence[Origin]
    collections: Sequence[Origin] = ()
    """Where source pictures and captions are from."""
    prompts: int = 0
    """Different prompts or instructions."""
    seeds: str = ""
    """In words, such as `0 to 3`; empty where chance had no part."""
    tasks: Sequence[str] = ("text-to-image",)
    """The hub's names: text-to-image, image-to-image, …"""
    gates: Sequence[tuple[str, str, int]] = ()
    """`gates.gate_lines`: reason, what was asked, how many went."""


def write_card(store: Store, card: Card, shown: pa.Table) -> None:
    """Publishes `contact-sheet.png` and then `README.md` in the data set's folder.

    The same card and rows give the same files. Files of rows lie in `data/` below.

    Args:
        store: the data set's folder.
        card: what to say.
        shown: some rows of the data set; the first `SHOWN` go on the contact sheet.
    """
    rows = shown.slice(0, SHOWN).select(["id", "image", "caption", "prompt", "source"]).to_pylist()
    hits = [
        (_Shown(rank=rank, id=row["id"], path=row["image"]["path"], caption=label), row["image"]["bytes"])
        for rank, (row, label) in enumerate(zip(rows, sheet_labels(rows), strict=True), 1)
    ]
    with store.written(SHEET) as path:
        sheet([QueryResult(text=card.title, hits=hits)], path)
    store.write("README.md", card_text(card).encode())


def sheet_labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What stands under each picture: its caption or source; its prompt where that tells more apart.

    Neighbours are often of one picture, which has one caption, under several instructions.
    """
    prompts = [row["prompt"] for row in rows]
    names = [row["caption"] or row["source"] or row["prompt"] for row in rows]
    alike = len(set(names)) < len(names)
    return prompts if alike and len(set(prompts)) > 1 else names


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """A row as the contact sheet wants it: a `report.Answer`."""

    rank: int
    id: str
    path: str
    caption: str | None
    score: float = 0.0


def card_text(card: Card) -> str:
    """`README.md`: front matter, then sections."""
    rows = card.ledger["written"]
    front = {
        "pretty_name": _line(card.title),
        "license": _licences(card),
        "task_categories": list(card.tasks),
        "size_categories": [size_category(rows)],
        "tags": ["synthetic", "llmvis"],
        "configs": [
            {"config_name": "default", "data_files": [{"split": "train", "path": _FILES[card.layout]}]}
        ],
    }
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {_text(card.title)}",
        _text(card.about),
        f"{rows:,} made pictures. They were made by models, not photographed or drawn by people.",
        f"![Some of the pictures]({SHEET})",
        f"## Load\n\n```python\n{_LOAD[card.layout]}\n```",
        "## Columns\n\n" + _columns(card.schema),
        "## Where it comes from\n\n" + _provenance(card),
        "## Licences\n\n" + _licence_section(card),
        "## What was left out\n\n" + _left_out(card),
    ]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def size_category(rows: int) -> str:
    """The hub's name for a number of rows, such as `1K<n<10K`."""
    steps = [(10**3, "1K"), (10**4, "10K"), (10**5, "100K"), (10**6, "1M"), (10**7, "10M"), (10**8, "100M")]
    steps += [(10**9, "1B"), (10**10, "10B"), (10**11, "100B"), (10**12, "1T")]
    below = ""
    for limit, name in steps:
        if rows < limit:
            return f"{below}<n<{name}" if below else f"n<{name}"
        below = name
    return f"n>{below}"


def _columns(schema: pa.Schema) -> str:
    lines = []
    for field in schema:
        kind = "image" if field.name == "image" else str(field.type)
        meaning = _MEANING[field.name] if field.name in MADE.names else "of the source collection"
        lines.append((_code(field.name), _code(kind), meaning))
    return _table(("column", "type", "what"), lines)


def _provenance(card: Card) -> str:
    lines = [("model", _text(m.name), _code(m.fingerprint)) for m in card.models]
    lines += [("source collection", _text(c.name), _code(c.fingerprint)) for c in card.collections]
    said = [f"{card.prompts:,} different prompts or instructions." if card.prompts else ""]
    said.append(
        f"Seeds: {_text(card.seeds)}." if card.seeds else "No chance was involved: there are no seeds."
    )
    return _table(("what", "name", "sha256"), lines) + "\n\n" + " ".join(filter(None, said))


def _licence_section(card: Card) -> str:
    lines = [
        (kind, _text(origin.name), _text(origin.licence), _text(origin.attribution) or "–")
        for kind, origins in (("model", card.models), ("source collection", card.collections))
        for origin in origins
    ]
    return (
        "Whoever uses these pictures is bound by the licences of what they were made with and from:\n\n"
        + _table(("what", "name", "licence", "to be named"), lines)
    )


def _left_out(card: Card) -> str:
    ledger = card.ledger
    balance = [
        ("asked for", f"{ledger['input']:,}"),
        ("written", f"{ledger['written']:,}"),
        ("left out", f"{ledger['dead_lettered']:,}"),
        ("asked for twice", f"{ledger['duplicates']:,}"),
    ]
    parts = [_table(("ledger", "rows"), balance)]
    if card.gates:
        gates = [(_code(reason), _text(asked), f"{count:,}") for reason, asked, count in card.gates]
        parts.append("Quality gates, in the order in which they were asked:\n\n")
        parts[-1] += _table(("gate", "what was asked", "left out"), gates)
    named = {reason for reason, _, _ in card.gates}
    other = {r: n for r, n in ledger["dead_by_reason"].items() if r not in named}
    if other:
        failed = [(_code(reason), f"{count:,}") for reason, count in sorted(other.items())]
        parts.append("For other reasons:\n\n" + _table(("reason", "rows"), failed))
    return "\n\n".join(parts)


def _licences(card: Card) -> str | list[str]:
    """What the hub calls the licences of all models and collections, each once."""
    found = set()
    for origin in (*card.models, *card.collections):
        for part in re.split(r"\s+AND\s+", origin.licence):
            name = part.strip().lower()
            found.add(name if name in _HUB_LICENCES else "other")
    names = sorted(found) or ["unknown"]
    return names[0] if len(names) == 1 else names


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _text(value: str) -> str:
    """Foreign text, whole, as one line of Markdown that means nothing but itself."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", _line(value))


def _code(value: str) -> str:
    """A name in code type, or a dash."""
    plain = _line(value).replace("`", "'").replace("|", "¦")
    return f"`{plain}`" if plain else "–"


def _line(value: str) -> str:
    return "".join(c for c in " ".join(value.split()) if c.isprintable())
