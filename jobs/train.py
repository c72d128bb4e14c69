"""Train a stage: `python -m jobs.train --stage align --out runs/align`. Prints where the result lies."""

from __future__ import annotations

import argparse
import sys

from llmvis.cluster.session import session
from llmvis.cluster.train import TrainConfig, train
from llmvis.cluster.train_synthesis import SynthesisTrainConfig, train_synthesis
from llmvis.config import parse
from llmvis.entry import entry
from llmvis.training.stages import CHOICES

PROG = "python -m jobs.train"


def main() -> None:
    """Command line: the stage decides which settings there are."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--stage")
    stage = early.parse_known_args()[0].stage
    if stage in CHOICES:
        synthesis = parse(SynthesisTrainConfig, PROG)
        if synthesis.workers == 0:
            print(f"model: {train_synthesis(synthesis)}")
            return
        with session(dashboard=True):
            print(f"model: {train_synthesis(synthesis)}")
        return
    if stage is None and "--help" in sys.argv:
        print(
            f"{PROG} --stage tokenize|language|branch|restore|all --help tells of the synthesis model's stages.\n"
        )
    align = parse(TrainConfig, PROG)
    with session(dashboard=True):
        folder = train(align)
    print(f"encoder: {folder}")


if __name__ == "__main__":
    entry(main)
