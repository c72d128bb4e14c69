"""Pictures a second of the synthesis model over its floor: the bare forward passes that a request needs.

The floor runs the language model and the decoder as often as the request does, on fixed inputs,
with no sampling, guidance or random numbers around them. Floating-point operations are counted by
torch, so that the machine's rate can be seen beside its own.

    python -m benchmarks.sample --pictures 8 --runs 5 --json sample.json
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from llmvis.models.language import MASKED
from llmvis.models.sampling import Sampling
from llmvis.models.synthesizer import Synthesizer
from llmvis.models.synthesizer_files import load_synthesizer


@dataclass(frozen=True, kw_only=True)
class Config:
    pictures: int = 8
    """Pictures of each run."""
    runs: int = 5
    """Times that request and floor run, in turn."""
    steps: int = 12
    """Decoding steps of a picture."""
    guidance: float = 3.0
    """0 halves the passes."""
    device: str = "cpu"
    """cpu or cuda."""
    threads: int = 1
    """torch's threads on CPUs."""
    model: str | None = None
    """Folder of a synthesis model; default: the packaged one."""
    json: str | None = None
    """Write the figures there."""


@torch.inference_mode()
def floor(model: Synthesizer, config: Config) -> None:
    """The passes of one picture."""
    rows = 2 if config.guidance else 1
    words, attend = (t.to(config.device) for t in model.words(["a picture"] * rows))
    cells = model.tokenizer.config
    target = torch.full((rows, cells.cells, cells.groups), MASKED, device=config.device)
    for _ in range(config.steps):
        model.language.code_logits(model.language(words, attend, target).last_hidden_state)
    latents = torch.zeros(1, cells.groups * len(cells.levels), cells.grid, cells.grid, device=config.device)
    model.tokenizer.decode_latents(latents)


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds that `work` takes."""
    begun = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def main(config: Config) -> dict[str, Any]:
    torch.set_num_threads(config.threads)
    model = load_synthesizer(config.model, config.device)
    how = Sampling(steps=config.steps, guidance=config.guidance)
    prompts = [f"picture {i}" for i in range(config.pictures)]
    with FlopCounterMode(display=False) as counter:
        floor(model, config)
    seconds: dict[str, list[float]] = {"request": [], "floor": []}
    model.generate(prompts[:1], how=how)
    for run in range(config.runs):
        seconds["floor"].append(timed(lambda: [floor(model, config) for _ in prompts], config.device))
        seconds["request"].append(timed(lambda: model.generate(prompts, how=how), config.device))
        print(f"run {run + 1}: " + ", ".join(f"{k} {v[-1]:.2f} s" for k, v in seconds.items()), flush=True)
    median = {k: statistics.median(v) / config.pictures for k, v in seconds.items()}
    figures = {
        "ratio": round(median["floor"] / median["request"], 4),
        "pictures_per_second": {k: round(1 / v, 3) for k, v in median.items()},
        "gflop_per_picture": round(counter.get_total_flops() / 1e9, 3),
        "gflop_per_second": round(counter.get_total_flops() / 1e9 / median["request"], 1),
        "sampling": asdict(how),
        "device": config.device,
        "threads": config.threads,
        "runs": {k: [round(x, 4) for x in v] for k, v in seconds.items()},
    }
    print(json.dumps(figures, indent=1))
    if config.json:
        Path(config.json).write_text(json.dumps(figures, indent=1) + "\n")
    return figures


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
