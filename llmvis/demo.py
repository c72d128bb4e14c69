"""`llmvis demo`: the packaged collection encoded, indexed and searched, pictures translated and generated: a page."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jobs import encode, index
from llmvis.config import DemoConfig, EncodeConfig, IndexConfig
from llmvis.data import load_emoji
from llmvis.index import open_index
from llmvis.models.load import load_encoder
from llmvis.models.synthesizer import Synthesizer
from llmvis.models.synthesizer_files import load_synthesizer
from llmvis.pictures import load_pairs, on_white
from llmvis.recipe import read_recipe
from llmvis.report import PictureGrid, QueryResult, gallery
from llmvis.search import Query, pictures, query_vector, search
from llmvis.sources import EMBEDDED
from llmvis.storage import Store

SHOWN = 12  # pictures of each kind
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


def run_demo(config: DemoConfig) -> None:
    out = Path(config.out)
    encoded, indexed, page = out / "encoded", out / "index", out / "index.html"
    print(f"1/4 encode the packaged collection into {encoded}")
    report = encode.run(EncodeConfig(images=EMBEDDED, out=str(encoded)))
    print(f"2/4 index it in {indexed}")
    index.run(IndexConfig(embeddings=str(encoded), out=str(indexed)))
    print("3/4 search it by text")
    encoder = load_encoder()
    opened = open_index(str(indexed), encoder.info.fingerprint)
    results = []
    for language, text in QUERIES:
        (hits,) = search(opened, query_vector(Query(text=text), encoder), config.k)
        shown = list(zip(hits, pictures(opened, hits), strict=True))
        results.append(QueryResult(text=text, language=language, hits=shown))
        print(f"  {text}: {', '.join(hit.caption or hit.path for hit in hits[:3])}, …")
    print("4/4 translate drawings and generate pictures that the model has never seen")
    made = _synthesised(load_synthesizer())
    note = f"{opened.rows:,} pictures, {encoder.info.name}, {encoder.info.dim} dimensions"
    gallery(results, page, "llmvis: pictures that answer text", note=note, pictures=made, job=report)
    print(f"\nLook at {Store(out).path(page.name)}")
    print(f'Search on: llmvis search --index {indexed} "a bird that can swim" -k 5')


def _synthesised(model: Synthesizer) -> list[PictureGrid]:
    """Held-out line drawings coloured, emoji redrawn, and pictures made from held-out names; spread, not picked."""
    grids = []
    for part in read_recipe().pairs:
        before, after = load_pairs(part, model.side, split="test")
        rows = np.linspace(0, len(after.rows) - 1, SHOWN).astype(int)
        source, real = (on_white(side.pixels[rows]) for side in (before, after))
        captions = [after.rows[i].caption for i in rows]
        told = [part.instructions[-1].replace("{caption}", caption) for caption in captions]
        shown = [("source", source), ("made", model.translate(source, told)), ("real", real)]
        grids.append(PictureGrid(title=f"Translated: {part.instructions[0]}", rows=shown, captions=captions))
    names = load_emoji("test", columns=["caption"])["caption"].to_pylist()
    captions = [names[i] for i in np.linspace(0, len(names) - 1, SHOWN).astype(int)]
    generated = model.generate([f"{caption}, Noto emoji" for caption in captions])
    grids.append(PictureGrid(title="Generated from words", rows=[("made", generated)], captions=captions))
    return grids
