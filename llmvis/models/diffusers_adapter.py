"""A diffusers pipeline, by folder or Hugging Face name → what the driver plans with, or the pipeline itself.

`describe` reads files only and imports neither torch nor diffusers; `load` gives the pipeline,
in the actor that runs it. `model_index.json` says what a pipeline is put together from.

Security: weights are read from safetensors only, and no folder's own code is ever run.
It does not know how a pipeline is run (diffusers_pipeline.py).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from llmvis.models.files import PICKLED
from llmvis.models.load import licence_of, locate
from llmvis.models.load_synthesis import MakeOptions
from llmvis.models.protocols import Generator, SynthesisInfo, Translator
from llmvis.schema import UserError
from llmvis.storage import sha256_file

INDEX = "model_index.json"
Parts = dict[str, tuple[str, str]]
"""A pipeline's parts: folder → the library and the class that read it."""

_ADAPTER = "diffusers-1 float32"
"""Part of the fingerprint: change it when the adapter makes other pictures of the same files."""
_SETTINGS = ("*.json", "*.txt", "*.model")
_WANTED = (INDEX, "README.md", *(f"*/{pattern}" for pattern in (*_SETTINGS, "*.safetensors")))
_UNWANTED = ("*.fp16*", "*.bf16*", "*.non_ema*")  # second copies of the weights, never read
_DEFAULT_CELLS = 128
"""Side in latent cells of Transformers that state no sample_size (FLUX and kin), as diffusers has it."""


def describe(name: str, options: MakeOptions, task: str) -> SynthesisInfo:
    """What the driver plans `task` ("translate" or "generate") with; reads every byte of the weights once.

    `side` is the size in pixels that the pipeline was trained for: latent cells × the VAE's scale.

    Raises:
        UserError: no such pipeline, no connection, no diffusers, an option that pipelines don't have,
            weights not in safetensors, code in the folder, or a kind of pipeline that can't be
            served; with what to do.
    """
    _check_options(options, task)
    folder, title = _locate(name)
    parts = parts_of(folder)
    total = hashlib.sha256(f"{_ADAPTER} {task} {sorted(options.given().items())}".encode())
    for file in _files(folder, parts):
        total.update(f"\n{file.relative_to(folder).as_posix()} {sha256_file(file)}".encode())
    return SynthesisInfo(
        name=title, fingerprint=total.hexdigest(), side=_side(folder, parts), licence=licence_of(folder)
    )


def load(
    name: str, options: MakeOptions, task: str, info: SynthesisInfo, device: str
) -> Translator | Generator:
    """The pipeline of `describe`, on a torch device: a `Translator` or a `Generator`, as `task` says.

    Raises:
        UserError: as `describe`; or the pipeline does not do `task`, does not take an option,
            or its weights are not whole.
    """
    folder, _ = _locate(name)
    from llmvis.models import diffusers_pipeline

    kind = diffusers_pipeline.KINDS[task]
    return kind(folder, parts_of(folder), info, options, device)


def parts_of(folder: Path) -> Parts:
    """The parts that model_index.json names, each proved to be there, and without code of its own."""
    index = _read(folder / INDEX)
    program = next(folder.rglob("*.py"), None)
    if program is not None or not isinstance(index.get("_class_name"), str):
        raise UserError(
            f"{folder} comes with program code of its own ({program.name if program else 'see ' + INDEX}), which "
            "llmvis never runs; give a pipeline of diffusers' own classes, saved by save_pretrained"
        )
    parts: Parts = {}
    for part, value in index.items():
        if not isinstance(value, list) or len(value) != 2 or not all(isinstance(v, str) for v in value):
            continue  # a setting, or a part that was left out: [null, null]
        library, kind = value
        if library not in ("diffusers", "transformers") and not (_pipelines() / library).is_dir():
            raise UserError(
                f"{folder / INDEX} takes {part} from {library!r}, which is no part of diffusers or transformers "
                "here; llmvis runs no other code. If a newer diffusers has it: pip install -U diffusers"
            )
        if not (folder / part).is_dir():
            raise UserError(f"{folder} lacks the folder {part}, which {INDEX} names; copy it again")
        parts[part] = (library, kind)
    for part in parts:
        if (folder / part / "config.json").is_file():
            weights_of(folder / part)
    return parts


def weights_of(part: Path) -> list[Path]:
    """The safetensors files with a part's weights: one, or the shards that an index names.

    Raises:
        UserError: none, a shard that is missing, or only pickles.
    """
    found = [file for file in part.glob("*.safetensors") if file.stem in ("model", "diffusion_pytorch_model")]
    for index in sorted(part.glob("*.safetensors.index.json")):
        if index.name.count(".") > 3:
            continue  # of another variant: .index.fp16.json, .fp16.safetensors.index.json
        for shard in sorted(set(_read(index)["weight_map"].values())):
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise UserError(
                    f"{index} names {shard!r}; llmvis reads safetensors beside it, and nothing else"
                )
            if not (part / shard).is_file():
                raise UserError(f"{part} lacks {shard}, which {index.name} names; copy it again")
            found.append(part / shard)
    if found:
        return sorted(found)
    pickled = sorted(file.name for pattern in PICKLED for file in part.glob(pattern))
    if pickled:
        raise UserError(
            f"{part} has its weights only as {', '.join(pickled)}: pickle, which can run code when it is opened, "
            "so llmvis never reads it. If you trust the file, save the pipeline as safetensors, once, on a "
            "machine without secrets: DiffusionPipeline.from_pretrained(folder, use_safetensors=False)"
            ".save_pretrained(new_folder). Many hub models also have a pull request that adds safetensors"
        )
    raise UserError(
        f"{part} has no model.safetensors or diffusion_pytorch_model.safetensors (weights of a variant such as "
        "fp16 are not read); give a folder saved by save_pretrained without a variant"
    )


def _check_options(options: MakeOptions, task: str) -> None:
    for option in ("temperature", "reference"):
        if getattr(options, option) is not None:
            raise UserError(
                f"--{option} is not of diffusers pipelines; they take --steps, --guidance and, to translate, --strength"
            )
    if options.strength is not None and task != "translate":
        raise UserError("--strength says how far a translation may leave its source; here is no source")
    if options.steps is not None and options.strength is not None:
        check_steps(options.steps, options.strength)


def check_steps(steps: int, strength: float) -> None:
    """Raises `UserError` where a translation would not take a single step: it takes steps × strength of them."""
    if int(steps * strength) < 1:
        raise UserError(
            f"--steps {steps} at a strength of {strength:g} leaves no step to take; give more --steps or --strength"
        )


def _locate(name: str) -> tuple[Path, str]:
    """The pipeline's folder, downloaded if need be, and its name for manifests."""
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / INDEX).is_file():
        raise UserError(
            f"{folder} holds no model to make pictures with: neither language/config.json, which jobs.train "
            f"writes, nor {INDEX}, which a diffusers pipeline's save_pretrained writes"
        )
    if importlib.util.find_spec("diffusers") is None:
        what = (
            "is a diffusers pipeline"
            if folder.is_dir()
            else "is no folder here, but may be a pipeline's name"
        )
        raise UserError(f"{name!r} {what}; to run those: pip install 'llmvis[diffusers]', on every node")
    return locate(name, _WANTED, _UNWANTED)


def _pipelines() -> Path:
    """The folder of diffusers' pipelines, found without importing it."""
    spec = importlib.util.find_spec("diffusers")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "pipelines"


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"there is no {file}; copy the pipeline again") from None
    except ValueError as e:
        raise UserError(f"{file} is not JSON: {e}; copy the pipeline again") from e
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object; copy the pipeline again")
    return content


def _files(folder: Path, parts: Parts) -> list[Path]:
    """All that decides the pictures: configurations, tokenizers and weights of the parts that are read."""
    found = {folder / INDEX}
    for part in parts:
        found |= {file for pattern in _SETTINGS for file in (folder / part).glob(pattern)}
        if (folder / part / "config.json").is_file():
            found |= set(weights_of(folder / part))
    return sorted(found)


def _side(folder: Path, parts: Parts) -> int:
    """Pixels along a picture's side, by configuration: sample_size in latent cells × the VAE's scale."""
    model = next((part for part in ("transformer", "unet") if part in parts), None)
    if model is None or "vae" not in parts:
        raise UserError(
            f"{folder} is a pipeline of {', '.join(parts)}; llmvis runs those with a vae and a unet or "
            "transformer, such as Stable Diffusion, SDXL, SD 3, PixArt, Sana and FLUX"
        )
    settings, vae = _read(folder / model / "config.json"), _read(folder / "vae" / "config.json")
    taken, given = settings.get("in_channels", 4), vae.get("latent_channels", 4)
    if model == "unet" and taken != given:
        raise UserError(
            f"{folder}: its unet takes {taken} channels where its vae gives {given}: a model that is only for "
            "inpainting, upscaling or editing. Give the text-to-image model that it was made from"
        )
    cells = settings.get("sample_size", None if model == "unet" else _DEFAULT_CELLS)
    cells = max(cells) if isinstance(cells, list) else cells
    if not isinstance(cells, int):
        raise UserError(
            f"{folder / model / 'config.json'} states no sample_size; write it there, in latent cells"
        )
    for key, halvings in (
        ("block_out_channels", -1),
        ("encoder_block_out_channels", -1),
        ("temperal_downsample", 0),
    ):
        if isinstance(vae.get(key), list):
            return int(cells * 2 ** (len(vae[key]) + halvings))
    raise UserError(f"{folder / 'vae' / 'config.json'} states no block_out_channels; its scale can't be told")
