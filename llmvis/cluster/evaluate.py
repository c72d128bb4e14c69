"""A synthesis model on Ray Data: rows in chunks through a pool of actors, results in order."""

from __future__ import annotations

import pickle
from typing import Any

import ray.data
import torch
from ray.data import ActorPoolStrategy

from llmvis.evaluation_synthesis import Rows, Synthesise, run_rows
from llmvis.models.synthesizer_files import load_synthesizer

AT_ONCE = 8


class _Actor:
    """Holds the model, which is loaded here and never sent."""

    def __init__(self, folder: str | None, gpu: bool) -> None:
        torch.set_num_threads(1)
        self._model = load_synthesizer(folder, "cuda" if gpu else "cpu")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        task, rows = pickle.loads(row["asked"])  # noqa: S301 - packed by `run` below
        return {"place": row["place"], "made": pickle.dumps(run_rows(self._model, task, rows))}


def on_actors(folder: str | None, actors: int, gpus: float = 0.0) -> Synthesise:
    """A `Synthesise` whose model lives in `actors` actors."""

    def run(task: str, rows: Rows) -> list[Any]:
        ray.data.DataContext.get_current().enable_progress_bars = False
        places = range(0, len(rows), AT_ONCE)
        items = [
            {"place": at, "asked": pickle.dumps((task, rows.part(slice(at, at + AT_ONCE))))} for at in places
        ]
        chunks: ray.data.Dataset = ray.data.from_items(items, override_num_blocks=len(items))
        actor: Any = _Actor
        done = chunks.map(
            actor,
            fn_constructor_kwargs={"folder": folder, "gpu": gpus > 0},
            compute=ActorPoolStrategy(min_size=1, max_size=actors, initial_size=actors),
            num_cpus=0.5,
            num_gpus=gpus or None,
        )
        found = {row["place"]: pickle.loads(row["made"]) for row in done.iter_rows()}  # noqa: S301
        return [made for at in places for made in found[at]]

    return run
