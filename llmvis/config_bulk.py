"""What the bulk jobs that make pictures can be told: translate, generate, data sets. See `config`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from llmvis.config import at_least, check_file
from llmvis.gates import GateConfig
from llmvis.schema import UserError


@dataclass(frozen=True, kw_only=True)
class TranslateConfig:
    """Translate a collection of pictures under instructions: one row for each picture, instruction and seed.

    Classic edits by text (grey, 20 % brighter, mirror, twice as large, crop square …) are exact and need no model;
    denoise, deblur and upscale 2x are done by a small network of their own, in the picture's own size; everything
    else goes to the model. Killed? Run the same command again and it goes on where it stopped.

    For example:

      python -m jobs.translate --images sketches/ --instruction "colour the drawing" --out out/

      python -m jobs.translate --images photos/ --instruction "grey" --instruction "mirror and 20 % brighter" --out out/

      python -m jobs.translate --images scans/ --instruction denoise --instruction "upscale 2x" --out out/

      python -m jobs.translate --images faces/ --mask masks/ --instruction "a red hat" --seeds 0 1 2 --out out/
    """

    images: str
    """A folder, an imagefolder, Parquet files, or `emoji`, as `jobs.encode` takes them."""
    out: str
    """Folder for the result: data/*.parquet with pictures, README.md, contact-sheet.png, dead/, manifest.json, report.json."""
    instruction: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """What to do; may be given several times: each picture is made under each."""
    instruction_column: str | None = None
    """Parquet or imagefolder: a column that holds each picture's own instruction."""
    seeds: tuple[int, ...] = (0,)
    """One result for each; they differ only where chance has a part: --steps above 1, masks."""
    mask: str | None = None
    """Change only a region: a folder of masks (white is changed) named as the pictures, or a Parquet collection's mask column."""
    region: str | None = None
    """Change only the region that these words point at in each picture, by the retrieval model's saliency."""
    model: str | None = None
    """A folder that jobs.train made, or a diffusers image-to-image pipeline by folder or Hugging Face name (default: the packaged model). A folder's restorer/ enhances, where it has one; else the packaged one."""
    steps: int | None = None
    """Steps of sampling; 1 is faithful and soft (default: the model's own)."""
    guidance: float | None = None
    """How hard to pull towards the words (default: the model's own)."""
    temperature: float | None = None
    """Of sampling (default: the model's own)."""
    strength: float | None = None
    """How far a diffusers pipeline may leave the picture, 0 … 1."""
    cutout: bool = False
    """Cut the results out of their white ground: RGBA with a clean alpha."""
    assets: Literal["gltf"] | None = None
    """Also write scene.glb: the pictures as textured cards standing in a row (at most 512)."""
    image_column: str | None = None
    """Parquet: column with bytes, image structs or paths."""
    caption_column: str | None = None
    """Parquet or imagefolder: column with the caption; `{caption}` in an instruction stands for it."""
    image_root: str | None = None
    """Parquet with a path column: folder that the paths start from; none may leave it."""
    max_pixels: int = 89_478_485
    """A picture with more is a dead letter, unread."""
    max_bytes: int = 268_435_456
    """A file with more bytes is a dead letter, undecoded."""
    dry_run: bool = False
    """Print the plan and stop; nothing is written and no cluster started."""
    actors: int | None = None
    """Copies of the model that work at a time (default: one a GPU, or one a CPU)."""
    gpus_per_actor: float | None = None
    """GPUs for each copy, also a fraction; 0 keeps the model on CPUs (default: 1 where there are GPUs)."""
    num_cpus: int | None = None
    """CPUs to use when a local cluster is started (default: all)."""
    shard_items: int = 128
    """Results in a shard, the unit of retry and resume."""
    timeout: float = 1800.0
    """Seconds for a shard in one stage; a worker that takes longer is taken to hang, and its items are done one by one."""
    json: str | None = None
    """Write the report there too, as JSON."""

    def __post_init__(self) -> None:
        at_least(self, 1, "max_pixels", "max_bytes", "actors", "num_cpus", "shard_items")
        at_least(self, 0, "gpus_per_actor")
        at_least(self, 1, "timeout")
        check_file(self.json)
        if bool(self.instruction) == (self.instruction_column is not None):
            raise UserError("give --instruction (several times if you like), or --instruction-column")
        for text in self.instruction:
            if not text.strip():
                raise UserError("an --instruction is empty: say what is to be done")
            if unknown := set(re.findall(r"\{(\w+)\}", text)) - {"caption"}:
                raise UserError(
                    f"--instruction {text!r}: {{{min(unknown)}}} stands for nothing; only {{caption}} does"
                )
        if not self.seeds:
            raise UserError("give at least one of --seeds")
        if self.mask and self.region:
            raise UserError("give --mask or --region, not both")
        if self.region is not None and not self.region.strip():
            raise UserError("--region is empty: name what is to be changed, such as 'the handle'")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Make pictures from prompts: one row for each prompt and seed.

    Killed? Run the same command again and it goes on where it stopped.

    For example:

      python -m jobs.generate --prompts prompts.txt --variants 4 --out out/

      python -m jobs.generate --prompts "a {colour} {thing}, Noto emoji" --fill colour=red,blue --fill thing=apple,star --out out/

      python -m jobs.generate --prompts rows.parquet --prompt-column text --negative "blurred" --out out/
    """

    prompts: str
    """A .txt file (a prompt a line), .csv, .jsonl or .parquet with a column `prompt` (and `negative`, `seed` if you like), or a prompt itself."""
    out: str
    """Folder for the result: data/*.parquet with pictures, README.md, contact-sheet.png, dead/, manifest.json, report.json."""
    variants: int = 1
    """Pictures of each prompt, with the seeds --seed, --seed + 1, …"""
    seed: int = 0
    """The first seed."""
    negative: str | None = None
    """What to stay away from, for prompts that have no `negative` of their own."""
    fill: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """`name=first,second,…`: `{name}` in a prompt stands for each of them in turn; may be given several times."""
    prompt_column: str | None = None
    """The column that holds the prompts (default: prompt, text or caption)."""
    model: str | None = None
    """A folder that jobs.train made, or a diffusers text-to-image pipeline by folder or Hugging Face name (default: the packaged model)."""
    reference: float | None = None
    """Share of the nearest known drawing's code words to begin from, 0 … 1; 0 makes pictures from words alone (default: the model's own; packaged model only)."""
    steps: int | None = None
    """Steps of sampling (default: the model's own)."""
    guidance: float | None = None
    """How hard to pull towards the words (default: the model's own)."""
    temperature: float | None = None
    """Of sampling (default: the model's own)."""
    cutout: bool = False
    """Cut the results out of their white ground: RGBA with a clean alpha."""
    assets: Literal["gltf"] | None = None
    """Also write scene.glb: the pictures as textured cards standing in a row (at most 512)."""
    dry_run: bool = False
    """Print the plan and stop; nothing is written and no cluster started."""
    actors: int | None = None
    """Copies of the model that work at a time (default: one a GPU, or one a CPU)."""
    gpus_per_actor: float | None = None
    """GPUs for each copy, also a fraction; 0 keeps the model on CPUs (default: 1 where there are GPUs)."""
    num_cpus: int | None = None
    """CPUs to use when a local cluster is started (default: all)."""
    shard_items: int = 32
    """Pictures in a shard, the unit of retry and resume."""
    timeout: float = 1800.0
    """Seconds for a shard in one stage; a worker that takes longer is taken to hang, and its items are done one by one."""
    json: str | None = None
    """Write the report there too, as JSON."""

    def __post_init__(self) -> None:
        at_least(self, 1, "variants", "actors", "num_cpus", "shard_items")
        at_least(self, 0, "gpus_per_actor")
        at_least(self, 1, "timeout")
        check_file(self.json)

    @property
    def lists(self) -> dict[str, list[str]]:
        """`fill` as lists. Raises `UserError` for what is no `name=first,second`."""
        found = {}
        for text in self.fill:
            name, mark, values = text.partition("=")
            texts = [value.strip() for value in values.split(",") if value.strip()]
            if not mark or not name.isidentifier() or not texts:
                raise UserError(f"--fill {text!r}: write name=first,second")
            found[name] = texts
        return found


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Make a data set of what translate and generate jobs made: scored, through quality gates, in a form others read.

    By default blank pictures and exact copies go; each other gate is off until it is given. What goes is a dead
    letter with its reason, so that the ledger balances.

    For example:

      python -m jobs.dataset --made out/ --out set/

      python -m jobs.dataset --made out/ more/ --best 2 --min-score 0.2 --near-duplicates 0.97 --out set/

      python -m jobs.dataset --made out/ --format webdataset --out shards/
    """

    made: tuple[str, ...]
    """The --out folders of finished translate, generate or dataset jobs."""
    out: str
    """Folder for the data set: data/, README.md, contact-sheet.png, dead/, manifest.json; work/ has the scores."""
    format: Literal["parquet", "webdataset", "imagefolder"] = "parquet"
    """Parquet that `datasets` shows as pictures, tars for webdataset, or pictures with metadata.jsonl."""
    gates: tyro.conf.OmitArgPrefixes[GateConfig] = field(default_factory=GateConfig)
    """Which pictures stay."""
    index: str | None = None
    """The index that --in-index compares with, made with the same model."""
    model: str | None = None
    """The encoder that scores; default: the packaged two-tower model."""
    licence: str = "unknown"
    """Licence of the pictures, for the card: that of their sources and of the model decide."""
    dry_run: bool = False
    """Print the plan and stop; nothing is written and no cluster started."""
    actors: int | None = None
    """Copies of the encoder that work at a time (default: one a GPU, or one a CPU)."""
    gpus_per_actor: float | None = None
    """GPUs for each copy, also a fraction; 0 keeps the model on CPUs (default: 1 where there are GPUs)."""
    num_cpus: int | None = None
    """CPUs to use when a local cluster is started (default: all)."""
    shard_items: int = 256
    """Pictures in a shard: a file of the data set, and the unit of retry and resume."""
    timeout: float = 1800.0
    """Seconds for a shard in one stage; a worker that takes longer is taken to hang, and its items are done one by one."""
    json: str | None = None
    """Write the report there too, as JSON."""

    def __post_init__(self) -> None:
        at_least(self, 1, "actors", "num_cpus", "shard_items")
        at_least(self, 0, "gpus_per_actor")
        at_least(self, 1, "timeout")
        check_file(self.json)
        if (self.index is None) != (self.gates.in_index is None):
            raise UserError("--index and --in-index go together: which index, and how near is too near")


@dataclass(frozen=True, kw_only=True)
class BatchSearchConfig:
    """Search an index with many queries: texts, vectors, encoded pictures, or the index's own pictures.

    One row a query, with its hits and all columns of its own file. Killed? Run the same command again and it goes on
    where it stopped. Without --queries the index's pictures are the queries, each without itself; with
    --near-duplicates they are gathered into groups of near-same pictures: duplicates.parquet and duplicates.png say
    which, redundant.txt has the ids of all but the first of each group.

    For example:

      python -m jobs.search --queries queries.csv --index idx/ --out hits/ -k 20

      python -m jobs.search --queries enc/ --index idx/ --out hits/ --min-score 0.8

      python -m jobs.search --index idx/ --out neighbours/ -k 10

      python -m jobs.search --near-duplicates 0.95 --index idx/ --out copies/
    """

    index: str
    """Folder that `jobs.index` made."""
    out: str
    """Folder for the result: data/*.parquet with a row a query, dead/, manifest.json, report.json."""
    queries: str | None = None
    """A .txt file (a text a line), .csv, .jsonl or .parquet with a column of texts; Parquet files with a column of vectors; the --out of `jobs.encode`; or an index (default: --index itself)."""
    text_column: str | None = None
    """The column of texts (default: prompt, text or caption)."""
    vector_column: str | None = None
    """Parquet: the column of vectors (default: embedding, where there are no texts)."""
    k: Annotated[int | None, tyro.conf.arg(aliases=["-k"])] = None
    """Hits of each query (default: 10; 64 with --near-duplicates)."""
    where: str | None = None
    """Only pictures whose metadata fulfil this are found; see `llmvis search --help`."""
    exact: bool = False
    """Compare with every vector, whatever the kind of the index."""
    min_score: float | None = None
    """Leave out hits with a lower cosine; a query may then have fewer, or none."""
    near_duplicates: float | None = None
    """Find groups of pictures with this cosine or more, such as 0.95. A picture with more than -k near-same ones is linked to the rest through them, or not at all."""
    model: str | None = None
    """Where the index's model lies, if not where it was encoded; only texts need it."""
    dry_run: bool = False
    """Print the plan and stop; nothing is written and no cluster started."""
    actors: int | None = None
    """Searches that run at a time, each with a copy of the model where there are texts (default: one a GPU, or one a CPU)."""
    gpus_per_actor: float | None = None
    """GPUs for each model, also a fraction; 0 keeps it on CPUs (default: 1 where there are texts and GPUs)."""
    num_cpus: int | None = None
    """CPUs to use when a local cluster is started (default: all)."""
    shard_items: int = 512
    """Queries in a shard: searched at once, and the unit of retry and resume."""
    timeout: float = 1800.0
    """Seconds for a shard in one stage; a worker that takes longer is taken to hang, and its items are done one by one."""
    json: str | None = None
    """Write the report there too, as JSON."""

    def __post_init__(self) -> None:
        at_least(self, 1, "k", "actors", "num_cpus", "shard_items")
        at_least(self, 0, "gpus_per_actor")
        at_least(self, 1, "timeout")
        check_file(self.json)
        for name in ("min_score", "near_duplicates"):
            value = getattr(self, name)
            if value is not None and not -1 <= value <= 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}, but it is a cosine: give -1 to 1")
        if self.near_duplicates is not None:
            for name in ("queries", "where", "min_score"):
                if getattr(self, name) is not None:
                    raise UserError(
                        f"--near-duplicates compares all pictures of --index: leave --{name.replace('_', '-')} out"
                    )

    @property
    def hits(self) -> int:
        """`k`, or what stands for it."""
        return self.k or (10 if self.near_duplicates is None else 64)


@dataclass(frozen=True, kw_only=True)
class SeedsConfig:
    """A step of a loop: copy the pictures that answer queries out of an index."""

    index: str
    """Folder that `jobs.index` made."""
    queries: tuple[str, ...]
    """What to look for, in words."""
    k: int = 24
    """Pictures for each query; one that answers several is copied once."""
    out: str
    """Folder for the pictures."""

    def __post_init__(self) -> None:
        at_least(self, 1, "k")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Run a file of jobs, each on what the ones before it made; run again, it goes on where it stopped.

    The README has a file for the whole circle: search an index, translate and generate from what was found, judge,
    make a data set, encode it, and add it to the index.

    For example:

      python -m jobs.loop --steps circle.yaml --dry-run

      python -m jobs.loop --steps circle.yaml
    """

    steps: str
    """A YAML file with `out:` and `steps:`; in it `@name` stands for the output of an earlier step."""
    dry_run: bool = False
    """Print the plan of all steps, with rows and bytes, and stop."""
    num_cpus: int | None = None
    """CPUs to use when a local cluster is started (default: all)."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_cpus")
