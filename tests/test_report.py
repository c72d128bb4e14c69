"""Result pages: what they show, and that other people's captions stay text, in a real browser too."""

from __future__ import annotations

import shutil
import subprocess
from base64 import b64decode
from dataclasses import dataclass
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llmvis.report import QueryResult, _columns, gallery, one_line, sheet
from tests.catalogue import encoded, photo

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = [
    "<script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "'><svg onload=document.title='owned'>",
    "</title></style><script>document.title='owned'</script>",
    '" onmouseover="document.title=1" style="position:fixed;inset:0',
    "{{ 7 * 7 }}{% raise %}",
    "javascript:document.title='owned'",
    "\u202egnp.\0\x1b[31m\ud800",
]


@dataclass(frozen=True)
class Found:
    rank: int
    score: float
    id: str
    path: str
    caption: str | None


def hits(captions: list[str], data: bytes | None) -> list[tuple[Found, bytes | None]]:
    return [
        (Found(i, 0.5 - i / 100, f"id{i}", f"folder/{i}.png", c), data) for i, c in enumerate(captions, 1)
    ]


PNG = encoded(photo(), "PNG")
JOB: dict[str, Any] = {
    "job": "encode",
    "ledger": {
        "input": 12345,
        "written": 12300,
        "dead_lettered": 40,
        "duplicates": 5,
        "dead_by_reason": {"truncated": 30, "too_large": 10},
    },
    "items_per_second": 212.4,
    "wall_s": 245.0,
    "seconds": {"list": 0.0, "read": 10.0, "decode": 30.0, "model": 60.0, "write": 0.0},
}


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


class Page(HTMLParser):
    """Elements and texts of a page, as a parser sees them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def write(path: Path, queries: list[QueryResult], title: str = "A page", **options: Any) -> Page:
    gallery(queries, path, title, **options)
    return Page(path.read_text("utf-8"))


def hostile_queries() -> list[QueryResult]:
    bad_paths = [(Found(9, 0.1, text, text, None), PNG) for text in HOSTILE]
    return [
        QueryResult(text=HOSTILE[0], hits=hits(HOSTILE, PNG), picture=PNG, language=HOSTILE[1]),
        QueryResult(text=HOSTILE[3], hits=bad_paths, language='de" onclick="x'),
    ]


def hostile_job() -> dict[str, Any]:
    ledger = JOB["ledger"] | {"dead_by_reason": dict.fromkeys(HOSTILE, 1)}
    return JOB | {"ledger": ledger}


def test_page_shows_queries_hits_scores_and_pictures(tmp_path: Path) -> None:
    queries = [
        QueryResult(text="a red flower", hits=hits(["rose", "tulip"], PNG), language="en"),
        QueryResult(text="赤い花", hits=hits(["バラ"], PNG), picture=PNG, language="ja"),
        QueryResult(text="nothing like it", hits=[]),
    ]
    page = write(tmp_path / "new folder" / "page.html", queries, note="two answers")
    for text in (
        "A page",
        "two answers",
        "a red flower",
        "rose",
        "tulip",
        "0.490",
        "0.480",
        "赤い花",
        "バラ",
    ):
        assert text in page.texts, text
    assert "Nothing found." in page.texts
    assert [i.get("alt") for i in page.all("img")] == [
        "rose", "tulip", "the picture that was asked for", "バラ"
    ]  # fmt: skip
    assert [h.get("lang") for h in page.all("h2")] == ["en", "ja", None]
    assert [p.name for p in (tmp_path / "new folder").iterdir()] == ["page.html"]


def test_page_is_one_file_with_small_pictures(tmp_path: Path) -> None:
    big = encoded(photo(2000, 1500), "JPEG")
    page = write(tmp_path / "page.html", [QueryResult(text="q", hits=hits(["a", "b"], big))])
    for image in page.all("img"):
        kind, _, data = str(image["src"]).partition(",")
        assert kind == "data:image/webp;base64"
        assert Image.open(BytesIO(b64decode(data))).size == (192, 144)
    assert (tmp_path / "page.html").stat().st_size < 60_000
    addresses = [v for _, attributes in page.elements for k, v in attributes.items() if k in ("src", "href")]
    assert addresses and all(str(a).startswith("data:") for a in addresses)
    assert not page.all("script") and not page.all("link")


def test_policy_comes_before_anything_it_governs(tmp_path: Path) -> None:
    page = write(tmp_path / "page.html", [])
    assert [tag for tag, _ in page.elements[:4]] == ["html", "head", "meta", "meta"]
    policy = page.elements[3][1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    parts = str(policy["content"]).split("; ")
    assert {"default-src 'none'", "img-src data:", "style-src 'unsafe-inline'"} <= set(parts)
    assert not any("script" in part for part in parts)


def test_same_input_gives_the_same_bytes_and_replaces_the_page(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    write(path, hostile_queries(), job=JOB)
    first = path.read_bytes()
    write(path, hostile_queries(), job=JOB)
    assert path.read_bytes() == first and list(tmp_path.iterdir()) == [path]


def test_missing_and_broken_pictures_leave_a_place(tmp_path: Path) -> None:
    found = [*hits(["gone"], None), *hits(["broken"], b"<html>"), *hits(["there"], PNG)]
    page = write(tmp_path / "page.html", [QueryResult(text="q", hits=found, picture=b"junk")])
    assert page.texts.count("no picture") == 2
    assert len(page.all("img")) == 1 and {"gone", "broken", "there"} <= set(page.texts)


def test_a_hit_without_a_caption_shows_its_file_name(tmp_path: Path) -> None:
    found = [(Found(1, 0.5, "x", "deep/folder/rose 1.jpg", caption), PNG) for caption in (None, "", "\0 \n")]
    page = write(tmp_path / "page.html", [QueryResult(text="", hits=found)])
    assert page.texts.count("rose 1.jpg") == 3
    assert "a picture" in page.texts


def test_figures_on_white_get_a_margin_and_photographs_none(tmp_path: Path) -> None:
    figure = Image.new("RGBA", (60, 60), (0, 0, 0, 0))
    figure.paste((200, 0, 0, 255), (20, 20, 40, 40))
    found = [*hits(["figure"], encoded(figure, "PNG")), *hits(["photo"], PNG)]
    page = write(tmp_path / "page.html", [QueryResult(text="q", hits=found)])
    assert [i.get("class") for i in page.all("img")] == ["cut", None]


@pytest.mark.parametrize(
    ("n", "columns"), [(0, 8), (1, 8), (6, 6), (7, 7), (8, 8), (10, 10), (12, 6), (20, 10)]
)
def test_rows_are_full_where_they_can_be(n: int, columns: int) -> None:
    assert _columns(n) == columns


def test_job_figures_and_bar(tmp_path: Path) -> None:
    page = write(tmp_path / "page.html", [], job=JOB)
    for text in ("12,345", "12,300", "40", "5", "212", "4 min 05 s", "truncated", "30", "too_large", "10"):
        assert text in page.texts, text
    bar = [a for a in page.all("i") if a.get("style")]
    assert [a["class"] for a in bar] == ["read", "decode", "model"]  # stages without time have no place
    shares = [float(str(a["style"]).removeprefix("flex-grow: ")) for a in bar]
    assert shares == [0.1, 0.3, 0.6]


def test_a_job_that_had_nothing_to_do(tmp_path: Path) -> None:
    idle = {"ledger": JOB["ledger"] | {"dead_by_reason": {}}, "items_per_second": None, "seconds": {}}
    page = write(tmp_path / "page.html", [], job=idle)
    assert "12,300" in page.texts and not page.all("table")
    assert not [a for a in page.all("div") if a.get("class") == "bar"]


def test_foreign_text_stays_text(tmp_path: Path) -> None:
    page = write(
        tmp_path / "page.html", hostile_queries(), title=HOSTILE[3], note=HOSTILE[1], job=hostile_job()
    )
    joined = "\n".join(page.texts)
    for text in HOSTILE:
        assert one_line(text) in joined
    assert len(page.all("img")) == 2 * len(HOSTILE) + 1
    assert not page.all("script") and not page.all("svg")
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
    assert not any(a.get("style", "").startswith("position") for a in page.all("li") + page.all("img"))
    raw = (tmp_path / "page.html").read_text("utf-8")
    assert "\0" not in raw and "\x1b" not in raw and "\u202e" not in raw


def test_long_text_is_cut() -> None:
    assert one_line("word " * 500).endswith("…") and len(one_line("word " * 500)) <= 300
    assert one_line("  a\n\tb  ") == "a b"


needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium"
)


def dom(path: Path, profile: Path) -> str:
    """The page after a real browser has had its way with it."""
    assert CHROMIUM is not None
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --disable-extensions --virtual-time-budget=2000"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return done.stdout.decode()


def title(html: str) -> str:
    return html.partition("<title>")[2].partition("</title>")[0]


@needs_browser
def test_no_script_runs_in_a_browser(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    gallery(hostile_queries(), path, "A calm page", note=HOSTILE[0], job=hostile_job())
    after = dom(path, tmp_path / "profile")
    assert title(after) == "A calm page"
    seen = Page(after)
    assert len(seen.all("img")) == 2 * len(HOSTILE) + 1 and not seen.all("script")

    # The same captions without escaping and policy do run: the test above can fail.
    raw = path.read_text("utf-8")
    policy = raw[raw.index('<meta http-equiv="Content') : raw.index('<meta name="viewport"')]
    unsafe = raw.replace("</main>", HOSTILE[0] + "</main>")
    path.write_text(unsafe.replace(policy, ""))
    assert title(dom(path, tmp_path / "profile")) == "owned"

    # And the policy alone would have stopped them.
    path.write_text(unsafe)
    assert title(dom(path, tmp_path / "profile")) == "A calm page"


@needs_browser
@pytest.mark.parametrize("width", [400, 1280])
def test_page_fits_the_window(tmp_path: Path, width: int) -> None:
    """Nothing sticks out to the right, whatever the captions; and pictures are really painted."""
    path = tmp_path / "page.html"
    red = encoded(Image.new("RGB", (60, 40), (255, 0, 0)), "PNG")
    gallery([QueryResult(text="W" * 300, hits=hits(["M" * 300] * 10, red))], path, "T" * 300, job=JOB)
    assert CHROMIUM is not None
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --hide-scrollbars --window-size={width},1500"
    shot, profile = tmp_path / "shot.png", tmp_path / "profile"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={profile}", f"--screenshot={shot}", path.as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    pixels = np.asarray(opened(shot)).astype(int)
    assert pixels.shape[1] == width
    margin = pixels[:, -2:]  # beyond the shadow of a card
    assert np.ptp(margin.reshape(-1, 3), axis=0).max() == 0  # bare paper along the right edge
    reds = (np.abs(pixels - (255, 0, 0)).max(-1) < 30).sum()
    assert reds > 10 * 60 * 40  # ten pictures, larger than life


def test_sheet_has_every_query_and_every_hit(tmp_path: Path) -> None:
    red, blue = (encoded(Image.new("RGB", (9, 9), c), "PNG") for c in ("#ff0000", "#0000ff"))
    queries = [
        QueryResult(text="red 赤い", hits=hits(["a"] * 7, red)),
        QueryResult(text=HOSTILE[7], hits=[*hits(HOSTILE, blue), *hits(["gone"], None)]),
        QueryResult(text="", hits=[]),
    ]
    path = tmp_path / "sheets" / "sheet.png"
    sheet(queries, path, columns=3, cell=64)
    pixels = np.asarray(opened(path)).astype(int)
    one = (64 - 2 * 3) ** 2  # a cell less its border
    assert (pixels == (255, 0, 0)).all(-1).sum() == 7 * one
    assert (pixels == (0, 0, 255)).all(-1).sum() == len(HOSTILE) * one
    assert np.argwhere((pixels == (255, 0, 0)).all(-1))[:, 0].max() < 3 * 100
    sheet([], path)
    assert opened(path).size == (1, 1)
