"""A diffusers pipeline at work: a text-to-image one as a `Generator`, an image-to-image one as a `Translator`.

Each row has a random stream of its own, on the CPU, from its id and seed. On CPUs each row is
run by itself: arithmetic then does not depend on the batch, and the same request gives the same
bytes in any company. All is computed in float32. A safety checker that the folder names stays
on, and blacks out what it flags.

It does not know files beyond loading them (diffusers_adapter.py has checked them), or jobs.

Shape legend: B rows, S the pipeline's side in pixels.
"""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.utils import logging as transformers_logging

from llmvis.models.diffusers_adapter import Parts, check_steps, weights_of
from llmvis.models.load_synthesis import MakeOptions
from llmvis.models.protocols import Generator, SynthesisInfo, Translator
from llmvis.schema import UserError

transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # diffusers asks for torchvision
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, in one of diffusers' many models
    import diffusers
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image

_PIXELS_AT_ONCE_GPU = 4 * 2**20
"""Pixels that a GPU makes at a time: the VAE's widest layers take some 2 kB for each."""
_OPTIONS = {"steps": "num_inference_steps", "guidance": "guidance_scale", "strength": "strength"}
_Row = dict[str, Any]
"""What one row gives a pipeline beside settings: prompt, and negative_prompt, image, mask_image where it has them."""


class _Pipeline:
    """A pipeline of some task on a device, with the options asked for."""

    door: Any
    """The class of diffusers that picks the pipeline of the task."""

    def __init__(
        self, folder: Path, parts: Parts, info: SynthesisInfo, options: MakeOptions, device: str
    ) -> None:
        """Load it; raises `UserError` as `diffusers_adapter.load` says."""
        self.info, self.device = info, torch.device(device)
        self._pipe = _quiet(_load(folder, parts, self.door).to(self.device, torch.float32))
        self._settings = {_OPTIONS[name]: value for name, value in options.given().items()}
        takes = _takes(self._pipe)
        for name in options.given():
            if _OPTIONS[name] not in takes:
                raise UserError(f"{type(self._pipe).__name__} takes no --{name}; leave it out")
        if "strength" in takes:
            defaults = {name: takes[name].default for name in ("num_inference_steps", "strength")}
            chosen = defaults | self._settings
            check_steps(chosen["num_inference_steps"], chosen["strength"])

    def _run(self, pipe: Any, rows: Sequence[_Row], seeds: Sequence[int], ids: Sequence[str]) -> np.ndarray:
        """B rows through a pipeline → `uint8 (B, H, W, 3)`, in their order."""
        made: dict[int, np.ndarray] = {}
        for batch in self._batches(rows):
            streams = [_seed(ids[i], seeds[i]) for i in batch]
            inputs = {name: [rows[i][name] for i in batch] for name in rows[batch[0]]}
            size = {"height": self.info.side, "width": self.info.side}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(streams[0])  # for schedulers that draw from the global stream
                pictures = pipe(
                    **inputs,
                    **self._settings,
                    **{name: value for name, value in size.items() if name in _takes(pipe)},
                    generator=[torch.Generator("cpu").manual_seed(stream) for stream in streams],
                    output_type="np",
                ).images
            if not np.isfinite(pictures).all():
                raise RuntimeError(
                    f"{self.info.name} gave a picture that is not numbers (NaN) for {rows[batch[0]]['prompt']!r} "
                    "or a prompt beside it: broken weights, or a scheduler that does not go with them"
                )
            made.update(zip(batch, (pictures * 255).round().astype(np.uint8), strict=True))
        if not made:
            return np.zeros((0, self.info.side, self.info.side, 3), np.uint8)
        return np.stack([made[i] for i in range(len(rows))])

    def _batches(self, rows: Sequence[_Row]) -> list[list[int]]:
        """Rows that are run together: those with the same inputs, on a GPU; each by itself on CPUs."""
        if self.device.type == "cpu":
            return [[i] for i in range(len(rows))]
        alike: dict[tuple[str, ...], list[int]] = {}
        for i, row in enumerate(rows):
            alike.setdefault(tuple(row), []).append(i)
        many = max(1, _PIXELS_AT_ONCE_GPU // self.info.side**2)
        return [group[at : at + many] for group in alike.values() for at in range(0, len(group), many)]


class DiffusersGenerator(_Pipeline):
    """Pictures from words; see `Generator`."""

    door = AutoPipelineForText2Image

    def generate(
        self, prompts: Sequence[str], *, negatives: Sequence[str | None], seeds: Sequence[int],
        ids: Sequence[str],
    ) -> np.ndarray:  # fmt: skip
        """See `Generator.generate`: B prompts → `uint8 (B, S, S, 3)`.

        Raises `UserError` for a negative where the pipeline takes none, `RuntimeError` for NaN.
        """
        if any(negatives) and "negative_prompt" not in _takes(self._pipe):
            raise UserError(f"{type(self._pipe).__name__} takes no negative prompts; leave them out")
        rows = [
            {"prompt": _clean(prompt), **({"negative_prompt": _clean(negative)} if negative else {})}
            for prompt, negative in zip(prompts, negatives, strict=True)
        ]
        return self._run(self._pipe, rows, seeds, ids)


class DiffusersTranslator(_Pipeline):
    """Pictures under instructions, read as descriptions of what is wanted; see `Translator`."""

    door = AutoPipelineForImage2Image

    def translate(
        self, pictures: np.ndarray, instructions: Sequence[str], *, seeds: Sequence[int], ids: Sequence[str],
        masks: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """See `Translator.translate`: `uint8 (B, S, S, 3)` → `uint8 (B, S, S, 3)`.

        With masks, `bool (B, S, S)`, the inpainting pipeline of the same parts makes what is True
        anew. Raises `UserError` where there is none, `RuntimeError` for NaN.
        """
        rows: list[_Row] = [
            {"prompt": _clean(instruction), "image": Image.fromarray(picture)}
            for picture, instruction in zip(pictures, instructions, strict=True)
        ]
        if masks is None:
            return self._run(self._pipe, rows, seeds, ids)
        for row, mask in zip(rows, masks, strict=True):
            row["mask_image"] = Image.fromarray(mask.astype(np.uint8) * 255)
        return self._run(self._inpainting, rows, seeds, ids)

    @cached_property
    def _inpainting(self) -> Any:
        """The inpainting pipeline of the same parts; it takes no memory of its own."""
        try:
            return _quiet(AutoPipelineForInpainting.from_pipe(self._pipe))
        except ValueError as e:  # as diffusers says that there is none
            raise UserError(
                f"{type(self._pipe).__name__} has no inpainting pipeline; leave masks and regions out"
            ) from e


KINDS: dict[str, Callable[..., Translator | Generator]] = {
    "translate": DiffusersTranslator,
    "generate": DiffusersGenerator,
}


def _load(folder: Path, parts: Parts, door: Any) -> Any:
    """The pipeline of a task, with every weight from the files."""
    diffusers.utils.logging.set_verbosity_error()  # of prompts that are cut at 77 tokens, one line each
    diffusers.utils.logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        models = {
            part: _load_model(folder / part, library, kind)
            for part, (library, kind) in parts.items()
            if library in ("diffusers", "transformers") and (folder / part / "config.json").is_file()
        }
        return door.from_pretrained(folder, **models, use_safetensors=True, local_files_only=True)
    except UserError:
        raise
    except Exception as e:  # a class unknown here, a file cut off; tokenizers raises this itself
        raise UserError(
            f"{folder} can't be loaded by {door.__name__} of diffusers {diffusers.__version__}: "
            f"{' '.join(str(e).split())[:400]}"
        ) from e


def _load_model(part: Path, library: str, kind: str) -> Any:
    """One part, refused if its file lacks weights: they would be filled with random numbers."""
    source: Any = {"diffusers": diffusers, "transformers": transformers}[library]
    weights_of(part)
    model, report = getattr(source, kind).from_pretrained(
        part, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    wrong = sorted(str(key) for key in (*report["missing_keys"], *report.get("mismatched_keys", ())))
    if wrong:
        raise UserError(
            f"{part}: the files lack {len(wrong)} of the weights of {kind}, such as {wrong[0]}; give the whole model"
        )
    return model


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _takes(pipe: Any) -> dict[str, inspect.Parameter]:
    """The arguments of a pipeline's call."""
    return dict(inspect.signature(pipe.__call__).parameters)


def _seed(key: str, seed: int) -> int:
    """The seed of one request's random stream: of its id and seed, and of nothing else."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{key}".encode()).digest()[:8], "little")


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # lone surrogates, which tokenizers refuse
