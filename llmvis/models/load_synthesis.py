"""A translator's or generator's name → what the driver plans with, or the model itself.

Names: None or "llmvis/synthesis" for the packaged model, a folder that `jobs.train` made, or a
diffusers pipeline by folder or Hugging Face name (extra `diffusers`). `describe_synthesis`
imports no torch; `load_synthesis` gives the model, in the actor that runs it. One door for
both protocols: which of them a model can be is known when it is loaded.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmvis.models.protocols import SynthesisInfo
from llmvis.schema import UserError

BUILT_IN = "llmvis/synthesis"
PACKAGED = Path(__file__).resolve().parents[1] / "weights" / "synthesis"
_OURS = "1"
"""Part of the fingerprint: change it when the same files make other pictures."""


@dataclass(frozen=True, kw_only=True)
class MakeOptions:
    """How to make pictures; None leaves the model's own default.

    steps: of sampling; 1 is faithful and soft in ours.
    guidance: how hard to pull towards the words.
    temperature: of sampling; ours only.
    strength: how far a translation may leave its source, 0 … 1; diffusers only.
    reference: share of the nearest known drawing's code words that a picture begins from; ours only.
    """

    steps: int | None = None
    guidance: float | None = None
    temperature: float | None = None
    strength: float | None = None
    reference: float | None = None

    def __post_init__(self) -> None:
        for name, least, most in (
            ("steps", 1, 1000), ("guidance", 0, 100), ("temperature", 1e-3, 100), ("strength", 0, 1),
            ("reference", 0, 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise UserError(f"--{name} is {value}; it must be from {least:g} to {most:g}")

    def given(self) -> dict[str, Any]:
        """What was asked for, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def describe_synthesis(name: str | None, options: MakeOptions, task: str) -> SynthesisInfo:
    """What the driver plans `task` ("translate" or "generate") with. Reads the weights once, for the fingerprint.

    Raises `UserError` where there is no such model or an option is not one of its.
    """
    folder = PACKAGED if name in (None, BUILT_IN) else Path(str(name)).expanduser()
    if not (folder / "language" / "config.json").is_file():
        from llmvis.models import diffusers_adapter

        return diffusers_adapter.describe(str(name), options, task)
    if options.strength is not None:
        raise UserError("--strength is for diffusers pipelines; this model has none")
    tokenizer = json.loads((folder / "tokenizer" / "config.json").read_text())
    total = hashlib.sha256(f"{_OURS}{task}{sorted(options.given().items())}".encode())
    total.update(fingerprint_of(folder).encode())
    return SynthesisInfo(
        name=BUILT_IN if folder == PACKAGED else str(folder.resolve()),
        fingerprint=total.hexdigest(),
        side=int(tokenizer["image_size"]),
        licence="CC-BY-SA-4.0" if folder == PACKAGED else "unknown",
    )


def load_synthesis(
    name: str | None, options: MakeOptions, task: str, *, device: str = "cpu", threads: int | None = None
) -> Any:
    """The `Translator` or `Generator` of `describe_synthesis`. device "auto": CUDA where there is any."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    info = describe_synthesis(name, options, task)
    folder = PACKAGED if name in (None, BUILT_IN) else Path(str(name)).expanduser()
    if not (folder / "language" / "config.json").is_file():
        from llmvis.models import diffusers_adapter

        return diffusers_adapter.load(str(name), options, task, info, device)
    from llmvis.models.synthesis_adapter import SynthesizerAdapter
    from llmvis.models.synthesizer_files import load_synthesizer

    return SynthesizerAdapter(load_synthesizer(folder, device), info, options)


def fingerprint_of(folder: Path) -> str:
    """sha256 over names and bytes of every config and weights file of a model of ours, less its restorer's."""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.name in ("config.json", "model.safetensors") and file.parent != folder / "restorer":
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            total.update(f"{file.relative_to(folder)} {digest}\n".encode())
    return total.hexdigest()
