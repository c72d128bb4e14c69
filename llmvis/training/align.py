"""The alignment stage in plain torch: order of the data, one step, the loop, its state on disk.

Trains the learned part of the two-tower encoder on frozen features, against a frozen
language model. Everything random is a function of (seed, epoch), so a run that was
interrupted and resumed gives the run that was not. Several workers share a batch: each
takes its slice, `gather` brings all embeddings together with gradients, and the mean of the
workers' gradients is that of one worker with the whole batch. Knows no Ray.

Shape legend: B pairs of this worker, G pairs of all workers, V views, F features, T text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from llmvis.align_data import Bank, sample_text
from llmvis.losses import Gather, alone, info_nce
from llmvis.metrics import retrieval_scores
from llmvis.models.files import read_json, read_tensors
from llmvis.models.two_tower import LearnedPart
from llmvis.models.two_tower_info import TwoTowerConfig
from llmvis.schema import UserError

SAME = 0.95  # cosine of two texts above which they are the same words, and no negatives


@dataclass(frozen=True, kw_only=True)
class AlignConfig:
    """Hyper-parameters of the alignment stage. `batch_size` counts the pairs of all workers together.

    Without `train_text` the text side stays the language model's own space: better on
    validation than training it too (benchmarks/LOG.md).
    """

    epochs: int = 20
    batch_size: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.5
    dropout: float = 0.3
    warmup: float = 0.1
    scale_init: float = 14.3
    scale_max: float = 100.0
    patience: int = 6
    train_text: bool = False
    seed: int = 0


@dataclass
class Progress:
    """Where a run is: epochs done, validation R@10 of each, the best of them."""

    epoch: int = 0
    history: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        """Best validation R@10 so far, per cent."""
        return max(self.history, default=-1.0)

    def is_over(self, config: AlignConfig) -> bool:
        """All epochs done, or no better for `patience` epochs."""
        stale = len(self.history) - 1 - int(np.argmax(self.history)) if self.history else 0
        return self.epoch >= config.epochs or stale >= config.patience


class Aligner:
    """Learned part, temperature, optimiser and progress: what a checkpoint holds.

    Args:
        index: training rows of the bank.
        rank, world: this worker's place among all.
        gather, mean: join embeddings with gradients, and average a gradient, over workers.
    """

    def __init__(
        self,
        bank: Bank,
        index: np.ndarray,
        model: TwoTowerConfig,
        config: AlignConfig,
        *,
        rank: int = 0,
        world: int = 1,
        gather: Gather = alone,
        mean: Callable[[Tensor], None] = lambda gradient: None,
    ) -> None:
        if config.batch_size % world or config.batch_size > len(index):
            raise UserError(
                f"a batch of {config.batch_size} must divide by {world} workers and be no more than the "
                f"{len(index)} training pairs: set --align.batch-size"
            )
        torch.manual_seed(config.seed)  # the same initial weights on every worker
        self.learned = LearnedPart(model, config.dropout)
        self._standardise(bank, index)
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.scale_init)))
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        self.config, self._bank, self._index = config, bank, index
        self._rank, self._world, self._gather, self._mean = rank, world, gather, mean
        self.steps_per_epoch = len(index) // config.batch_size
        self.learned.text.requires_grad_(config.train_text)
        named = {name: p for name, p in self.learned.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": config.weight_decay},
                {"params": [*(p for p in named.values() if p.ndim < 2), self.log_scale], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
        )

    def _standardise(self, bank: Bank, index: np.ndarray) -> None:
        plain = bank.features[0, index].float().sqrt()
        self.learned.feature_mean.copy_(plain.mean(0))
        self.learned.feature_scale.copy_(1 / (plain.std(0) + 1e-2))

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This worker's slices of an epoch: features `(B, F)` and texts `(B, T)`.

        Views and texts are drawn for the whole batch on every worker, from (seed, epoch).
        """
        rng = np.random.default_rng([self.config.seed, epoch])
        order = self._index[rng.permutation(len(self._index))]
        size = self.config.batch_size // self._world
        mine = slice(self._rank * size, (self._rank + 1) * size)
        for step in range(self.steps_per_epoch):
            rows = order[step * self.config.batch_size : (step + 1) * self.config.batch_size]
            views = rng.integers(len(self._bank.features), size=len(rows))
            texts = [self._bank.phrases[sample_text(self._bank.rows[i], rng)] for i in rows]
            yield self._bank.features[views[mine], rows[mine]].float(), self._bank.texts[texts[mine]].float()

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to zero."""
        total = self.config.epochs * self.steps_per_epoch
        warm = min(1.0, (step + 1) / max(1.0, self.config.warmup * total))
        return self.config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total)))

    def loss(self, features_BF: Tensor, texts_BT: Tensor) -> Tensor:
        """InfoNCE over all workers' pairs; pairs with the same words are no negatives of each other."""
        images, texts = self.learned.project_images(features_BF), self.learned.project_texts(texts_BT)
        scale = self.log_scale.exp().clamp(max=self.config.scale_max)
        same = texts_BT @ self._gather(texts_BT).T > SAME
        return info_nce(images, texts, scale, same_BG=same, gather=self._gather, rank=self._rank)

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [*(p for p in self.learned.parameters() if p.requires_grad), self.log_scale]

    def train_epoch(self) -> float:
        """One pass over the training rows; returns the mean loss of this worker, in nats."""
        self.learned.train()
        # dropout differs between workers and epochs, and repeats when an epoch is replayed
        torch.manual_seed(self.config.seed * 1_000_003 + self.progress.epoch * 1009 + self._rank)
        losses = []
        for step, (features, texts) in enumerate(self.batches(self.progress.epoch)):
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(self.progress.epoch * self.steps_per_epoch + step)
            self.optimizer.zero_grad()
            loss = self.loss(features, texts)
            loss.backward()  # type: ignore[no-untyped-call]
            for parameter in self.parameters():
                assert parameter.grad is not None
                self._mean(parameter.grad)
            self.optimizer.step()
            losses.append(float(loss.detach()))
        return float(np.mean(losses))

    def fit_epoch(self, validation: np.ndarray) -> dict[str, float]:
        """Train one epoch, judge it on `validation` rows, keep the weights if they are the best."""
        mean_loss = self.train_epoch()
        scores = self.validate(validation)
        self.progress.epoch += 1
        self.progress.losses.append(mean_loss)
        if scores["r_at_10"] > self.progress.best:
            self.best = {name: tensor.clone() for name, tensor in self.learned.state_dict().items()}
        self.progress.history.append(scores["r_at_10"])
        return {"epoch": float(self.progress.epoch), "loss": mean_loss, **scores}

    @torch.inference_mode()
    def validate(self, rows: np.ndarray) -> dict[str, float]:
        """Text → picture retrieval of the learned part alone, captions as queries, no augmentation."""
        self.learned.eval()
        images = self.learned.project_images(self._bank.features[0, rows].float())
        texts = self.learned.project_texts(self._bank.captions(rows))
        return retrieval_scores(texts.numpy(), images.numpy())

    def save(self, folder: Path) -> None:
        """Write `state.safetensors` and `state.json`: all that `load` needs to go on exactly."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"learned.{k}": v for k, v in self.learned.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        tensors["log_scale"] = self.log_scale.detach()
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in moments.items()}
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "state.safetensors")
        told = {"config": asdict(self.config), "progress": asdict(self.progress)}
        (folder / "state.json").write_text(json.dumps(told, indent=1))

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote; raises `UserError` if that is of another config, or damaged."""
        told = read_json(folder / "state.json")
        if told.get("config") != asdict(self.config):
            raise UserError(
                f"{folder} was trained with {told.get('config')}, not {asdict(self.config)}: use a new run name"
            )
        tensors = read_tensors(folder / "state.safetensors")
        try:
            self._put(tensors, told["progress"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{folder} is no state of such a run ({str(error)[:200]}): give another --out"
            ) from error

    def _put(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"learned": {}, "best": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            head, _, rest = name.partition(".")
            if head in parts:
                parts[head][rest] = tensor
        self.learned.load_state_dict(parts["learned"])
        self.best = parts["best"]
        with torch.no_grad():
            self.log_scale.copy_(tensors["log_scale"])
        state = self.optimizer.state_dict()
        state["state"] = {}
        for name, tensor in parts["optimizer"].items():
            place, _, kind = name.partition(".")
            state["state"].setdefault(int(place), {})[kind] = tensor
        self.optimizer.load_state_dict(state)
        self.progress = Progress(**progress)
