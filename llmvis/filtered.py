"""The pictures behind hits, copied out as they are: an imagefolder that `datasets` and our own reader read.

Pictures are read and written some at a time, and the folder appears whole, by one rename. Knows no index:
hits say what opens their pictures.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from llmvis.export import write_imagefolder
from llmvis.formats import sniff
from llmvis.made import IMAGE
from llmvis.schema import ItemError
from llmvis.search import Hit, read_pictures
from llmvis.storage import StorageError, local_path

AT_A_TIME = 64
"""Pictures that are in memory."""
_ENDINGS = {"JPEG": ".jpg", "TIFF": ".tif"}
_OURS = ("id", "image", "caption", "score", "path", "width", "height")


def refuse_taken(out: str) -> None:
    """Raises `StorageError` where there is anything in `out`, or it is no place on this machine."""
    folder = local_path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StorageError(f"{out} is there already and not empty; choose a new folder for --out")


def copy_pictures(sources: Sequence[dict[str, Any]], hits: Sequence[Hit], out: str) -> Counter[str]:
    """`<out>/images/<id>.<its format>` and `metadata.jsonl`: file_name, id, score, caption, path, own columns.

    Returns how many could not be read, by reason. `sources` are the index's, of which `hits` are.
    Raises `StorageError` where `out` is not empty.
    """
    refuse_taken(out)
    folder = local_path(out)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lost: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(
        prefix=".aside-", dir=folder.parent, ignore_cleanup_errors=True
    ) as aside:
        whole = Path(aside) / "whole"
        write_imagefolder(
            _tables(sources, hits, lost), whole, rows=len(hits), lost=lambda: sum(lost.values())
        )
        whole.replace(folder)
    return lost


def _tables(sources: Sequence[dict[str, Any]], hits: Sequence[Hit], lost: Counter[str]) -> Iterator[pa.Table]:
    """Some hits with their pictures at a time; those without are counted in `lost`."""
    for at in range(0, len(hits), AT_A_TIME):
        some = hits[at : at + AT_A_TIME]
        rows = []
        for hit, data in zip(some, read_pictures(sources, some), strict=True):
            if isinstance(data, ItemError):
                lost[str(data.reason)] += 1
                continue
            bad, kind = sniff(data)
            if bad is not None:
                lost[str(bad)] += 1
                continue
            rows.append(_row(hit, data, _ENDINGS.get(kind, f".{kind.lower()}")))
        if rows:
            images = pa.array([row.pop("image") for row in rows], IMAGE)
            yield pa.Table.from_pylist(rows).append_column("image", images)


def _row(hit: Hit, data: bytes, ending: str) -> dict[str, Any]:
    own = {f"source_{name}" if name in _OURS else name: value for name, value in hit.columns.items()}
    ours = {name: getattr(hit, name) for name in _OURS if name != "image"}
    return {**ours, "image": {"bytes": data, "path": hit.id + ending}, **own}
