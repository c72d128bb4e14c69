"""A picture's restorer: a small convolutional network that takes noise or blur out, or adds detail to an enlargement.

It works on half-size pixels (each 2 × 2 px is one place of 12 numbers), through residual blocks that
are told the task by a scale and a shift per channel (FiLM, Perez 2018), and what comes out is
added to the picture (VDSR, Kim 2016). Its last layer begins at zero, so an untrained one changes nothing.
It takes pictures of any size, piece by piece: a pixel is decided by what lies within `Restorer.reach` of
it, and each piece is given that much around it, so that pieces meet without a seam. Knows no
instructions, no Ray and no files but its own folder: `config.json` and `model.safetensors` (fp16).

Shape legend: B batch, C channels, H W height and width in pixels.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from llmvis.enhance import TASKS, Task
from llmvis.models.files import fit_tensors, make_config, read_json, read_tensors
from llmvis.schema import UserError

MODEL_TYPE = "llmvis-restorer"
TILE = 512
"""Side of a piece, px; even. What is around it comes on top: some 100 MB while it is worked on."""


@dataclass(frozen=True, kw_only=True)
class RestorerConfig:
    """Sizes. 64 channels and 6 blocks are 0.46M parameters."""

    channels: int = 64
    blocks: int = 6


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.film = nn.Embedding(len(TASKS), 2 * channels)
        nn.init.zeros_(self.film.weight)
        with torch.no_grad():
            self.second.weight.mul_(0.1)  # many blocks in a row begin as little more than one

    def forward(self, x_BCHW: Tensor, task_B: Tensor) -> Tensor:
        scale, shift = self.film(task_B)[:, :, None, None].chunk(2, 1)
        out: Tensor = x_BCHW + self.second(F.relu(self.first(x_BCHW) * (1 + scale) + shift))
        return out


class Restorer(nn.Module):
    """Spoilt pictures → what they may have been, of the same size."""

    def __init__(self, config: RestorerConfig) -> None:
        super().__init__()
        self.config = config
        self.head = nn.Conv2d(12, config.channels, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(config.channels) for _ in range(config.blocks))
        self.tail = nn.Conv2d(config.channels, 12, 3, padding=1)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)  # type: ignore[arg-type]

    @property
    def reach(self) -> int:
        """How far from a pixel lies what decides it, px: one place of 2 px for each of its convolutions."""
        return 2 * (2 * self.config.blocks + 2)

    def forward(self, pictures: Tensor, tasks: Tensor) -> Tensor:
        """One pass.

        Args:
            pictures: float (B, 3, H, W) in 0 … 1, H and W even; for "enlarge" resampled to the larger size.
            tasks: int64 (B,), places in `enhance.TASKS`.

        Returns:
            float (B, 3, H, W), about 0 … 1, not clipped.
        """
        hidden = self.head(F.pixel_unshuffle(pictures, 2) - 0.5)
        for block in self.blocks:
            hidden = block(hidden, tasks)
        return pictures + F.pixel_shuffle(self.tail(hidden), 2)

    @torch.inference_mode()
    def restore(self, picture: np.ndarray, task: Task, tile: int = TILE) -> np.ndarray:
        """One picture `uint8 (H, W, 3)` → `uint8` of the same size, of twice the size for "enlarge".

        Any height and width from 1 px. tile: side of the pieces, px, even; the result does not depend on it
        but for how a CPU or GPU rounds the last bit of a sum.
        """
        if task == "enlarge":
            height, width = picture.shape[:2]
            picture = np.asarray(
                Image.fromarray(picture).resize((2 * width, 2 * height), Image.Resampling.BICUBIC)
            )
        height, width = picture.shape[:2]
        reach = self.reach
        # room for the last piece as well: an even size, mirrored like the other edges
        around = [(reach, reach + height % 2), (reach, reach + width % 2), (0, 0)]
        padded, out = np.pad(picture, around, mode="reflect"), np.empty_like(picture)
        tasks = torch.tensor([TASKS.index(task)], device=self.tail.weight.device)
        for top in range(0, height, tile):
            for left in range(0, width, tile):
                piece = padded[top : top + tile + 2 * reach, left : left + tile + 2 * reach]
                made = self(self._floats(piece), tasks)[0, :, reach:-reach, reach:-reach]
                made = (made.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
                place = out[top : top + tile, left : left + tile]
                place[:] = made[: place.shape[0], : place.shape[1]]
        return out

    def _floats(self, piece: np.ndarray) -> Tensor:
        """`uint8 (H, W, 3)` → float (1, 3, H, W) in 0 … 1 on the network's device."""
        weight = self.tail.weight
        pixels = torch.from_numpy(np.ascontiguousarray(piece)).to(weight.device)
        return (pixels.permute(2, 0, 1)[None].to(weight.dtype) / 255).contiguous(
            memory_format=torch.channels_last
        )


def save_restorer(model: Restorer, folder: Path) -> None:
    """Writes both files; weights as fp16."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": MODEL_TYPE, **asdict(model.config), "tasks": list(TASKS)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {name: t.detach().cpu().half().contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")


def load_restorer(folder: Path | str, device: str = "cpu") -> Restorer:
    """The restorer of a folder, ready to use; raises `UserError` where there is none."""
    path = Path(folder)
    told = read_json(path / "config.json", "restorer")
    if told.pop("model_type", None) != MODEL_TYPE or told.pop("tasks", None) != list(TASKS):
        raise UserError(
            f"{path / 'config.json'} is of no restorer for {', '.join(TASKS)}: train one with --stage restore"
        )
    model = Restorer(make_config(RestorerConfig, told, path / "config.json"))
    file = path / "model.safetensors"
    fit_tensors(model, read_tensors(file), file)
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model.eval()
