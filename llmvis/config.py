"""What each command can be told: keyword-only dataclasses, from which the command lines are made.

`parse` reads them from the command line, on top of a YAML file if `--config` names one.
Every field has a default that works or is required; there are no magic values.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import tyro
import yaml

from llmvis.schema import UserError

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Encode a collection of pictures into embeddings, on the cluster that RAY_ADDRESS names or on this machine.

    Killed? Run the same command again and it goes on where it stopped.

    For example:

      python -m jobs.encode --images photos/ --out enc/

      python -m jobs.encode --images photos/ --out enc/ --dry-run

      python -m jobs.encode --images rows.parquet --caption-column text --model openai/clip-vit-base-patch32 --out enc/
    """

    images: str
    """A folder (captions in .txt beside a picture, or an imagefolder's metadata.jsonl/csv), Parquet files, webdataset tars, what img2dataset made, or `emoji`, the packaged collection."""
    out: str
    """Folder for the result: data/, dead/, manifest.json, report.json."""
    model: str | None = None
    """Hugging Face name or local folder of a model with an image and a text tower; default: the packaged two-tower model."""
    dry_run: bool = False
    """Print the plan and stop; nothing is written and no cluster started."""
    image_column: str | None = None
    """Parquet: column with bytes, image structs or paths."""
    caption_column: str | None = None
    """Parquet, imagefolder or the .json of tars: column with the caption."""
    id_column: str | None = None
    """Parquet: column of unique keys to make ids from (default: file name and row number)."""
    image_root: str | None = None
    """Parquet with a path column: folder that the paths start from; none may leave it (default: the Parquet file's)."""
    max_pixels: int = 89_478_485
    """A picture with more is a dead letter, unread."""
    max_bytes: int = 268_435_456
    """A file with more bytes is a dead letter, undecoded."""
    actors: int | None = None
    """Copies of the model that work at a time (default: one a GPU, or one a CPU)."""
    gpus_per_actor: float | None = None
    """GPUs for each copy, also a fraction; 0 keeps the model on CPUs (default: 1 where there are GPUs)."""
    num_cpus: int | None = None
    """CPUs to use when a local cluster is started (default: all)."""
    shard_items: int = 256
    """Pictures in a shard, the unit of retry and resume."""
    timeout: float = 1800.0
    """Seconds for a shard in one stage; a worker that takes longer is taken to hang, and its items are done one by one."""
    json: str | None = None
    """Write the report there too, as JSON."""

    def __post_init__(self) -> None:
        at_least(self, 1, "max_pixels", "max_bytes", "actors", "num_cpus", "shard_items")
        at_least(self, 0, "gpus_per_actor")
        at_least(self, 1, "timeout")
        check_file(self.json)


@dataclass(frozen=True, kw_only=True)
class IndexConfig:
    """Build a search index from what `jobs.encode` wrote, add to one, or compact one. Reads what manifests name, no other file.

    Of one shard it is built in this process; of more, by tasks on the cluster that RAY_ADDRESS names or on this
    machine. Killed? Run the same command again: it goes on where it stopped, and readers have the old version until then.

    For example:

      python -m jobs.index --embeddings enc/ --out idx/

      python -m jobs.index --embeddings more/ --out idx/ --add

      python -m jobs.index --out idx/ --compact

      python -m jobs.index --embeddings enc/ --out idx/ --memory 8 --recall 0.98 --dry-run

      python -m jobs.index --embeddings clip-retrieval/ --model openai/clip-vit-base-patch32 --out idx/
    """

    embeddings: str | None = None
    """The --out folder of a finished `jobs.encode`, or a folder of clip-retrieval (img_emb/, metadata/)."""
    out: str
    """Folder for the index; a new build there takes over in one step, readers keep what they have open."""
    add: bool = False
    """Add to the index that is there, instead of taking its place; a picture whose id it has is left out."""
    compact: bool = False
    """Write the index at --out anew from its own vectors, without deleted ones, in full shards; --kind and --recall may change it."""
    retrain: bool = False
    """With --compact: train its lists anew, where it has drifted from what they were made for (see `llmvis inspect`)."""
    model: str | None = None
    """For a folder of clip-retrieval: the model that its vectors are of, as `jobs.encode` takes it."""
    image_root: str | None = None
    """For a folder of clip-retrieval: what its image_path starts from, to show pictures (default: the folder itself)."""
    kind: Literal["auto", "flat", "ivf_sq8", "ivf_rabitq"] = "auto"
    """flat: exact; ivf_sq8, ivf_rabitq: compressed to a byte or a bit a dimension, the best reranked exactly; auto: by rows and --memory; of an index that is there, its own."""
    memory: float | None = None
    """GB that searching may keep in memory (default: half of this machine's)."""
    recall: float | None = None
    """Recall@10 against exact search that an approximate index is tuned for; 1: exact (default: 0.97, or the index's own)."""
    num_cpus: int | None = None
    """CPUs to use when a local cluster is started (default: all)."""
    plot: str | None = None
    """Of an approximate index: draw recall against cost there, as PNG."""
    dry_run: bool = False
    """Print the plan and stop."""
    json: str | None = None
    """Write the report there too, as JSON."""

    def __post_init__(self) -> None:
        for file in (self.json, self.plot):
            check_file(file)
        if self.memory is not None and not self.memory > 0:
            raise UserError(f"--memory is {self.memory}; it is a number of GB, more than 0")
        if self.recall is not None and not 0 < self.recall <= 1:
            raise UserError(f"--recall is {self.recall}; it is a share: more than 0, at most 1")
        at_least(self, 1, "num_cpus")
        if (self.embeddings is None) != self.compact:
            raise UserError(
                "give --embeddings, what is to be indexed, or --compact for an index's own vectors"
            )
        if self.compact and (self.add or self.model or self.image_root):
            raise UserError(
                "--compact takes an index's own vectors: leave --add, --model and --image-root out"
            )
        if self.retrain and not self.compact:
            raise UserError("--retrain goes with --compact: a new build is trained in any case")


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Search an index by a text, by a picture, or by both, with things to avoid.

    For example:

      llmvis search --index idx/ "a red flower" -k 10

      llmvis search --index idx/ "a flower" --not red --not yellow --html page.html

      llmvis search --index idx/ --image rose.jpg "on a table" --text-weight 0.5 --json

      llmvis search --index idx/ "a flower" --where "width >= 512" --distinct 0.95 --offset 10
    """

    text: Annotated[str | None, tyro.conf.Positional] = None
    """What to look for, in words."""
    index: str
    """Folder that `jobs.index` made."""
    k: Annotated[int, tyro.conf.arg(aliases=["-k"])] = 10
    """How many pictures; as many come, if the index has them."""
    image: str | None = None
    """A picture to look for, alone or together with the text."""
    not_: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="not")] = ()
    """A text to stay away from; may be given several times."""
    text_weight: float = 1.0
    """How much the text counts, against --image-weight."""
    image_weight: float = 1.0
    """How much the picture counts, against --text-weight."""
    not_weight: float = 0.5
    """How much each --not text pushes away."""
    where: str | None = None
    """Only pictures whose metadata fulfil this: `width >= 512 and "rose" in caption`, `tag in ("a", "b")`, `caption is None`."""
    exact: bool = False
    """Compare with every vector, whatever the kind of the index."""
    offset: int = 0
    """Pass over so many of the best: `-k 20 --offset 20` is the second page."""
    distinct: float | None = None
    """Leave out a picture whose cosine with a better one is this or more, such as 0.95; the next one comes instead."""
    imagine: int = 0
    """Make so many pictures of the text first, and look for them too; off, since it does not help (see the README)."""
    imagine_weight: float = 0.5
    """How much they count, against --text-weight."""
    json: bool = False
    """Print a JSON list of hits: rank, id, score, path, caption, width, height, and your own columns."""
    html: str | None = None
    """Write a page with the pictures."""
    sheet: str | None = None
    """Write a contact sheet (PNG)."""
    model: str | None = None
    """Where the index's model lies on this machine, if not where it was encoded."""

    def __post_init__(self) -> None:
        at_least(self, 1, "k")
        at_least(self, 0, "imagine", "imagine_weight", "offset")
        check_distinct(self.distinct)
        if self.imagine and not self.text:
            raise UserError("--imagine makes pictures of a text: give one")
        for file in (self.html, self.sheet):
            check_file(file)


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Copy the pictures that answer a question out of an index's collections, as an imagefolder with metadata.jsonl.

    The files are copied as they are. `datasets.load_dataset("imagefolder", data_dir=…)` reads the result, and so does
    `jobs.encode`.

    For example:

      llmvis filter --index idx/ "a red flower" --out flowers/ --min-score 0.3

      llmvis filter --index idx/ "a flower" --not red --distinct 0.95 --most 200 --out flowers/
    """

    text: Annotated[str | None, tyro.conf.Positional] = None
    """What to look for, in words."""
    index: str
    """Folder that `jobs.index` made."""
    out: str
    """A new folder for the pictures; it appears whole or not at all."""
    image: str | None = None
    """A picture to look for, alone or together with the text."""
    not_: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="not")] = ()
    """A text to stay away from; may be given several times."""
    most: int = 1_000
    """The best so many, at most."""
    min_score: float | None = None
    """Only pictures with this cosine or more; what is a good one depends on the model: look with `llmvis search`."""
    where: str | None = None
    """Only pictures whose metadata fulfil this; see `llmvis search --help`."""
    distinct: float | None = None
    """Leave out a picture whose cosine with a better one is this or more, such as 0.95."""
    model: str | None = None
    """Where the index's model lies on this machine, if not where it was encoded."""

    def __post_init__(self) -> None:
        at_least(self, 1, "most")
        check_distinct(self.distinct)
        if self.min_score is not None and not -1 <= self.min_score <= 1:
            raise UserError(f"--min-score is {self.min_score}, but it is a cosine: give -1 to 1")


@dataclass(frozen=True, kw_only=True)
class ExportClipConfig:
    """Write the vectors of a finished `jobs.encode` as clip-retrieval does, for its back end, autofaiss or embedding-reader.

    For example:

      llmvis export-clip --embeddings enc/ --out clip/
    """

    embeddings: str
    """The --out folder of a finished `jobs.encode`."""
    out: str
    """A new folder for img_emb/ and metadata/; it appears whole or not at all."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Encode, index and search the packaged collection, translate and generate; leaves index.html to look at. Takes minutes, once.

    For example:

      llmvis demo --out demo
    """

    out: str = "demo"
    """Folder for everything that the demo makes."""
    k: int = 10
    """Pictures for each query."""

    def __post_init__(self) -> None:
        at_least(self, 1, "k")


def at_least(config: Any, least: float, *names: str) -> None:
    """Raises `UserError` for the first of these fields that holds less."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, int | float) and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least {least:g}")


def check_distinct(value: float | None) -> None:
    """Raises `UserError` unless this is None, or a cosine above 0."""
    if value is not None and not 0 < value <= 1:
        raise UserError(f"--distinct is {value}; it is a cosine: more than 0, at most 1")


def check_file(name: str | None) -> None:
    """Raises `UserError` unless a file can be made there: better before the work than after."""
    if name is not None and (Path(name).is_dir() or not Path(name).absolute().parent.is_dir()):
        raise UserError(f"{name} cannot be a file: give a file name in a folder that exists")


def parse(config: type[ConfigT], prog: str, args: Sequence[str] | None = None) -> ConfigT:
    """The command line as a `config`; `--config FILE.yaml` gives values that flags override.

    Exits with status 2 and a message on a wrong flag or a wrong key in the file. Raises
    `UserError` where a value is out of its range.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    file, given = early.parse_known_args(sys.argv[1:] if args is None else args)
    told = _from_yaml(config, file.config, given) if file.config else []
    note = "\n\n--config FILE.yaml takes any of these from a file, as `name: value`; flags override it."
    description = inspect.cleandoc(config.__doc__ or "") + note
    made: ConfigT = tyro.cli(config, prog=prog, args=[*told, *given], description=description)
    return made


def _from_yaml(config: type[Any], file: str, given: Sequence[str]) -> list[str]:
    """The file's values as flags, so that they are read and checked as flags are; none that `given` has."""
    try:
        values = yaml.safe_load(Path(file).read_text("utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold `name: value` lines")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    known = _flags(config)
    if wrong := sorted(values.keys() - known.keys()):
        raise UserError(f"{file}: unknown {', '.join(wrong)}; known: {', '.join(known)}")
    told, first = [], list[str]()
    for name, value in values.items():
        flag, no = (f"--{prefix}{name.replace('_', '-')}" for prefix in ("", "no-"))
        items = [str(item) for item in value] if isinstance(value, list) else [str(value)]
        if value is None or any(text.partition("=")[0] in (flag, no) for text in given):
            continue
        if "Positional" in known[name]:
            first += items
        elif isinstance(value, bool):
            told.append(flag if value else no)
        elif "UseAppendAction" in known[name] or not isinstance(value, list):
            told += [f"{flag}={item}" for item in items]
        else:
            told += [flag, *items]
    return [*first, *told]


def _flags(config: type[Any]) -> dict[str, str]:
    """Names of a config's flags, and how each is declared; those of a config in it stand among them."""
    hints = get_type_hints(config, include_extras=True)
    plain = get_type_hints(config)
    found: dict[str, str] = {}
    for field in fields(config):
        inner = plain[field.name]
        nested = isinstance(inner, type) and is_dataclass(inner)
        found |= _flags(inner) if nested else {field.name.rstrip("_"): repr(hints[field.name])}
    return found
