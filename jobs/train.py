"""Train a stage: `python -m jobs.train --stage align --out runs/align`. Prints where the result lies."""

from __future__ import annotations

import sys

from llmvis.cluster.session import session
from llmvis.cluster.train import TrainConfig, train
from llmvis.config import parse


def main() -> None:
    """Command line."""
    config = parse(TrainConfig, "python -m jobs.train")
    try:
        with session():
            folder = train(config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"encoder: {folder}")


if __name__ == "__main__":
    main()
