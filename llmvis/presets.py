"""Named sizes of a synthesis model with their training: functions that return configs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from llmvis.models.restorer import RestorerConfig
from llmvis.models.tokenizer import TokenizerConfig
from llmvis.training.branch import BranchConfig
from llmvis.training.common import OptimConfig
from llmvis.training.language import LanguageTrainConfig
from llmvis.training.restore import RestoreConfig
from llmvis.training.tokenize import TokenizeConfig


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model's sizes, and how each of its stages is trained."""

    tokenizer: TokenizerConfig
    tokenize: TokenizeConfig
    language: LanguageTrainConfig
    branch: BranchConfig
    restorer: RestorerConfig = field(default_factory=RestorerConfig)
    restore: RestoreConfig = field(default_factory=RestoreConfig)
    words: int = 20
    language_model: str = "packaged"

    def changed(self, *, steps: int | None, batch_size: int | None, seed: int | None) -> Preset:
        """With other steps, batch size or seed in every stage; None leaves the preset's."""
        given = {"steps": steps, "batch_size": batch_size, "seed": seed}
        wanted: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return replace(
            self,
            tokenize=replace(self.tokenize, optim=replace(self.tokenize.optim, **wanted)),
            language=replace(self.language, optim=replace(self.language.optim, **wanted)),
            branch=replace(self.branch, optim=replace(self.branch.optim, **wanted)),
            restore=replace(self.restore, optim=replace(self.restore.optim, **wanted)),
        )


def tiny() -> Preset:
    """32 px, 4 × 4 cells: tests, and a look at how everything fits, in seconds."""
    quick = OptimConfig(steps=20, batch_size=8, learning_rate=1e-3, warmup=5)
    return Preset(
        tokenizer=TokenizerConfig(image_size=32, channels=(16, 24, 32), blocks=1, groups=2, levels=(5, 5)),
        tokenize=TokenizeConfig(optim=quick, gan_start=0.5),
        language=LanguageTrainConfig(optim=quick, views=1),
        branch=BranchConfig(optim=quick),
        restorer=RestorerConfig(channels=8, blocks=2),
        restore=RestoreConfig(optim=quick, side=32, crop=24),
    )


def small() -> Preset:
    """64 px, 8 × 8 cells of 4 code words, MiniLM: what two CPU cores train in hours; the shipped weights."""
    return Preset(
        tokenizer=TokenizerConfig(groups=4),
        tokenize=TokenizeConfig(optim=OptimConfig(steps=6000, learning_rate=1e-3), gan_start=0.7),
        language=LanguageTrainConfig(),
        branch=BranchConfig(),
    )


def base() -> Preset:
    """128 px, 16 × 16 cells of 2 code words: one GPU, some tens of minutes a stage."""
    return Preset(
        tokenizer=TokenizerConfig(image_size=128, channels=(96, 192, 384), blocks=2, groups=2),
        tokenize=TokenizeConfig(
            optim=OptimConfig(steps=20_000, batch_size=64, learning_rate=6e-4), gan_start=0.5
        ),
        language=LanguageTrainConfig(
            optim=OptimConfig(
                steps=30_000, batch_size=128, learning_rate=4e-4, warmup=1000, weight_decay=0.05
            ),
            views=4,
        ),
        branch=BranchConfig(optim=OptimConfig(steps=6000, batch_size=64, learning_rate=6e-4)),
    )


PRESETS: dict[str, Callable[[], Preset]] = {"tiny": tiny, "small": small, "base": base}
