"""The card of a data set: what the hub reads, what people read, and that foreign text stays text."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from huggingface_hub import DatasetCard
from PIL import Image

from llmvis.card import Card, Layout, Origin, card_text, sheet_labels, size_category, write_card
from llmvis.export import pack_parquet, pack_webdataset, write_imagefolder
from llmvis.gates import GateConfig, gate_lines
from llmvis.made import made_schema
from llmvis.storage import LocalStore
from tests.test_export import USER, load, made

COUNTS = {"blank": 2, "near_duplicate": 3}
CARD = Card(
    title="Coloured drawings",
    about="Line drawings, coloured by a model.",
    layout="parquet",
    schema=made_schema(USER),
    ledger={
        "input": 1_020,
        "written": 1_009,
        "dead_lettered": 10,
        "duplicates": 1,
        "dead_by_reason": {**COUNTS, "truncated": 5},
    },
    models=[Origin(name="llmvis/synthesis", licence="Apache-2.0 AND CC-BY-SA-4.0", fingerprint="ab" * 32)],
    collections=[Origin(name="OpenMoji", licence="CC-BY-SA-4.0", attribution="the OpenMoji project")],
    prompts=12,
    seeds="0 to 3",
    tasks=("image-to-image",),
    gates=gate_lines(GateConfig(near_duplicates=0.95), COUNTS),
)


def tables(text: str, heading: str) -> list[list[str]]:
    """Cells of all tables under a heading, row by row."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_hub_reads_the_front_matter() -> None:
    data = DatasetCard(card_text(CARD)).data.to_dict()
    assert data["license"] == ["apache-2.0", "cc-by-sa-4.0"]
    assert data["task_categories"] == ["image-to-image"]
    assert data["size_categories"] == ["1K<n<10K"]
    assert data["pretty_name"] == "Coloured drawings"
    assert data["configs"][0]["data_files"] == [{"split": "train", "path": "data/*.parquet"}]


def test_people_read_ledger_gates_provenance_and_licences() -> None:
    text = card_text(CARD)
    left_out = tables(text, "What was left out")
    for row in (["asked for", "1,020"], ["written", "1,009"], ["left out", "10"], ["asked for twice", "1"]):
        assert row in left_out
    assert ["`near_duplicate`", "cosine with earlier pictures ≤ 0.95", "3"] in left_out
    assert ["`duplicate_picture`", "pixels unlike any earlier picture's", "0"] in left_out
    assert ["`truncated`", "5"] in left_out
    assert sum(row[0] == "`blank`" for row in left_out) == 1
    assert ["model", "llmvis/synthesis", f"`{'ab' * 32}`"] in tables(text, "Where it comes from")
    assert "12 different prompts" in text
    assert "Seeds: 0 to 3." in text
    assert ["source collection", "OpenMoji", "CC-BY-SA-4.0", "the OpenMoji project"] in tables(
        text, "Licences"
    )
    columns = [row[0] for row in tables(text, "Columns")[2:]]
    assert columns == [f"`{name}`" for name in CARD.schema.names]


@pytest.mark.parametrize(
    ("licence", "expected"),
    [("MIT", "mit"), ("LicenseRef-mine", "other"), ("unknown", "unknown")],
)
def test_a_licence_that_the_hub_does_not_know_is_other(licence: str, expected: str) -> None:
    card = replace(CARD, models=[Origin(name="m", licence=licence)], collections=[])
    assert DatasetCard(card_text(card)).data.license == expected


def test_foreign_text_cannot_break_out_and_attribution_is_never_cut() -> None:
    hostile = "x | y\n---\n# no heading <script>alert(1)</script> [l](javascript:0) `c` \u202e\x1b[31m"
    card = replace(
        CARD, title=f"a: {hostile}", about=hostile,
        collections=[Origin(name=hostile, licence=hostile, attribution="A. Person, " * 100 + "the last one")],
        gates=[("low_score", hostile, 1)], seeds=hostile,
    )  # fmt: skip
    text = card_text(card)
    front = DatasetCard(text).data.to_dict()
    assert front["pretty_name"].startswith("a: x | y --- # no heading <script>")
    body = text.split("\n---\n", 1)[1]
    assert not re.search(r"(?<!\\)<script", body)
    assert not re.search(r"(?<!\\)\[l", body)
    assert "the last one" in body
    assert not set("\u202e\x1b") & set(text)
    for heading in ("Where it comes from", "Licences", "What was left out"):
        assert {len(row) for row in tables(text, heading)} <= {2, 3, 4}


@pytest.mark.parametrize("layout", ["parquet", "webdataset", "imagefolder"])
def test_datasets_finds_the_rows_by_the_card_and_its_code_runs(
    tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, table = LocalStore(tmp_path / "set"), made(3).drop_columns("words")
    if layout == "parquet":
        store.write("data/0.parquet", pack_parquet(table))
    elif layout == "webdataset":
        store.write("data/0.tar", pack_webdataset(table))
    else:
        write_imagefolder([table], store.path("data"), rows=3)
    store.write("dead/0.parquet", pack_parquet(pa.table({"id": ["no row of the data set"]})))
    card = replace(CARD, layout=layout, schema=table.schema)
    write_card(store, card, table)
    found = load(tmp_path, str(store.root))
    assert len(found) == 3
    assert isinstance(found[0]["png" if layout == "webdataset" else "image"], Image.Image)
    if layout != "webdataset":  # its own iteration is in test_export
        monkeypatch.chdir(store.root)
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        names: dict[str, Any] = {}
        code = card_text(card).split("```python\n")[1].split("```")[0]
        code = code.replace("split=", f"cache_dir={str(tmp_path / 'again')!r}, split=")
        exec(code, names)
        assert len(names["rows"]) == 3


def test_the_contact_sheet_shows_some_pictures_and_both_files_are_the_same_each_time(tmp_path: Path) -> None:
    written = []
    for folder in ("a", "b"):
        store = LocalStore(tmp_path / folder)
        write_card(store, CARD, made(30))
        assert "![Some of the pictures](contact-sheet.png)" in store.read("README.md").decode()
        written.append((store.read("README.md"), store.read("contact-sheet.png")))
    assert written[0] == written[1]
    with Image.open(tmp_path / "a" / "contact-sheet.png") as whole:
        size = whole.size
    write_card(LocalStore(tmp_path / "few"), CARD, made(6))
    with Image.open(tmp_path / "few" / "contact-sheet.png") as few:
        assert few.width == size[0]
        assert 3 * few.height < size[1] <= 4 * few.height  # 24 pictures at most, in rows of six


@pytest.mark.parametrize(
    ("rows", "name"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (2_500_000, "1M<n<10M"), (10**13, "n>1T")],
)
def test_size_categories_are_those_of_the_hub(rows: int, name: str) -> None:
    assert size_category(rows) == name


@pytest.mark.parametrize(
    ("changed", "labels"),
    [
        ([{}, {"prompt": "grey"}], ["colour it", "grey"]),
        ([{"caption": "a cup"}, {"caption": "a hat", "prompt": "grey"}], ["a cup", "a hat"]),
        ([{"caption": "a cup"}, {"caption": "a cup"}], ["a cup", "a cup"]),
        ([{"caption": None}, {"caption": None, "source": None}], ["folder/0.jpg", "colour it"]),
    ],
    ids=["one picture, two prompts", "names that differ", "nothing that differs", "no captions"],
)
def test_the_contact_sheet_tells_its_pictures_apart(changed: list[dict[str, Any]], labels: list[str]) -> None:
    rows = [row for change in changed for row in made(1, **change).to_pylist()]
    assert sheet_labels(rows) == labels
