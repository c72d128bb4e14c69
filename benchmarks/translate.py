"""The rate of `jobs.translate` over that of the bare model: see `benchmarks.bulk`.

python -m benchmarks.translate --pictures 512 --runs 3 --json translate.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tyro

from benchmarks.bulk import INSTRUCTION, Config, measure, write_pictures
from jobs.translate import run
from llmvis.config_bulk import TranslateConfig


def main(config: Config) -> dict[str, Any]:
    def job(folder: Path, name: str, pictures: int) -> dict[str, Any]:
        images = folder / f"images-{pictures}"
        write_pictures(images, pictures)
        asked = TranslateConfig(
            images=str(images), out=str(folder / name), instruction=(INSTRUCTION,), model=config.model
        )
        return run(asked)

    return measure("translate", config, job)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
