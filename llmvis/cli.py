"""`llmvis search | filter | delete | export-clip | inspect | retry | gc | demo`: the commands that people type."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmvis import inspection_view
from llmvis.cleanup import clean
from llmvis.clip_retrieval import export
from llmvis.config import DemoConfig, ExportClipConfig, FilterConfig, SearchConfig, parse
from llmvis.config_ops import DeleteConfig, GcConfig, InspectConfig, RetryConfig
from llmvis.entry import entry
from llmvis.events import last_command
from llmvis.filtered import copy_pictures, refuse_taken
from llmvis.folders import read_job
from llmvis.index import Deletion, Index, advice, delete, open_index, read_info
from llmvis.inspection import inspect_folder
from llmvis.models.load import load_encoder
from llmvis.models.load_synthesis import MakeOptions, load_synthesis
from llmvis.report import QueryResult, gallery, sheet
from llmvis.retry import release
from llmvis.schema import UserError, printable
from llmvis.search import Hit, Query, pictures, query_vector, search
from llmvis.storage import StorageError, is_remote, local_path, open_store, rows_of_job
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


def run_filter(config: FilterConfig) -> None:
    refuse_taken(config.out)
    info = read_info(config.index)
    encoder = load_encoder(config.model or info["model"]["name"])
    with open_index(config.index, encoder.info.fingerprint) as index:
        query = Query(text=config.text, image=config.image, avoid=config.not_)
        (found,) = search(
            index, query_vector(query, encoder), config.most, where=config.where, distinct=config.distinct
        )
        hits = [hit for hit in found if config.min_score is None or hit.score >= config.min_score]
        if not hits:
            best = f": the best has {found[0].score:.3f}" if found else ""
            raise UserError(f"no picture of {index.rows:,} is to be copied{best}; ask for less")
        scores = f"scores {hits[0].score:.3f} to {hits[-1].score:.3f}"
        print(f"filter plan: {len(hits):,} of {index.rows:,} pictures, {scores} → {config.out}", flush=True)
        lost = copy_pictures(index.sources, hits, config.out)
    print(f"filter: {len(hits) - sum(lost.values()):,} pictures in {config.out}")
    for why, count in sorted(lost.items()):
        print(f"{count:>8,} {why}")


def run_export_clip(config: ExportClipConfig) -> None:
    done = export(config.embeddings, config.out)
    print(f"export-clip: {done['rows']:,} vectors × {done['dim']} in {config.out}, parts: {done['parts']}")


def run_demo(config: DemoConfig) -> None:
    from llmvis import demo  # brings Ray, which a search does without

    demo.run_demo(config)


def run_delete(config: DeleteConfig) -> None:
    ids = None if config.ids is None else read_ids(config.ids)
    store = open_store(config.index)
    if config.dry_run:
        done = delete(store, ids=ids, where=config.where, dry_run=True)
    else:
        read_info(config.index)  # before a lock makes a folder of that name
        with store.lock():
            done = delete(store, ids=ids, where=config.where)
    if config.json:
        report = {
            "version": done.manifest["version"], "asked": done.asked, "not_found": done.not_found,
            "deleted": done.deleted, "rows": done.rows, "dead": done.dead, "dry_run": config.dry_run,
        }  # fmt: skip
        print(json.dumps(report, indent=1))
    else:
        print(*_delete_lines(done, config), sep="\n")


def _delete_lines(done: Deletion, config: DeleteConfig) -> list[str]:
    asked = "" if done.asked is None else f" by {done.asked:,} ids, of which {done.not_found:,} are not there"
    verb = "would be deleted" if config.dry_run else "deleted"
    version = "" if config.dry_run else f" (version {done.manifest['version']})"
    lines = [f"{done.deleted:,} {verb}{asked}; {done.rows:,} stay{version}"]
    if config.dry_run:
        lines += [printable(f"  {row['id']}  {row.get('path') or ''}") for row in done.examples]
        if (more := done.deleted - len(done.examples)) > 0:
            lines.append(f"  … and {more:,} more")
    else:
        lines += [f"advice: {line}" for line in advice(done.manifest, config.index)]
    return lines


def read_ids(file: str) -> pa.Array:
    """The ids in a text with one a line, or in the column `id` of a Parquet file, here or on S3. Raises `UserError`."""
    folder, _, name = file.rpartition("/")
    try:
        data = open_store(folder).read(name) if is_remote(file) else local_path(file).read_bytes()
        if data.startswith(b"PAR1"):
            column = pq.read_table(pa.BufferReader(data), columns=["id"])["id"]
            return column.cast(pa.string()).combine_chunks()
        lines = (line.strip() for line in data.decode().splitlines())
        return pa.array([line for line in lines if line], pa.string())
    except OSError as error:
        raise UserError(f"--ids {file} cannot be read: {error.strerror or error}") from error
    except (pa.ArrowException, KeyError, UnicodeDecodeError) as error:
        raise UserError(
            f"--ids {file} is neither a text with one id a line nor Parquet with a column `id`: {error}"
        ) from error


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
    "filter": (FilterConfig, run_filter, "copy the pictures that answer a question, as an imagefolder"),
    "inspect": (
        InspectConfig,
        run_inspect,
        "how far a job is, its ledger and dead letters; an index's health",
    ),
    "delete": (DeleteConfig, run_delete, "take pictures out of an index"),
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
