"""Other people's words on every page that llmvis writes: they stay words, in a real browser too.

test_report.py does the same for the page of answers, which search and the demo write.
"""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from markdown_it import MarkdownIt

from llmvis.card import Card, Origin, card_text
from llmvis.made import made_schema
from llmvis.report import FigureTable, PictureGrid, QueryResult, gallery, grids
from tests.test_report import HOSTILE, Page, dom, hostile_job, hostile_queries, needs_browser, title

MORE = [
    "[click](javascript:document.title='owned')",
    "![x](x\" onerror=\"document.title='owned')",
    "<javascript:document.title='owned'>",
    "`</code><script>document.title='owned'</script>`",
    "| <img src=x onerror=document.title='owned'> |",
    "&lt;script&gt;document.title='owned'&lt;/script&gt;",
    "--- \n<script>document.title='owned'</script>\n---",
    "<!-- --><iframe srcdoc=\"<script>parent.document.title='owned'</script>\">",
]
ALL = [*HOSTILE, *MORE]
RUNS = {"script", "iframe", "object", "embed", "form", "base", "link", "svg"}
GREY = np.full((len(ALL), 8, 8, 3), 128, np.uint8)


def hostile_grids(path: Path) -> None:
    """An evaluation's page: titles, names of rows, captions, figures."""
    pictures = [PictureGrid(title=text, rows=[(text, GREY)], captions=ALL) for text in ALL]
    tables = [FigureTable(title=text, head=ALL, rows=[ALL, ALL]) for text in ALL[:3]]
    grids(path, "A calm page", pictures, tables, note=ALL[0])


def hostile_demo(path: Path) -> None:
    """The demo's page: answers, grids and a job on one page."""
    pictures = [PictureGrid(title=text, rows=[(text, GREY)], captions=ALL) for text in ALL]
    asked = [*hostile_queries(), *(QueryResult(text=text, hits=[]) for text in MORE)]
    gallery(asked, path, "A calm page", note=ALL[1], pictures=pictures, job=hostile_job())


def hostile_titles(path: Path) -> None:
    """Whoever searches for a text has it as the page's title."""
    gallery([QueryResult(text=text, hits=[]) for text in ALL], path, title=" ".join(ALL))


def hostile_card() -> str:
    """A data set's card of which every word is somebody else's."""
    origins = [Origin(name=t, licence=t, attribution=t, fingerprint=t) for t in ALL]
    ledger = {"input": 9, "written": 5, "dead_lettered": 4, "duplicates": 0}
    return card_text(
        Card(
            title=ALL[0],
            about=" ".join(ALL),
            layout="parquet",
            schema=made_schema([pa.field(name, pa.string()) for name in ALL if name.isprintable()]),
            ledger=ledger | {"dead_by_reason": dict.fromkeys(ALL, 1)},
            models=origins,
            collections=origins,
            seeds=ALL[2],
            tasks=ALL,
            gates=[(text, text, 1) for text in ALL],
        )
    )


def rendered(path: Path) -> None:
    """The card as a hub might show it: Markdown with tables, raw HTML let through, and no policy."""
    body = hostile_card().split("\n---\n", 1)[1]
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(body)
    path.write_text(f"<!DOCTYPE html><html><head><title>A calm page</title></head><body>{page}</body></html>")


PAGES = {"grids": hostile_grids, "demo": hostile_demo, "titles": hostile_titles, "card": rendered}


@pytest.mark.parametrize("name", PAGES)
def test_no_element_and_no_handler_comes_of_words(tmp_path: Path, name: str) -> None:
    path = tmp_path / "page.html"
    PAGES[name](path)
    page = Page(path.read_text("utf-8"))
    assert not RUNS & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on") or key == "srcdoc"]
        addresses = [str(attributes[key]) for key in ("src", "href", "action") if key in attributes]
        assert all(a.startswith("data:image/webp;base64,") or a == "contact-sheet.png" for a in addresses)
    if name != "card":  # which is Markdown: whoever shows it has a policy of their own
        policies = [
            m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"
        ]
        assert len(policies) == 1 and "default-src 'none'" in str(policies[0])
        assert "script" not in str(policies[0])
    if name != "titles":  # cut after 300 characters there
        shown = " ".join(" ".join(page.texts).split())
        assert "<script>document.title='owned'</script>" in shown, "the words are there to be read"


@needs_browser
@pytest.mark.parametrize("name", PAGES)
def test_a_browser_runs_none_of_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / "page.html"
    PAGES[name](path)
    calm = title(dom(path, tmp_path / "profile"))
    if name == "titles":
        assert html.unescape(calm).startswith("<script>document.title=")
    else:
        assert calm == "A calm page"
    raw = path.read_text("utf-8")
    policy = "http-equiv" if "http-equiv" in raw else "no policy"
    path.write_text(raw.replace(policy, "ignored").replace("</body>", ALL[1] + "</body>"))
    assert title(dom(path, tmp_path / "profile")) == "owned", "unescaped and without a policy it runs"


def test_the_front_matter_of_a_card_is_read_as_what_was_meant() -> None:
    front = yaml.safe_load(hostile_card().split("---\n")[1])
    assert set(front) == {"pretty_name", "license", "task_categories", "size_categories", "tags", "configs"}
    assert front["task_categories"] == ALL and front["pretty_name"] == ALL[0]
