"""Questions become vectors as documented, and hits point at pictures that open."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from llmvis.images import decode
from llmvis.index import Index, IndexInfo, build, open_index
from llmvis.ledger import read_data, read_manifest
from llmvis.search import Hit, Query, QueryError, pictures, query_vector, search
from llmvis.storage import LocalStore

ENCODER = tiny.TinyEncoder()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Index:
    """Plain pictures of five colours, encoded and indexed by the real jobs."""
    root = tmp_path_factory.mktemp("colours")
    (root / "images" / "more").mkdir(parents=True)
    for name, colour in tiny.COLOURS.items():
        Image.new("RGB", (20, 10), colour).save(root / "images" / f"{name}.png")
        (root / "images" / f"{name}.txt").write_text(f"all {name}")
    Image.new("RGB", (5, 5), (250, 10, 10)).save(root / "images" / "more" / "nearly red.png")
    tiny.run(str(root / "images"), str(root / "enc"))
    encoded = LocalStore(root / "enc")
    manifest = read_manifest(encoded, "encode")
    info = IndexInfo(model=manifest["model"], source=manifest["source"])
    build(LocalStore(root / "idx"), info, (read_data(encoded, f) for f in manifest["files"]))
    return open_index(str(root / "idx"), tiny.INFO.fingerprint)


def ask(index: Index, k: int = 6, **query: Any) -> list[str]:
    (hits,) = search(index, query_vector(Query(**query), ENCODER), k)
    return [Path(hit.path).stem for hit in hits]


def test_a_text_finds_its_picture_and_hits_say_all_about_it(index: Index) -> None:
    (hits,) = search(index, query_vector(Query(text="something red"), ENCODER), 3)
    assert [h.rank for h in hits] == [1, 2, 3]
    assert Path(hits[0].path).is_file()
    assert (hits[0].caption, hits[0].width, hits[0].height) == ("all red", 20, 10)
    assert hits[0].score == pytest.approx(1, abs=1e-2)
    assert Path(hits[1].path).name == "nearly red.png"
    assert list(hits[0].to_json()) == ["rank", "id", "score", "path", "caption", "width", "height"]
    data = pictures(index, hits)[0]
    assert data is not None and decode(data).image.getpixel((0, 0)) == (255, 0, 0)


def test_a_picture_finds_itself(index: Index) -> None:
    blue = search(index, query_vector(Query(text="blue"), ENCODER), 1)[0][0].path
    assert ask(index, k=1, image=blue) == ["blue"]


def test_weights_move_the_answer_from_the_text_to_the_picture(index: Index) -> None:
    blue = search(index, query_vector(Query(text="blue"), ENCODER), 1)[0][0].path
    assert ask(index, k=1, text="red", image=blue, text_weight=3) == ["red"]
    assert ask(index, k=1, text="red", image=blue, image_weight=3) == ["blue"]


def test_what_is_to_be_avoided_moves_back(index: Index) -> None:
    assert ask(index, text="white red", k=2, avoid=("red",), avoid_weight=1.5)[0] not in ("red", "nearly red")
    kept = ask(index, text="white")
    moved = ask(index, text="white", avoid=("red",))
    assert moved.index("nearly red") > kept.index("nearly red")


def test_questions_without_an_answer_are_refused_with_words(index: Index, tmp_path: Path) -> None:
    with pytest.raises(QueryError, match="nothing to search for"):
        ask(index)
    with pytest.raises(QueryError, match="cancel out"):
        ask(index, text="red", avoid=("red",), avoid_weight=1.0)
    (tmp_path / "x.png").write_bytes(b"<html>")
    with pytest.raises(QueryError, match="not_an_image"):
        ask(index, image=str(tmp_path / "x.png"))
    with pytest.raises(QueryError, match="missing"):
        ask(index, image=str(tmp_path / "none.png"))


def test_a_query_vector_is_unit_length() -> None:
    vector = query_vector(Query(text="red", avoid=("blue", "green")), ENCODER)
    assert vector.shape == (1, tiny.INFO.dim)
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


def test_a_users_columns_do_not_hide_ours_and_are_json() -> None:
    columns = {
        "score": 97,
        "rank": 7,
        "value": float("nan"),
        "when": datetime.date(2026, 1, 2),
        "more": [1.5, None],
    }
    hit = Hit(
        rank=1, id="a", score=0.5, path="p", caption=None, width=1, height=1, locator=b"", columns=columns
    )
    said = json.loads(json.dumps(hit.to_json(), allow_nan=False))
    assert (said["rank"], said["score"]) == (1, 0.5)
    assert (said["value"], said["when"], said["more"]) == (None, "2026-01-02", [1.5, None])
