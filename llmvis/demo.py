"""`llmvis demo`: the packaged collection encoded, indexed and searched, as a page to look at."""

from __future__ import annotations

from pathlib import Path

from jobs import encode, index
from llmvis.config import DemoConfig, EncodeConfig, IndexConfig
from llmvis.index import open_index
from llmvis.models.load import load_encoder
from llmvis.report import QueryResult, gallery
from llmvis.search import Query, pictures, query_vector, search
from llmvis.sources import EMBEDDED
from llmvis.storage import Store

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
    print(f"1/3 encode the packaged collection into {encoded}")
    report = encode.run(EncodeConfig(images=EMBEDDED, out=str(encoded)))
    print(f"2/3 index it in {indexed}")
    index.run(IndexConfig(embeddings=str(encoded), out=str(indexed)))
    print("3/3 search it by text")
    encoder = load_encoder()
    opened = open_index(str(indexed), encoder.info.fingerprint)
    results = []
    for language, text in QUERIES:
        (hits,) = search(opened, query_vector(Query(text=text), encoder), config.k)
        shown = list(zip(hits, pictures(opened, hits), strict=True))
        results.append(QueryResult(text=text, language=language, hits=shown))
        print(f"  {text}: {', '.join(hit.caption or hit.path for hit in hits[:3])}, …")
    note = f"{opened.rows:,} pictures, {encoder.info.name}, {encoder.info.dim} dimensions"
    gallery(results, page, "llmvis: pictures that answer text", note=note, job=report)
    print(f"\nLook at {Store(out).path(page.name)}")
    print(f'Search on: llmvis search --index {indexed} "a bird that can swim" -k 5')
