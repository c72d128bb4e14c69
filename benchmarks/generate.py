"""The rate of `jobs.generate` over that of the bare model: see `benchmarks.bulk`.

python -m benchmarks.generate --pictures 128 --runs 3 --json generate.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tyro

from benchmarks.bulk import Config, measure, names
from jobs.generate import run
from llmvis.config_bulk import GenerateConfig


def main(config: Config) -> dict[str, Any]:
    def job(folder: Path, name: str, pictures: int) -> dict[str, Any]:
        prompts = folder / "prompts.txt"
        prompts.write_text("\n".join(names(pictures)))
        return run(
            GenerateConfig(prompts=str(prompts), out=str(folder / name), model=config.model, shard_items=16)
        )

    return measure("generate", config, job)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
