"""What all loaders of a model's folder share, since the folder may come from anyone.

Weights are read from safetensors only, a checkpoint's own program is never run, and a config has
the keys that its model knows: anything else is refused with words. No torch until tensors are asked
for; knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llmvis.schema import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def open_pretrained(door: Any, folder: Path, **options: Any) -> Any:
    """`door.from_pretrained(folder)` of a transformers class, which may use its own classes and no others.

    Raises `UserError` where the folder asks for program code of its own, or can't be read.
    """
    from safetensors import SafetensorError

    try:
        return door.from_pretrained(folder, trust_remote_code=False, **options)
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        said = " ".join(str(error).split())
        if "trust_remote_code" in said:
            said = "it wants to run program code of its own (auto_map), which llmvis never does"
        raise UserError(
            f"{folder} can't be opened: {said[:300]}; give a folder saved by save_pretrained, of a class that "
            "transformers has"
        ) from error


def check_weights(folder: Path) -> None:
    """Raises `UserError` where a folder has no safetensors, or an index that names anything else."""
    if (folder / WEIGHTS).is_file():
        return
    index = folder / INDEX
    if index.is_file():
        named = read_json(index).get("weight_map")
        shards = {str(shard) for shard in named.values()} if isinstance(named, dict) else {""}
        for shard in shards:
            if Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise UserError(
                    f"{index} names {shard!r}; llmvis reads safetensors beside it, and nothing else"
                )
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing:
            raise UserError(f"{folder} lacks {', '.join(missing)}, which {index.name} names; copy it again")
        return
    pickled = sorted(f.name for pattern in PICKLED for f in folder.glob(pattern))
    if pickled:
        raise UserError(
            f"{folder} has its weights only as {', '.join(pickled)}: pickle, which can run code when it "
            "is opened, so llmvis never reads it. If you trust the file, save it as safetensors, once, on a "
            "machine without secrets: AutoModel.from_pretrained(folder, use_safetensors=False)"
            ".save_pretrained(new_folder), and AutoProcessor likewise. Many hub models also have a pull "
            "request that adds model.safetensors"
        )
    raise UserError(f"{folder} has no model.safetensors; give a folder saved by save_pretrained")


def read_json(file: Path, what: str = "model") -> dict[str, Any]:
    """A JSON object. Raises `UserError`, which names `what` is missing, where there is none."""
    try:
        told = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file.parent} holds no {what}: {file.name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file.parent} holds no {what}: {file.name} is not JSON: {str(error)[:200]}"
        ) from error
    if not isinstance(told, dict):
        raise UserError(f"{file} holds no JSON object")
    return told


def make_config(kind: type[T], told: Mapping[str, Any], file: Path) -> T:
    """A config's dataclass from what its file says; lists become tuples.

    Raises `UserError` where a key is not of that config, or is missing.
    """
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}
    try:
        return kind(**values)
    except TypeError as error:
        raise UserError(
            f"{file} does not fit this version ({str(error)[:200]}); give a folder that jobs.train wrote"
        ) from error


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file. Raises `UserError` where there is none or it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        pickled = sorted(f.name for pattern in PICKLED for f in file.parent.glob(pattern))
        beside = f"; {', '.join(pickled)} beside it is pickle, which llmvis never opens" if pickled else ""
        raise UserError(f"{file} is missing{beside}: give a folder that jobs.train wrote")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is no whole safetensors file ({str(error)[:200]}); copy it again") from error


def fit_tensors(model: nn.Module, tensors: Mapping[str, Tensor], file: Path, *, strict: bool = True) -> None:
    """Puts tensors into a model, floating-point ones as float32. Raises `UserError` where they are another's."""
    whole = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    try:
        model.load_state_dict(whole, strict=strict)
    except RuntimeError as error:
        raise UserError(
            f"{file} does not fit the config.json beside it: {' '.join(str(error).split())[:300]}"
        ) from error
