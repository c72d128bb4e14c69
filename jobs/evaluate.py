"""Measure a model: `python -m jobs.evaluate --task retrieval --json FILE`. Prints a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from llmvis.config import parse
from llmvis.entry import entry
from llmvis.evaluation import EvaluateConfig, evaluate_retrieval, table_rows, write_json

_HEAD = ("pool", "size", "R@1", "R@5", "R@10", "median rank", "random R@10", "shuffled R@10")


def main() -> None:
    """Command line."""
    config = parse(EvaluateConfig, "python -m jobs.evaluate")
    from llmvis.models.load import load_encoder

    result = evaluate_retrieval(config, load_encoder(config.encoder, device=config.device))
    table = Table(*_HEAD, title=f"text → picture, {result['encoder']}")
    for row in table_rows(result):
        table.add_row(*row)
    Console().print(table)
    for pool, why in result["skipped"].items():
        print(f"{pool}: left out, {why}")
    if config.json is not None:
        write_json(result, config.json)
        print(f"figures: {config.json}")


if __name__ == "__main__":
    entry(main)
