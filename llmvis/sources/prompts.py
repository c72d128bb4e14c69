"""Prompts to make pictures from: text, CSV, JSON lines or Parquet, templates with lists, seeds.

One listing row is one picture to be made. A text file has a prompt a line; a table has a
column `prompt` (or text, caption), may have `negative` and `seed`, and carries its other
columns along. `{name}` in a prompt stands for each text of a list of that name in turn.
Knows no models.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from llmvis.schema import Reason, item_id
from llmvis.sources.base import LISTING_CHUNK, SourceError, can_carry, carried, listing_table
from llmvis.storage import is_remote, local_path, open_store, sha256_bytes

PROMPT_COLUMNS = ("prompt", "text", "caption")
ADDED = [
    pa.field("prompt", pa.string()),
    pa.field("negative", pa.string()),
    pa.field("seed", pa.int64()),
]
MOST_CHARACTERS = 10_000
_PLACE = re.compile(r"\{(\w+)\}")


def fill_template(text: str, lists: Mapping[str, Sequence[str]]) -> list[str]:
    """A prompt with `{name}`s → one prompt for each combination of the lists' texts, in order.

    A `{name}` that no list has is refused; text without any comes back as it is.

    Raises:
        SourceError: a name without a list.
    """
    names = list(dict.fromkeys(_PLACE.findall(text)))
    if unknown := [name for name in names if name not in lists]:
        raise SourceError(
            f"{text!r} asks for a list {unknown[0]!r}: give --fill {unknown[0]}=first,second"
            + (f" (there are lists {', '.join(lists)})" if lists else "")
        )
    made = []
    for texts in itertools.product(*(lists[name] for name in names)):
        chosen = dict(zip(names, texts, strict=True))
        made.append(_PLACE.sub(lambda match, chosen=chosen: chosen[match[1]], text))  # type: ignore[misc]
    return made


class PromptSource:
    """Prompts × variants.

    Args:
        prompts: a file, or a prompt itself where there is no file of that name.
        seeds: one picture of each prompt for each; a row's own `seed` is added to them.
        negative: for rows that have none of their own.
        lists: what `{name}`s stand for.
    """

    def __init__(
        self, prompts: str, *, seeds: Sequence[int], negative: str | None = None,
        lists: Mapping[str, Sequence[str]] | None = None, prompt_column: str | None = None,
    ) -> None:  # fmt: skip
        self._seeds, self._negative = list(seeds), negative
        self._lists = {name: list(texts) for name, texts in (lists or {}).items()}
        read = read_texts(prompts, prompt_column, "--prompt-column")
        self._file, self._sha256, self._table, self._prompt = read.file, read.sha256, read.table, read.column
        where = self._file or "the prompt"
        own = {self._prompt, "negative", "seed"}
        others = [f for f in self._table.schema if f.name not in own and can_carry(f.type)]
        self._others = [field.name for field in others]
        self.user_columns = [*carried(others, where), *ADDED]

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "prompts",
            "root": self._file or "the prompt",
            "shown_root": "",
            "sha256": self._sha256,
            "column": self._prompt,
            "seeds": self._seeds,
            "negative": self._negative,
            "lists": self._lists,
        }

    def notes(self) -> list[str]:
        return []

    def listing(self) -> Iterator[pa.Table]:
        """One row a picture: id of prompt, negative and seed; `path` says where the prompt stands."""
        where = self._file.rpartition("/")[2] if self._file else "prompt"
        rows: list[dict[str, Any]] = []
        for number, row in enumerate(self._table.to_pylist()):
            rows += self._pictures(row, f"{where}#{number}")
            while len(rows) >= LISTING_CHUNK:
                yield self._chunk(rows[:LISTING_CHUNK])
                rows = rows[LISTING_CHUNK:]
        if rows:
            yield self._chunk(rows)

    def _pictures(self, row: dict[str, Any], place: str) -> Iterator[dict[str, Any]]:
        text = "" if row[self._prompt] is None else str(row[self._prompt])
        negative = row.get("negative") or self._negative
        first = _number(row.get("seed"), place)
        bad: tuple[Reason | None, str | None] = (None, None)
        if not text.strip() or "\0" in text:
            bad = (Reason.EMPTY, "no prompt in this row")
        elif len(text) > MOST_CHARACTERS:
            bad = (Reason.TOO_LARGE, f"a prompt of {len(text):,} characters; the cap is {MOST_CHARACTERS:,}")
        prompts = [text] if bad[0] else fill_template(text, self._lists)
        for prompt, seed in itertools.product(prompts, self._seeds):
            key = f"{prompt}\0{negative}\0{first + seed}"
            yield {
                "id": item_id(key.encode("utf-8", "surrogatepass")),
                "path": place,
                "locator": b"",
                "caption": prompt,
                "reason": bad[0] and str(bad[0]),
                "detail": bad[1],
                "prompt": prompt,
                "negative": negative,
                "seed": first + seed,
                "others": [row[name] for name in self._others],
            }

    def _chunk(self, rows: list[dict[str, Any]]) -> pa.Table:
        listed = {
            name: [row[name] for row in rows]
            for name in ("id", "path", "locator", "caption", "reason", "detail")
        }
        columns = [
            pa.array([row["others"][i] for row in rows], field.type)
            for i, field in enumerate(self.user_columns[: len(self._others)])
        ]
        columns += [pa.array([row[field.name] for row in rows], field.type) for field in ADDED]
        return listing_table(listed, pa.table(columns, schema=pa.schema(self.user_columns)))


class Texts(NamedTuple):
    """A file of texts, read."""

    file: str | None  # None: it was no file, but a text
    sha256: str
    table: pa.Table
    column: str  # of `table`: the texts


def read_texts(given: str, column: str | None, flag: str) -> Texts:
    """The file that `given` names, or the one text that it is; `flag` is how people name its `column`.

    Raises `SourceError` where the file cannot be read, is empty, or has no such column.
    """
    file, data = _file(given)
    table = _read(file, data) if file else pa.table({"prompt": [given]})
    picked = _pick(table.schema, column, flag, file or "the text")
    return Texts(file=file, sha256=sha256_bytes(data), table=table, column=picked)


def _file(prompts: str) -> tuple[str | None, bytes]:
    """The file that `prompts` names, and its bytes; None and the prompt's own bytes where it names none."""
    if "\n" in prompts or len(prompts) >= 4096:
        return None, prompts.encode()
    path = Path(prompts) if is_remote(prompts) else local_path(prompts)
    looks_like_file = path.suffix in (".txt", ".csv", ".jsonl", ".parquet")
    if not is_remote(prompts) and not path.is_file():
        if looks_like_file or path.is_dir():
            raise SourceError(
                f"{prompts} is no file; give a prompt, or a .txt, .csv, .jsonl or .parquet file"
            )
        return None, prompts.encode()
    folder, _, name = (prompts if is_remote(prompts) else str(path)).rpartition("/")
    try:
        return f"{folder}/{name}", open_store(folder or "/").read(name)
    except OSError as error:
        raise SourceError(f"{prompts} cannot be read: {error}") from error


def _read(file: str, data: bytes) -> pa.Table:
    """A file of prompts as a table. Raises `SourceError` with the line that is wrong."""
    try:
        if file.endswith(".parquet"):
            return pq.read_table(pa.BufferReader(data))
        text = data.decode("utf-8-sig")
    except (UnicodeDecodeError, pa.ArrowException) as error:
        raise SourceError(f"{file} cannot be read: {error}") from error
    if file.endswith(".csv"):
        rows: list[dict[str, Any]] = list(csv.DictReader(text.splitlines(keepends=True)))
        if rows and None in rows[0]:
            raise SourceError(f"{file}: the first row has more cells than the head")
    elif file.endswith(".jsonl"):
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise SourceError(f"{file}, line {number}: {error}") from error
                rows.append(row if isinstance(row, dict) else {"prompt": row})
    else:
        rows = [{"prompt": line} for line in text.splitlines() if line.strip()]
    if not rows:
        raise SourceError(f"{file} holds no prompts")
    try:
        names = list(dict.fromkeys(name for row in rows for name in row if name is not None))
        return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})
    except pa.ArrowException as error:
        raise SourceError(f"{file}: a column mixes kinds: {error}") from error


def _pick(schema: pa.Schema, asked: str | None, flag: str, where: str) -> str:
    for name in (asked,) if asked else PROMPT_COLUMNS:
        if name in schema.names:
            return str(name)
    raise SourceError(
        f"{where} has no column {asked or 'prompt'!r}; it has {', '.join(schema.names)}: name one with {flag}"
    )


def _number(value: Any, place: str) -> int:
    if value is None or value == "":
        return 0
    try:
        return int(value)
    except (TypeError, ValueError):
        raise SourceError(f"{place}: the seed {value!r} is no whole number") from None
