"""The restorer → what the driver plans with, or the thing itself, in the actor that runs it.

It lies in the folder `restorer/` of a model that `jobs.train` made; where a model has none, the packaged one
stands in. `describe_restorer` imports no torch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llmvis.enhance import Task
from llmvis.models.load_synthesis import PACKAGED, fingerprint_of
from llmvis.models.protocols import PictureRestorer, SynthesisInfo
from llmvis.schema import UserError

if TYPE_CHECKING:
    from llmvis.models.restorer import Restorer

BUILT_IN = "llmvis/restorer"
_OURS = "1"
"""Part of the fingerprint: change it when the same files make other pictures."""


def restorer_folder(model: str | None) -> Path:
    """Where the restorer lies that goes with a synthesis model's name; raises `UserError` where there is none."""
    for folder in (Path(model).expanduser() if model else PACKAGED, PACKAGED):
        if (folder / "restorer" / "model.safetensors").is_file():
            return folder / "restorer"
    raise UserError(
        "there is no packaged restorer to denoise, deblur or enlarge with: train one with jobs.train --stage restore, "
        "and give its folder as --model"
    )


def describe_restorer(model: str | None) -> SynthesisInfo:
    """What the driver plans an enhancement with; pictures keep their own size, so `side` says nothing."""
    folder = restorer_folder(model)
    packaged = folder.parent == PACKAGED
    return SynthesisInfo(
        name=BUILT_IN if packaged else str(folder.resolve()),
        fingerprint=hashlib.sha256(f"{_OURS}{fingerprint_of(folder)}".encode()).hexdigest(),
        side=1,
        licence="CC-BY-SA-4.0" if packaged else "unknown",
    )


@dataclass(frozen=True, kw_only=True)
class LoadedRestorer:
    """A `PictureRestorer` of ours."""

    info: SynthesisInfo
    model: Restorer

    def restore(self, picture: np.ndarray, task: Task) -> np.ndarray:
        """See `models.restorer.Restorer.restore`."""
        return self.model.restore(picture, task)


def load_picture_restorer(
    model: str | None = None, *, device: str = "cpu", threads: int | None = None
) -> PictureRestorer:
    """The `PictureRestorer` of `describe_restorer`. device "auto": CUDA where there is any."""
    import torch

    from llmvis.models.restorer import load_restorer

    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return LoadedRestorer(info=describe_restorer(model), model=load_restorer(restorer_folder(model), device))
