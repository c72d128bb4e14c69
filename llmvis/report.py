"""Result pages: queries with their pictures, and what a job did, as one HTML file or one PNG.

A page is self-contained: pictures are thumbnails inside it, it loads nothing, and its
content security policy forbids scripts. Captions, paths and queries come from other
people's data: they are escaped, stripped of control characters and cut, never interpreted.

It does not know how hits were found (search.py) or jobs run (summary.py gives the report).
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import jinja2
import numpy as np
from PIL import Image

from llmvis.images import ImageError, contact_sheet, decode, thumbnail
from llmvis.storage import LocalStore
from llmvis.summary import STAGES

THUMBNAIL_SIDE = 192
"""Longer side of a picture on a page, pixels."""

GRID_COLUMNS = 12
_LONGEST_TEXT = 300


class Answer(Protocol):
    """What a page shows of a hit, beside its picture; `search.Hit` is one."""

    @property
    def rank(self) -> int: ...
    @property
    def score(self) -> float: ...
    @property
    def id(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def caption(self) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class PictureGrid:
    """Rows of pictures that belong together column by column: rows `(name, uint8 (n, S, S, 3))`."""

    title: str
    rows: Sequence[tuple[str, np.ndarray]]
    captions: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class QueryResult:
    """A question and its answers, best first.

    `picture` is the encoded picture that was asked for, if any; each hit comes with its
    encoded picture, or None where that is gone. `language` is a BCP 47 tag ("de").
    """

    text: str
    hits: Sequence[tuple[Answer, bytes | None]]
    picture: bytes | None = None
    language: str | None = None


def gallery(
    queries: Sequence[QueryResult],
    path: Path,
    title: str,
    *,
    note: str = "",
    pictures: Sequence[PictureGrid] = (),
    job: Mapping[str, Any] | None = None,
) -> None:
    """Write a page with the answers to `queries`.

    Args:
        queries: shown in this order.
        path: the HTML file; its folder is made. It appears complete or not at all.
        title: of the page.
        note: a line under the title, such as the model and the number of pictures.
        pictures: shown after the answers.
        job: a job's report (`summary.job_report`), shown at the end.
    """
    _write(
        path, "gallery.html", title=one_line(title), note=one_line(note),
        queries=[_query_view(q) for q in queries], grids=[_grid_view(grid) for grid in pictures],
        job=_job_view(job) if job else None,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FigureTable:
    """Figures with a head, cells as they are to be read."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def grids(
    path: Path,
    title: str,
    pictures: Sequence[PictureGrid],
    tables: Sequence[FigureTable] = (),
    *,
    note: str = "",
) -> None:
    """Write a page of figures and grids of pictures, such as an evaluation's."""
    views = [_grid_view(grid) for grid in pictures]
    figures = [
        FigureTable(
            title=one_line(table.title),
            head=[one_line(name) for name in table.head],
            rows=[[one_line(cell) for cell in row] for row in table.rows],
        )
        for table in tables
    ]
    _write(path, "grids.html", title=one_line(title), note=one_line(note), grids=views, tables=figures)


def _grid_view(grid: PictureGrid) -> dict[str, Any]:
    blocks = []
    for at in range(0, len(grid.captions), GRID_COLUMNS):
        some = slice(at, at + GRID_COLUMNS)
        rows = [
            (one_line(name), [_data_uri(Image.fromarray(x)) for x in images[some]])
            for name, images in grid.rows
        ]
        blocks.append({"rows": rows, "captions": [one_line(text) for text in grid.captions[some]]})
    return {"title": one_line(grid.title), "blocks": blocks}


def _write(path: Path, template: str, **values: Any) -> None:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("llmvis"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    LocalStore(path.parent).write(path.name, environment.get_template(template).render(**values).encode())


def sheet(queries: Sequence[QueryResult], path: Path, *, columns: int = 6, cell: int = 160) -> None:
    """Write a contact sheet (PNG): for each query its text and its pictures with captions.

    `columns` pictures in a row, each in a square of `cell` pixels; the folder is made.
    """
    parts = [
        contact_sheet(
            [_decoded(data, cell) or Image.new("RGB", (8, 8), (232, 232, 230)) for _, data in q.hits],
            [hit.caption or Path(hit.path).name for hit, _ in q.hits],
            columns,
            cell,
            title=q.text,
        )
        for q in queries
    ]
    whole = Image.new(
        "RGB", (max([p.width for p in parts], default=1), sum(p.height for p in parts) or 1), (244, 244, 242)
    )
    top = 0
    for part in parts:
        whole.paste(part, (0, top))
        top += part.height
    out = BytesIO()
    whole.save(out, "PNG")
    LocalStore(path.parent).write(path.name, out.getvalue())


def draw_recall(tuned: Mapping[str, Any], path: Path) -> None:
    """Draws what an index was tuned on (`tuned` of its manifest): recall against cost, with its setting, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    curve = tuned["curve"]
    costs = [100 * point["share_of_exact"] for point in curve]
    axes.plot(costs, [point["recall"] for point in curve], marker=".", linewidth=1.2)
    axes.axhline(
        tuned["target"], linewidth=0.8, linestyle="--", color="grey", label=f"target {tuned['target']:g}"
    )
    axes.plot(
        100 * tuned["share_of_exact"], tuned["recall_at_10"], "o",
        label=f"{tuned['nprobe']:,} lists, {tuned['candidates']:,} candidates",
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("bytes read, % of exact search")
    axes.set_ylabel("recall@10")
    axes.set_title(f"{tuned['queries']:,} {tuned['queries_are']}", fontsize=9)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    out = BytesIO()
    canvas.print_figure(out, dpi=110, format="png")
    LocalStore(path.parent).write(path.name, out.getvalue())


def one_line(text: str) -> str:
    """Foreign text for one line of a page: no control characters, no lone surrogates, cut at 300."""
    line = " ".join(text[: 4 * _LONGEST_TEXT].encode("utf-8", "replace").decode().split())
    line = "".join(c for c in line if c.isprintable())
    return line if len(line) <= _LONGEST_TEXT else line[: _LONGEST_TEXT - 1].rstrip() + "…"


def _query_view(query: QueryResult) -> dict[str, Any]:
    hits = []
    for hit, data in query.hits:
        image = _decoded(data, THUMBNAIL_SIDE)
        hits.append(
            {
                "rank": hit.rank,
                "score": hit.score,
                "path": one_line(hit.path),
                "caption": one_line(hit.caption or "") or one_line(Path(hit.path).name),
                "picture": image and _data_uri(image),
                "cut": image is not None and _is_cut_out(image),
            }
        )
    asked = _decoded(query.picture, THUMBNAIL_SIDE)
    return {
        "text": one_line(query.text) or "a picture",
        "language": query.language and one_line(query.language),
        "picture": asked and _data_uri(asked),
        "hits": hits,
        "columns": _columns(len(hits)),
    }


def _columns(hits: int) -> int:
    """Cards in a row of a wide page, 6 to 10: what leaves the last row fullest; the more, the better."""
    if hits <= 5:
        return 8
    return min(range(10, 5, -1), key=lambda columns: -hits % columns)


def _decoded(data: bytes | None, target: int) -> Image.Image | None:
    """The picture, at least `target` pixels on its shorter side if it has them; None if there is none."""
    try:
        return None if data is None else decode(data, target=target).image
    except ImageError:
        return None


def _data_uri(image: Image.Image) -> str:
    return "data:image/webp;base64," + b64encode(thumbnail(image, THUMBNAIL_SIDE)).decode()


def _is_cut_out(image: Image.Image) -> bool:
    """A figure on white, which wants a margin, rather than a photograph, which brings its own frame."""
    right, bottom = image.width - 1, image.height - 1
    corners = [image.getpixel(at) for at in ((0, 0), (right, 0), (0, bottom), (right, bottom))]
    return all(isinstance(c, tuple) and min(c) >= 250 for c in corners)


def _job_view(report: Mapping[str, Any]) -> dict[str, Any]:
    ledger = report["ledger"]
    figures = [
        (f"{ledger['input']:,}", "pictures in"),
        (f"{ledger['written']:,}", "written"),
        (f"{ledger['dead_lettered']:,}", "dead letters"),
        (f"{ledger['duplicates']:,}", "duplicates"),
    ]
    if report.get("items_per_second"):
        figures.append((f"{report['items_per_second']:,.0f}", "pictures a second"))
    if report.get("wall_s"):
        figures.append((_duration(report["wall_s"]), "in all"))
    seconds = {s: float(report.get("seconds", {}).get(s, 0.0)) for s in STAGES}
    total = sum(seconds.values())
    return {
        "figures": [{"value": value, "name": name} for value, name in figures],
        "stages": [
            {
                "name": stage,
                "weight": f"{value / total:.4f}",
                "percent": f"{value / total:.0%}",
                "seconds": _duration(value),
            }
            for stage, value in seconds.items()
            if value > 0
        ],
        "dead": [(one_line(reason), f"{n:,}") for reason, n in ledger.get("dead_by_reason", {}).items()],
    }


def _duration(seconds: float) -> str:
    """Seconds for people: 7.3 s, 4 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
