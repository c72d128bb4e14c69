"""Train a stage: `python -m jobs.train --stage align --out runs/align`. Prints where the result lies."""

from __future__ import annotations

from llmvis.cluster.session import session
from llmvis.cluster.train import TrainConfig, train
from llmvis.config import parse
from llmvis.entry import entry


def main() -> None:
    """Command line."""
    config = parse(TrainConfig, "python -m jobs.train")
    with session():
        folder = train(config)
    print(f"encoder: {folder}")


if __name__ == "__main__":
    entry(main)
