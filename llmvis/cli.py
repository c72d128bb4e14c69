"""`llmvis search | demo`: the commands that people type."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmvis.config import DemoConfig, SearchConfig, parse
from llmvis.entry import entry
from llmvis.index import FlatIndex, open_index, read_info
from llmvis.models.load import load_encoder
from llmvis.models.load_synthesis import MakeOptions, load_synthesis
from llmvis.report import QueryResult, gallery, sheet
from llmvis.schema import printable
from llmvis.search import Hit, Query, pictures, query_vector, search


def run_search(config: SearchConfig) -> None:
    info = read_info(config.index)
    encoder = load_encoder(config.model or info["model"]["name"])
    index = open_index(config.index, encoder.info.fingerprint)
    query = Query(
        text=config.text,
        image=config.image,
        avoid=config.not_,
        text_weight=config.text_weight,
        image_weight=config.image_weight,
        avoid_weight=config.not_weight,
        imagine_weight=config.imagine_weight,
    )
    imagined = imagine(config.text or "", config.imagine) if config.imagine else []
    (hits,) = search(index, query_vector(query, encoder, imagined), config.k)
    if config.json:
        print(
            json.dumps(
                [hit.to_json() for hit in hits], ensure_ascii=sys.stdout.isatty(), indent=1, allow_nan=False
            )
        )
    else:
        _print_table(hits)
    if config.html or config.sheet:
        result = query_result(index, query, hits)
        if config.html:
            gallery([result], Path(config.html), title=f"{config.text or config.image} — llmvis")
            print(f"page: {config.html}", file=sys.stderr)
        if config.sheet:
            sheet([result], Path(config.sheet))
            print(f"contact sheet: {config.sheet}", file=sys.stderr)


def imagine(text: str, count: int) -> list[Image.Image]:
    """Pictures of a text by the packaged synthesis model."""
    generator = load_synthesis(None, MakeOptions(), "generate")
    made = generator.generate(
        [text] * count, negatives=[None] * count, seeds=range(count), ids=[text] * count
    )
    return [Image.fromarray(picture) for picture in made]


def query_result(index: FlatIndex, query: Query, hits: list[Hit]) -> QueryResult:
    """A question with its answers and their pictures, as a page wants it."""
    asked = Path(query.image).read_bytes() if query.image else None
    found = pictures(index, hits)
    if gone := sum(data is None for data in found):
        print(f"note: {gone} of {len(found)} pictures are not where they were encoded", file=sys.stderr)
    return QueryResult(text=_in_words(query), picture=asked, hits=list(zip(hits, found, strict=True)))


def _in_words(query: Query) -> str:
    avoided = "".join(f" − {text}" for text in query.avoid)
    return (query.text or "") + avoided


def _print_table(hits: list[Hit]) -> None:
    table = Table(box=None, pad_edge=False)
    for name, justify in (("rank", "right"), ("score", "right"), ("caption", "left"), ("path", "left")):
        table.add_column(name, justify=justify, overflow="fold", no_wrap=name in ("rank", "score"))  # type: ignore[arg-type]
    for hit in hits:
        table.add_row(
            str(hit.rank), f"{hit.score:.3f}", Text(printable(hit.caption or "")), Text(printable(hit.path))
        )
    # a pipe has no width: whole lines, for grep
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


def run_demo(config: DemoConfig) -> None:
    from llmvis import demo  # brings Ray, which a search does without

    demo.run_demo(config)


COMMANDS: dict[str, tuple[type[Any], Callable[[Any], None], str]] = {
    "search": (SearchConfig, run_search, "find pictures by text, by picture, or both"),
    "demo": (
        DemoConfig,
        run_demo,
        "the packaged collection, searched; pictures translated and generated: a page to look at",
    ),
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        config, run, _ = COMMANDS[name]
        run(parse(config, f"llmvis {name}", sys.argv[2:]))
        return
    lines = [f"  llmvis {command:<8} {text}" for command, (_, _, text) in COMMANDS.items()]
    print("usage: llmvis COMMAND [OPTIONS]\n\n" + "\n".join(lines) + "\n\nllmvis COMMAND --help says more.")
    if name not in ("-h", "--help"):
        print(f"\nerror: no command {name!r}", file=sys.stderr)
        raise SystemExit(2)


def cli() -> None:
    entry(main)


if __name__ == "__main__":
    cli()
