"""What lies beside made pictures for people to look at: card, contact sheet, scene. Reads a finished job.

Knows no Ray and no models.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
from PIL import Image

from llmvis.card import Card, Layout, Origin, write_card
from llmvis.export import unpack_webdataset
from llmvis.gates import GateConfig, gate_lines
from llmvis.ledger import read_data, read_manifest
from llmvis.made import MADE
from llmvis.scene import write_gltf
from llmvis.schema import MAKERS
from llmvis.storage import Store, open_store

MOST_CARDS = 512
"""Pictures in a scene: each is a texture of its own."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a card cannot take from the manifest. `rows`: where the rows are in Parquet, if not in the folder."""

    title: str
    collection: str
    licence: str = "unknown"
    gates: GateConfig | None = None
    form: Layout = "parquet"
    assets: Literal["gltf"] | None = None
    tasks: tuple[str, ...] = ("text-to-image",)


def present(out: str, about: About, rows: str | None = None) -> None:
    """Writes `README.md`, `contact-sheet.png` and, if asked, `scene.glb` into `out`.

    rows: the folder of the job that wrote the rows in Parquet (default: `out`).
    """
    store = open_store(out)
    made = open_store(rows or out)
    manifest = read_manifest(made, *MAKERS)
    seen, seeds, shown, schema = set[str](), set[int](), list[pa.Table](), pa.schema([])
    for table in (_read(made, file) for file in manifest["files"]):
        seen |= set(table["prompt"].to_pylist())
        seeds |= {seed for seed in table["seed"].to_pylist() if seed is not None}
        schema = table.schema
        if sum(map(len, shown)) < MOST_CARDS:
            shown.append(table)
    if shown:
        counts = manifest["ledger"]["dead_by_reason"]
        models = [
            Origin(name=m["name"], licence=m.get("licence", "unknown"), fingerprint=m["fingerprint"])
            for m in manifest.get("models", [manifest["model"]])
        ]
        card = Card(
            title=about.title, about=f"Made by llmvis {manifest['job']} from {about.collection}.",
            layout=about.form, schema=schema, ledger=manifest["ledger"], models=models,
            collections=[Origin(name=about.collection, licence=about.licence)], prompts=len(seen),
            seeds=_in_words(seeds), tasks=about.tasks,
            gates=gate_lines(about.gates, counts) if about.gates else (),
        )  # fmt: skip
        write_card(store, card, pa.concat_tables(shown))
    if about.assets:
        with store.written("scene.glb") as path:
            write_gltf(list(_cards(shown)), path)


def _read(store: Store, file: dict[str, Any]) -> pa.Table:
    """One file of made rows; of a tar the columns that are ours."""
    if file["name"].endswith(".tar"):
        return unpack_webdataset(store.read_checked(file["name"], file["sha256"]), MADE)
    return read_data(store, file)


def _in_words(seeds: set[int]) -> str:
    if not seeds:
        return ""
    return f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"


def _cards(tables: list[pa.Table]) -> Iterator[tuple[str, Image.Image]]:
    left = MOST_CARDS
    for table in tables:
        for row in table.slice(0, left).to_pylist():
            name = row["caption"] or row["prompt"]
            yield name, Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGBA")
        left -= min(left, len(table))
