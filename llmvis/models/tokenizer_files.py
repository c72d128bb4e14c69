"""An image tokeniser's folder: `config.json` and `model.safetensors` (fp16)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

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
    try:
        told = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} holds no image tokeniser: {error}") from error
    if told.pop("model_type", None) != MODEL_TYPE:
        raise UserError(
            f"{path / 'config.json'} is not of an image tokeniser: train one with --stage tokenize"
        )
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}
    config = TokenizerConfig(**values)
    model = ImageTokenizer(config)
    model.load_state_dict({name: t.float() for name, t in load_file(path / "model.safetensors").items()})
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval()


def encoder_digest(model: ImageTokenizer) -> str:
    """Of a tokeniser's encoder: which code words it makes. What was made for others has another digest."""
    total = hashlib.sha256(repr(model.config).encode())
    for tensor in model.encoder.state_dict().values():
        total.update(tensor.detach().half().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()[:12]
