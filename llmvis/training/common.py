"""What the synthesis stages share: optimiser with schedule, averaged weights, workers, the loop, its files.

All that is random in a step is drawn from (seed, step) for the whole batch, and each worker
does its slice of it: a run goes on exactly where it stopped, and its losses do not depend on
the number of workers. Knows no Ray and
no model that is trained.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from llmvis.models.efficientnet import EfficientNetLite0
from llmvis.models.files import read_json, read_tensors
from llmvis.schema import UserError
from llmvis.training.curves import draw_curves

STATE, TOLD = "state.safetensors", "state.json"


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Steps and learning rate of a stage. `batch_size` counts the rows of all workers together."""

    steps: int = 1000
    batch_size: int = 32
    accumulate: int = 1
    learning_rate: float = 3e-4
    warmup: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.999
    bf16: bool = True
    seed: int = 0


@dataclass(frozen=True)
class World:
    """This worker among all. `mean` averages tensors over the workers, in place."""

    rank: int = 0
    size: int = 1
    mean: Callable[[list[Tensor]], None] = lambda tensors: None

    def slice_of(self, rows: int) -> slice:
        """This worker's rows of a batch."""
        each = rows // self.size
        return slice(self.rank * each, (self.rank + 1) * each)


ALONE = World()


class Optimiser:
    """AdamW with clipping, linear warm-up, a cosine to zero, and an average of the weights."""

    def __init__(
        self, model: nn.Module, config: OptimConfig, world: World, betas: tuple[float, float] = (0.9, 0.99)
    ):
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._config, self._world = config, world
        decayed = [p for p in self.named.values() if p.ndim > 1]
        plain = [p for p in self.named.values() if p.ndim < 2]
        self.adam = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.learning_rate, betas=betas,
        )  # fmt: skip
        self._order = [*decayed, *plain]
        self.average = {name: p.detach().clone() for name, p in self.named.items()}

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        config = self._config
        warm = min(1.0, (step + 1) / max(1, config.warmup))
        return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / config.steps)))

    def update(self, step: int) -> float:
        """Averages the gradients over workers, clips, steps; returns their norm before clipping.

        Raises `UserError` where one is not finite; the weights are then as they were.
        """
        gradients = [p.grad for p in self._order if p.grad is not None]
        self._world.mean(gradients)
        norm = nn.utils.get_total_norm(gradients)
        if not norm.isfinite():
            odd = [n for n, p in self.named.items() if p.grad is not None and not p.grad.isfinite().all()]
            raise UserError(
                f"step {step + 1}: gradients are not finite, first in {(odd or ['their sum'])[0]}. The weights were "
                "not changed and the last saved state is good; the same command goes on from it. If it comes to this "
                "again, begin another --out with a larger --batch-size or another --seed"
            )
        nn.utils.clip_grads_with_norm_(self._order, self._config.clip, norm)
        for group in self.adam.param_groups:
            group["lr"] = self.rate(step)
        self.adam.step()
        self.adam.zero_grad()
        decay = min(self._config.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, p in self.named.items():
                self.average[name].lerp_(p.detach(), 1 - decay)
        return float(norm)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """Weights, averages and moments, by name."""
        out = {f"{prefix}weight.{name}": p.detach() for name, p in self.named.items()}
        out |= {f"{prefix}average.{name}": t for name, t in self.average.items()}
        for i, moments in self.adam.state_dict()["state"].items():
            out |= {f"{prefix}adam.{i}.{kind}": value for kind, value in moments.items()}
        return out

    def load(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """The reverse of `tensors`."""
        state: dict[str, Any] = self.adam.state_dict()
        state["state"] = {}
        with torch.no_grad():
            for name, p in self.named.items():
                p.copy_(tensors[f"{prefix}weight.{name}"])
                self.average[name].copy_(tensors[f"{prefix}average.{name}"])
        for name, tensor in tensors.items():
            if name.startswith(f"{prefix}adam."):
                place, _, kind = name.removeprefix(f"{prefix}adam.").partition(".")
                state["state"].setdefault(int(place), {})[kind] = tensor
        self.adam.load_state_dict(state)

    def averaged(self) -> _Averaged:
        """The model has its averaged weights inside `with`."""
        return _Averaged(self)


class _Averaged:
    def __init__(self, optimiser: Optimiser) -> None:
        self._optimiser, self._kept = optimiser, dict[str, Tensor]()

    def __enter__(self) -> None:
        with torch.no_grad():
            for name, p in self._optimiser.named.items():
                self._kept[name] = p.detach().clone()
                p.copy_(self._optimiser.average[name])

    def __exit__(self, *exc: object) -> None:
        with torch.no_grad():
            for name, p in self._optimiser.named.items():
                p.copy_(self._kept[name])


def autocast(device: str, bf16: bool) -> AbstractContextManager[None]:
    """bfloat16 arithmetic where it is asked for and the device is fast at it."""
    kind = torch.device(device).type
    fast = torch.cuda.is_bf16_supported() if kind == "cuda" else torch.cpu._is_amx_tile_supported()
    context: AbstractContextManager[None] = torch.autocast(kind, torch.bfloat16, enabled=bf16 and fast)
    return context


def likeness(trunk: EfficientNetLite0 | None, made: Tensor, real: Tensor) -> Tensor:
    """L1 between a CNN's features of two batches in 0 … 1 (perceptual loss, Johnson 2016); 0 without one."""
    if trunk is None:
        return made.new_zeros(())
    mine, theirs = (trunk(image.float() * 255) for image in (made, real))
    middle = F.l1_loss(mine.middle.float(), theirs.middle.float())
    return middle + F.l1_loss(mine.final.float(), theirs.final.float())


class Stage(Protocol):
    """One stage's training: a state that steps. `fingerprint` is what a resumed run must share."""

    optim: OptimConfig

    def fingerprint(self) -> dict[str, Any]: ...

    def step(self, number: int) -> dict[str, float]:
        """Trains on batch `number`; returns metrics, averaged over workers where it matters."""
        ...

    def evaluate(self) -> tuple[dict[str, float], Image.Image | None]:
        """Metrics on validation rows with averaged weights, and a picture to look at."""
        ...

    def tensors(self) -> dict[str, Tensor]: ...

    def load(self, tensors: Mapping[str, Tensor]) -> None: ...

    def export(self, folder: Path) -> None:
        """Writes the model with averaged weights, as users load it."""
        ...


def save_state(stage: Stage, number: int, folder: Path) -> None:
    """`state.safetensors` and `state.json`: all that is needed to go on after step `number`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.detach().cpu().contiguous() for name, t in stage.tensors().items()}, folder / STATE)
    (folder / TOLD).write_text(json.dumps({"step": number, "fingerprint": stage.fingerprint()}, indent=1))
    usual_modes(folder)


def usual_modes(folder: Path) -> None:
    """Files get the rights that the umask gave the folder: safetensors would keep them from everyone else."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def load_state(stage: Stage, folder: Path) -> int:
    """Goes on from `save_state`: the number of steps done. Raises `UserError` if the run is another."""
    told = read_json(folder / TOLD, "state of a run")
    mine = json.loads(json.dumps(stage.fingerprint()))
    its, step = told.get("fingerprint"), told.get("step")
    if not isinstance(its, dict) or not isinstance(step, int):
        raise UserError(
            f"{folder / TOLD} is no state of a run of ours: delete {folder}, and the one before counts"
        )
    if its != mine:
        changed = sorted(k for k in mine.keys() | its.keys() if mine.get(k) != its.get(k))
        raise UserError(
            f"{folder} is of a run with another {', '.join(changed)}: give the same or another --out"
        )
    tensors = read_tensors(folder / STATE)
    try:
        stage.load(tensors)
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"{folder / STATE} is not of this run ({str(error)[:200]}): delete {folder}, and the one before counts"
        ) from error
    return step


@dataclass(frozen=True, kw_only=True)
class Every:
    """How often, in steps, the loop reports, judges and saves."""

    log: int = 20
    evaluate: int = 500
    save: int = 250


Told = dict[str, float]


def fit(
    stage: Stage,
    begin: int,
    every: Every,
    *,
    tell: Callable[[int, Told], None],
    show: Callable[[int, Told, Image.Image | None], None],
    keep: Callable[[int, Told], None],
) -> None:
    """Steps `begin` … to the end.

    `tell` gets mean metrics since the last time, `show` an evaluation, `keep` is asked to save
    (also at the end). Every worker calls them in the same order.
    """
    steps, since, seen = stage.optim.steps, time.perf_counter(), list[Told]()
    for number in range(begin, steps):
        seen.append(stage.step(number))
        done = number + 1
        if done % every.log == 0 or done == steps:
            now = time.perf_counter()
            told = {k: sum(row[k] for row in seen) / len(seen) for k in seen[0]}
            tell(done, told | {"steps_per_second": len(seen) / (now - since)})
            seen = []
        if done % every.evaluate == 0 or done == steps:
            show(done, *stage.evaluate())
        if done % every.save == 0 or done == steps:
            keep(done, {"step": float(done)})
        if done % every.log == 0:
            since = time.perf_counter()


class Files:
    """A run's files: `metrics.jsonl`, `curves.png`, `samples/*.png`, and the last two `state/step-N`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        (out / "samples").mkdir(parents=True, exist_ok=True)

    def tell(self, step: int, told: Told, kind: str = "train") -> None:
        """One line of JSON, and one for people."""
        line = {"step": step, "kind": kind, "time": time.time()} | {k: round(v, 6) for k, v in told.items()}
        with (self.out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{kind} {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in told.items()), flush=True)

    def show(self, step: int, told: Told, picture: Image.Image | None) -> None:
        """Metrics and the picture of an evaluation."""
        self.tell(step, told, "evaluation")
        if picture is not None:
            picture.save(self.out / "samples" / f"{step:07}.png")
        draw_curves(self.out / "metrics.jsonl", self.out / "curves.png")

    def keep(self, stage: Stage, step: int) -> None:
        """Saves the state; a half-written one is never taken for a whole one."""
        final = self.out / "state" / f"step-{step:07}"
        partial = final.with_name(f".{final.name}")
        shutil.rmtree(partial, ignore_errors=True)
        save_state(stage, step, partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in self.states()[:-2]:
            shutil.rmtree(old)

    def states(self) -> list[Path]:
        """Saved states, the newest last."""
        return sorted((self.out / "state").glob("step-*"))


def trim_log(file: Path, step: int) -> None:
    """Takes lines after `step` out of a metrics file, they will be written again; and a last one that was cut off."""
    if file.exists():
        whole = file.read_text().split("\n")[:-1]  # what follows the last line's end is torn
        partial = file.with_name(f".{file.name}")
        partial.write_text("".join(f"{line}\n" for line in whole if json.loads(line)["step"] <= step))
        partial.replace(file)


def run_alone(stage: Stage, out: Path, every: Every) -> None:
    """Trains in this process, or goes on where an earlier call stopped."""
    files = Files(out)
    begin = load_state(stage, files.states()[-1]) if files.states() else 0
    trim_log(out / "metrics.jsonl", begin)
    fit(
        stage, begin, every, tell=files.tell, show=files.show, keep=lambda step, told: files.keep(stage, step)
    )


def flat_mean(total: Callable[[Tensor], None], size: int) -> Callable[[list[Tensor]], None]:
    """A `World.mean` from an all-reduce sum: one message for all tensors."""

    def mean(tensors: list[Tensor]) -> None:
        flat = torch.cat([t.reshape(-1).float() for t in tensors])
        total(flat)
        flat /= size
        for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    return mean
