"""An image tokeniser's folder: `config.json` and `model.safetensors` (fp16)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from llmvis.models.files import fit_tensors, make_config, read_json, read_tensors
from llmvis.models.tokenizer import ImageTokenizer, TokenizerConfig
from llmvis.schema import UserError

MODEL_TYPE = "llmvis-image-tokenizer"


def save_tokenizer(model: ImageTokenizer, folder: Path) -> None:
    """Writes both files; weights as fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": MODEL_TYPE, **asdict(model.config)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: t.detach().cpu().half().contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")


def load_tokenizer(folder: Path | str, device: str = "cpu") -> ImageTokenizer:
    """The tokeniser of a folder, ready to use; raises `UserError` where there is none."""
    path = Path(folder)
    told = read_json(path / "config.json", "image tokeniser")
    if told.pop("model_type", None) != MODEL_TYPE:
        raise UserError(
            f"{path / 'config.json'} is not of an image tokeniser: train one with --stage tokenize"
        )
    model = ImageTokenizer(make_config(TokenizerConfig, told, path / "config.json"))
    file = path / "model.safetensors"
    fit_tensors(model, read_tensors(file), file)
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval()


def encoder_digest(model: ImageTokenizer) -> str:
    """Of a tokeniser's encoder: which code words it makes. What was made for others has another digest."""
    total = hashlib.sha256(repr(model.config).encode())
    for tensor in model.encoder.state_dict().values():
        total.update(tensor.detach().half().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:12]
