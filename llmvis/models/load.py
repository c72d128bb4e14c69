"""A model's name or folder → what the driver needs to know of it, or the model itself.

`describe_encoder` reads files only and imports no torch: a driver plans with it in little
memory. `load_encoder` gives the model, in the actor that runs it, and proves that it is
what was described. Names: None or "llmvis/two-tower" for the packaged model, a local
folder, or a Hugging Face name ("google/siglip2-base-patch16-224").

Security: weights are read from safetensors only, and no checkpoint's own code is ever run.
It does not know how a model works inside (adapters.py, two_tower.py), Ray, or images.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from llmvis.models.files import check_weights
from llmvis.models.processor import EncoderError, ProcessorPreprocess
from llmvis.models.protocols import Encoder, EncoderInfo
from llmvis.schema import UserError

BUILT_IN = "llmvis/two-tower"
TWO_TOWER = "llmvis-two-tower"
"""`model_type` in the config.json of a folder with a two-tower model of ours."""

DType = Literal["float32", "bfloat16", "float16"]

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
_SETTINGS = (
    *("config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model"),
)
_WANTED = (*_WEIGHTS, *_SETTINGS, "README.md")
_VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model")
_ADAPTER = "transformers-1"
"""Part of the fingerprint: change it when the adapter gives other embeddings for the same files."""

_PROJECTION = {
    "aimv2": 512,
    "align": 640,
    "altclip": 768,
    "chinese_clip": 512,
    "clip": 512,
    "clipseg": 512,
    "flava": 768,
    "groupvit": 256,
    "metaclip_2": 512,
    "vision-text-dual-encoder": 512,
}  # transformers' default `projection_dim`, where config.json leaves it out
_VISION_WIDTH = {"siglip": 768, "siglip2": 768}  # no projection: as wide as the vision tower


def describe_encoder(name: str | None = None) -> EncoderInfo:
    """What the driver plans with: dimension, fingerprint, preprocessing. Imports no torch.

    Reads every byte of the weights once, for the fingerprint. A Hugging Face name is
    downloaded to the usual cache if it is not there.

    Raises:
        EncoderError: no such model, no connection, weights not in safetensors, or a kind of
            model or image processor that the adapter can't serve; with what to do.
    """
    if name in (None, BUILT_IN):
        from llmvis.models.two_tower_info import describe_two_tower

        return describe_two_tower()
    folder, title = locate(str(name), _WANTED)
    config = _read_config(folder)
    if config.get("model_type") == TWO_TOWER:
        from llmvis.models.two_tower_info import describe_two_tower

        return describe_two_tower(folder)
    _check_weights(folder)
    if not any(file for pattern in _VOCABULARY for file in folder.glob(pattern)):
        # transformers would make up a vocabulary of three words and say nothing
        raise EncoderError(
            f"{folder} has no tokenizer (tokenizer.json, vocab.json, vocab.txt or spiece.model); "
            "save the model's own there: AutoTokenizer.from_pretrained(…).save_pretrained(folder)"
        )
    return EncoderInfo(
        name=title,
        fingerprint=_fingerprint(folder),
        dim=_dimension(config, folder),
        preprocess=ProcessorPreprocess.from_folder(folder, str(config.get("model_type", ""))),
        licence=licence_of(folder),
    )


def load_encoder(
    name: str | None = None, *, device: str = "cpu", dtype: DType = "float32", threads: int | None = None
) -> Encoder:
    """Load an encoder onto a device.

    Args:
        name: None for the packaged model, a local folder, or a Hugging Face name.
        device: a torch device, "cpu" or "cuda" or "cuda:1"; "auto" is CUDA where there is any.
        dtype: of a transformers model's weights and arithmetic; embeddings are float32 and
            normalised in float32 in any case. Half precision is meant for CUDA, where it
            has not been run yet. The packaged model ignores it.
        threads: of this process, for torch on CPUs; None leaves torch's own choice.

    Raises:
        EncoderError: as `describe_encoder`, or the loaded model differs from its description.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if name in (None, BUILT_IN):
        from llmvis.models.two_tower import load_two_tower

        return load_two_tower(device=device)
    folder, _ = locate(str(name), _WANTED)
    if _read_config(folder).get("model_type") == TWO_TOWER:
        from llmvis.models.two_tower import load_two_tower

        return load_two_tower(folder, device=device)
    from llmvis.models.adapters import TransformersEncoder

    return TransformersEncoder(folder, describe_encoder(name), device=device, dtype=dtype)


def locate(name: str, wanted: Sequence[str], unwanted: Sequence[str] = ()) -> tuple[Path, str]:
    """The folder that holds a model, and the name to keep in manifests.

    wanted, unwanted: patterns of the files to download, where `name` is a Hugging Face name.
    Raises `EncoderError` where there is none, or the hub can't be reached; with what to do.
    """
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return folder.resolve(), str(folder.resolve())
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise EncoderError(f"no folder {name!r}; give a folder with a model in it, or a Hugging Face name")
    return _download(name, wanted, unwanted), name


def _download(name: str, wanted: Sequence[str], unwanted: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=list(wanted), ignore_patterns=list(unwanted)))
    except HFValidationError as e:
        raise EncoderError(f"{name!r} is neither a folder here nor a Hugging Face name") from e
    except HfHubHTTPError as e:
        raise EncoderError(
            f"Hugging Face refused {name!r}: {' '.join(str(e).split())[:300]}. "
            "Check the name; for a gated model, accept its terms and run `hf auth login`"
        ) from e
    except OSError as e:  # no connection and not in the cache; httpx's errors come as these, too
        raise EncoderError(
            f"{name!r} is no folder here and not in the Hugging Face cache, and the hub can't be reached "
            f"({' '.join(str(e).split())[:120]}). Where it can be, run "
            f"`hf download {name} --local-dir model`, copy the folder to every node, and give its path"
        ) from e


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise EncoderError(f"{folder} has no config.json; give a folder saved by save_pretrained") from None
    except ValueError as e:
        raise EncoderError(f"{file} is not JSON: {e}") from e
    if not isinstance(config, dict):
        raise EncoderError(f"{file} holds no JSON object")
    return config


def _check_weights(folder: Path) -> None:
    """Raises `EncoderError` where a folder has no weights in safetensors."""
    try:
        check_weights(folder)
    except UserError as error:
        raise EncoderError(str(error)) from None


def _dimension(config: dict[str, Any], folder: Path) -> int:
    """D by configuration alone; the loaded model must agree (adapters.py checks)."""
    kind = str(config.get("model_type", ""))
    if kind in _VISION_WIDTH:
        return int((config.get("vision_config") or {}).get("hidden_size", _VISION_WIDTH[kind]))
    dim = config.get("projection_dim") or _PROJECTION.get(kind)
    if dim is None:
        raise EncoderError(
            f"{folder / 'config.json'}, model_type {kind!r}, states no projection_dim; llmvis reads models "
            "with one text and one image embedding, such as "
            + ", ".join(sorted([*_PROJECTION, *_VISION_WIDTH]))
        )
    return int(dim)


def _fingerprint(folder: Path) -> str:
    """sha256 over name and content of weights, configuration, tokenizer and processor."""
    files = {f for pattern in (*_WEIGHTS, *_SETTINGS) for f in folder.glob(pattern) if f.is_file()}
    total = hashlib.sha256(_ADAPTER.encode())
    for file in sorted(files):
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        total.update(f"\n{file.name} {digest}".encode())
    return total.hexdigest()


def licence_of(folder: Path) -> str:
    """`license:` of the model card's front matter."""
    card = folder / "README.md"
    if not card.is_file():
        return "unknown"
    front = card.read_text("utf-8", errors="replace")[:5000].split("\n---")[0]
    found = re.search(r"^license:\s*([\w.\-]+)\s*$", front, re.MULTILINE)
    return found[1] if found else "unknown"
