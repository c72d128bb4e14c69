"""Known drawings to begin from: near by words, of the splits asked for, the same from the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmvis.data import load_emoji
from llmvis.models.references import References


@pytest.fixture
def references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> References:
    monkeypatch.setenv("LLMVIS_CACHE", str(tmp_path))
    return References(("validation",))


def test_the_nearest_drawing_is_near_by_its_words(references: References) -> None:
    names = references.names
    assert names == load_emoji("validation", columns=["caption"])["caption"].to_pylist()
    assert references.nearest(names[:5]) == [0, 1, 2, 3, 4]
    assert references.nearest([]) == []
    assert references.picture(0).mode == "RGB"


def test_the_cache_answers_as_the_model_did(references: References, tmp_path: Path) -> None:
    asked = ["something to eat", "a wild animal", "bad weather"]
    first = references.nearest(asked)
    (file,) = tmp_path.rglob("references-*.npy")
    before = file.stat().st_mtime_ns
    assert References(("validation",)).nearest(asked) == first
    assert file.stat().st_mtime_ns == before
