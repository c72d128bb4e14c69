"""`llmvis demo`: the packaged collection encoded, indexed and searched, pictures translated and generated: a page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jobs import encode, generate, index, translate
from llmvis.cluster.session import session
from llmvis.config import DemoConfig, EncodeConfig, IndexConfig
from llmvis.config_bulk import GenerateConfig, TranslateConfig
from llmvis.images import square
from llmvis.index import open_index
from llmvis.ledger import read_data, read_manifest
from llmvis.models.load import load_encoder
from llmvis.pictures import load_pairs, on_white
from llmvis.recipe import Pairs, read_recipe
from llmvis.report import PictureGrid, QueryResult, gallery
from llmvis.search import Query, pictures, query_vector, search
from llmvis.sources import EMBEDDED
from llmvis.storage import LocalStore

SHOWN, SIDE = 12, 64  # pictures of each kind, their side in pixels
QUERIES = (
    ("en", "a red flower"),
    ("en", "something hot to drink in the morning"),
    ("en", "an animal that lives in the sea"),
    ("en", "heavy rain and thunder"),
    ("en", "playing music"),
    ("de", "Katze"),
    ("fr", "anniversaire"),
    ("es", "montaña con nieve"),
    ("zh", "月亮"),
    ("ja", "電車"),
)
PROMPTS = (
    *("a purple strawberry", "an angry cat", "a green fire truck", "a dog with glasses"),
    *("a house in the snow", "a golden fish", "a pink elephant", "a cup of lemonade"),
    *("a blue rose", "a ghost with a hat", "a chocolate cake", "a night with two moons"),
)
EDITS = "grey, then 20 % brighter and mirror"


def run_demo(config: DemoConfig) -> None:
    out = Path(config.out)
    encoded, indexed, page = out / "encoded", out / "index", out / "index.html"
    with session():
        print(f"1/5 encode the packaged collection into {encoded}")
        report = encode.run(EncodeConfig(images=EMBEDDED, out=str(encoded)))
        print(f"2/5 index it in {indexed}")
        index.run(IndexConfig(embeddings=str(encoded), out=str(indexed)))
        print("3/5 translate drawings that the model has never seen")
        grids = [_translated(part, out) for part in read_recipe().pairs]
        print("4/5 make pictures from words")
        grids.append(_generated(out))
    print("5/5 search by text")
    encoder = load_encoder()
    opened = open_index(str(indexed), encoder.info.fingerprint)
    results = []
    for language, text in QUERIES:
        (hits,) = search(opened, query_vector(Query(text=text), encoder), config.k)
        shown = list(zip(hits, pictures(opened, hits), strict=True))
        results.append(QueryResult(text=text, language=language, hits=shown))
        print(f"  {text}: {', '.join(hit.caption or hit.path for hit in hits[:3])}, …")
    note = f"{opened.rows:,} pictures, {encoder.info.name}, {encoder.info.dim} dimensions"
    gallery(results, page, "llmvis: pictures that answer text", note=note, pictures=grids, job=report)
    print(f"\nLook at {LocalStore(out).path(page.name)}")
    print(f'Search on: llmvis search --index {indexed} "a bird that can swim" -k 5')


def _translated(part: Pairs, out: Path) -> PictureGrid:
    """Held-out drawings, spread and not picked: by the model, by a classic edit, and as somebody drew them."""
    before, after = load_pairs(part, SIDE, split="test")
    chosen = np.linspace(0, len(after.rows) - 1, SHOWN).astype(int)
    source, real = (on_white(side.pixels[chosen]) for side in (before, after))
    captions = [after.rows[i].caption for i in chosen]
    store = LocalStore(out / part.name / "drawings")
    for number, (picture, caption) in enumerate(zip(source, captions, strict=True)):
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "PNG")
        store.write(f"{number:02}.png", file.getvalue())
        store.write(f"{number:02}.txt", caption.encode())
    made = out / part.name / "translated"
    instruction = part.instructions[-1]
    translate.run(TranslateConfig(images=str(store.root), instruction=(instruction, EDITS), out=str(made)))
    rows = _rows(made)
    by_model, edited = ([row for row in rows if (row["model"] == "pillow") == classic] for classic in (0, 1))
    shown = [("source", source), ("made", _pixels(by_model)), ("edited", _pixels(edited)), ("real", real)]
    return PictureGrid(title=f"Translated: {part.instructions[0]}; {EDITS}", rows=shown, captions=captions)


def _generated(out: Path) -> PictureGrid:
    """Pictures of `PROMPTS`, two of each."""
    made = out / "generated"
    LocalStore(out).write("prompts.txt", "\n".join(PROMPTS).encode())
    generate.run(GenerateConfig(prompts=str(out / "prompts.txt"), variants=2, out=str(made), shard_items=6))
    rows = _rows(made)
    seeds = [[row for row in rows if row["seed"] == seed] for seed in (0, 1)]
    shown = [(f"seed {seed}", _pixels(some)) for seed, some in enumerate(seeds)]
    return PictureGrid(title="Made from words", rows=shown, captions=list(PROMPTS))


def _rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of a finished job, in the order of its plan."""
    store = LocalStore(folder)
    files = read_manifest(store, "translate", "generate")["files"]
    return [row for file in files for row in read_data(store, file).to_pylist()]


def _pixels(rows: Sequence[dict[str, Any]]) -> np.ndarray:
    """Pictures of rows, `uint8 (n, SIDE, SIDE, 3)`."""
    opened = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
    return np.stack([np.asarray(square(picture, SIDE)) for picture in opened])
