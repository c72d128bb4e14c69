"""`llmvis search | export-clip | inspect | retry | gc | demo`: the commands that people type."""

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

from llmvis import inspection_view
from llmvis.cleanup import clean
from llmvis.clip_retrieval import export
from llmvis.config import DemoConfig, ExportClipConfig, SearchConfig, parse
from llmvis.config_ops import GcConfig, InspectConfig, RetryConfig
from llmvis.entry import entry
from llmvis.events import last_command
from llmvis.folders import read_job
from llmvis.index import Index, open_index, read_info
from llmvis.inspection import inspect_folder
from llmvis.models.load import load_encoder
from llmvis.models.load_synthesis import MakeOptions, load_synthesis
from llmvis.report import QueryResult, gallery, sheet
from llmvis.retry import release
from llmvis.schema import printable
from llmvis.search import Hit, Query, pictures, query_vector, search
from llmvis.storage import StorageError, rows_of_job
from llmvis.summary import size


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
    (hits,) = search(
        index, query_vector(query, encoder, imagined), config.k,
        where=config.where, exact=config.exact, offset=config.offset, distinct=config.distinct,
    )  # fmt: skip
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


def query_result(index: Index, query: Query, hits: list[Hit]) -> QueryResult:
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
    _console().print(table)


def _console() -> Console:
    """A pipe has no width: whole lines, for grep."""
    return Console(width=None if sys.stdout.isatty() else 10_000, highlight=False)


def run_export_clip(config: ExportClipConfig) -> None:
    done = export(config.embeddings, config.out)
    print(f"export-clip: {done['rows']:,} vectors × {done['dim']} in {config.out}, parts: {done['parts']}")


def run_demo(config: DemoConfig) -> None:
    from llmvis import demo  # brings Ray, which a search does without

    demo.run_demo(config)


def run_inspect(config: InspectConfig) -> None:
    found = inspect_folder(config.path, check_hashes=config.verify, examples=config.examples)
    if config.json:
        print(json.dumps(found, ensure_ascii=sys.stdout.isatty(), indent=1, allow_nan=False))
    else:
        inspection_view.show(found, _console())
    if not found["healthy"]:
        raise SystemExit(1)


def run_retry(config: RetryConfig) -> None:
    store = rows_of_job(config.path)
    state = read_job(store)
    if damaged := [problem for problem in state.problems if problem.hides]:
        raise StorageError(f"{store.uri}: {damaged[0].what}; {damaged[0].do}")
    if state.plan is None:
        raise StorageError(
            f"{store.uri} holds no job with a plan: give the --out of encode, translate, generate or dataset"
        )
    with store.lock():
        released = release(store, config.reasons)
    again = ", ".join(f"{count:,} {reason}" for reason, count in released.letters.items()) or "none"
    print(f"tried again: {again}; shards to do: {released.shards:,}")
    if released.others:
        others = ", ".join(f"{count:,} {reason}" for reason, count in released.others.items())
        print(f"tried again if their input has changed: {others}")
    last = last_command(store)
    if last is None:
        print("now run the job's command again, the same as before")
    else:
        command, folder = last
        print(f"now run the job again, as in {printable(folder)}:\n  {printable(command)}")


def run_gc(config: GcConfig) -> None:
    strays = clean(config.path, keep=config.keep, dry_run=config.dry_run)
    for stray in strays:
        print(f"{size(stray.bytes):>10}  {printable(stray.name)}  ({stray.why})")
    done = "would be removed" if config.dry_run else "removed"
    print(f"{len(strays):,} {done}, {size(sum(stray.bytes for stray in strays))}")


COMMANDS: dict[str, tuple[type[Any], Callable[[Any], None], str]] = {
    "search": (SearchConfig, run_search, "find pictures by text, by picture, or both"),
    "inspect": (
        InspectConfig,
        run_inspect,
        "how far a job is, its ledger and dead letters; an index's health",
    ),
    "retry": (RetryConfig, run_retry, "put a job's dead letters back to work"),
    "gc": (GcConfig, run_gc, "remove what no manifest names any more"),
    "export-clip": (ExportClipConfig, run_export_clip, "write embeddings in the layout of clip-retrieval"),
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
    lines = [f"  llmvis {command:<11} {text}" for command, (_, _, text) in COMMANDS.items()]
    print("usage: llmvis COMMAND [OPTIONS]\n\n" + "\n".join(lines) + "\n\nllmvis COMMAND --help says more.")
    if name not in ("-h", "--help"):
        print(f"\nerror: no command {name!r}", file=sys.stderr)
        raise SystemExit(2)


def cli() -> None:
    entry(main)


if __name__ == "__main__":
    cli()
