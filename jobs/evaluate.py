"""Measure a model: `python -m jobs.evaluate --task retrieval --json FILE`. Prints a table."""

from __future__ import annotations

from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from llmvis.config import parse
from llmvis.entry import entry
from llmvis.evaluation import EvaluateConfig, evaluate_retrieval, table_rows, write_json

_HEAD = ("pool", "size", "R@1", "R@5", "R@10", "median rank", "random R@10", "shuffled R@10")


def main() -> None:
    """Command line."""
    config = parse(EvaluateConfig, "python -m jobs.evaluate")
    ways = {"retrieval": _retrieval, "enhance": _enhance}
    result = ways.get(config.task, _synthesis)(config)
    if config.json is not None:
        write_json(result, config.json)
        print(f"figures: {config.json}")


def _retrieval(config: EvaluateConfig) -> dict[str, Any]:
    from llmvis.models.load import load_encoder

    result = evaluate_retrieval(config, load_encoder(config.encoder, device=config.device))
    _print(f"text → picture, {result['encoder']}", _HEAD, table_rows(result))
    for pool, why in result["skipped"].items():
        print(f"{pool}: left out, {why}")
    return result


def _synthesis(config: EvaluateConfig) -> dict[str, Any]:
    from llmvis import evaluation_synthesis as judging
    from llmvis.evaluation_imagine import evaluate_imagine
    from llmvis.models.load import load_encoder
    from llmvis.models.synthesizer_files import load_synthesizer
    from llmvis.models.two_tower import load_two_tower
    from llmvis.recipe import read_recipe

    model = load_synthesizer(config.model, config.device)
    judge = judging.Judge(load_encoder(config.encoder), load_two_tower().model)

    def measure(run: judging.Synthesise) -> dict[str, Any]:
        side, most = model.side, config.max_rows
        if config.task == "reconstruct":
            return judging.evaluate_reconstruct(side, run, judge, most)
        if config.task == "translate":
            return judging.evaluate_translate(side, run, judge, read_recipe(config.recipe), most)
        if config.task == "generate":
            return judging.evaluate_generate(side, run, judge, most=most)
        if config.task == "imagine":
            return evaluate_imagine(side, run, judge, most)
        return judging.evaluate_caption(side, run, judge, lambda texts: model.words(texts)[0].numpy(), most)

    if config.actors:
        from llmvis.cluster.evaluate import on_actors
        from llmvis.cluster.session import session

        with session():
            result = measure(on_actors(config.model, config.actors, config.gpus_per_actor))
    else:
        result = measure(partial(judging.run_rows, model))
    pictures = result.pop("grids")
    if config.task == "generate" and config.html is not None:
        pictures += _why(model, judge, pictures[0])
    result |= {"model": config.model or "packaged", "fingerprint": model.fingerprint, "side": model.side}
    _show(config, result, pictures, f"{model.side} px")
    return result


def _enhance(config: EvaluateConfig) -> dict[str, Any]:
    from llmvis.evaluation_enhance import SIDE, evaluate_enhance
    from llmvis.models.load_restorer import load_picture_restorer

    restorer = load_picture_restorer(config.model, device=config.device)
    result = evaluate_enhance(restorer, config.max_rows)
    pictures = result.pop("grids")
    result |= {"model": restorer.info.name, "fingerprint": restorer.info.fingerprint, "side": SIDE}
    _show(config, result, pictures, f"held-out Noto emoji, {SIDE} px, spoilt here")
    return result


def _show(config: EvaluateConfig, result: dict[str, Any], pictures: list[Any], note: str) -> None:
    """Figures on the terminal, and on the page if there is to be one."""
    from llmvis.evaluation_synthesis import figure_tables
    from llmvis.report import grids

    tables = figure_tables(result)
    for table in tables:
        _print(f"{config.task}: {table.title}", table.head, table.rows)
    if config.html is not None:
        grids(config.html, f"{config.task}: held-out pictures", pictures, tables, note=note)
        print(f"page: {config.html}")


def _why(model: Any, judge: Any, generated: Any) -> list[Any]:
    """Heat maps over what was generated; Grad-CAM only of an encoder of ours."""
    from llmvis.evaluation_why import attention_grid, saliency_grid
    from llmvis.models.two_tower import TwoTowerEncoder

    made, captions = dict(generated.rows)["made"], list(generated.captions)
    grids = [attention_grid(model, x, text) for x, text in zip(made[:3], captions[:3], strict=True)]
    if isinstance(judge.encoder, TwoTowerEncoder):
        grids.append(saliency_grid(judge.encoder, made, captions))
    return grids


def _print(title: str, head: Any, rows: Any) -> None:
    table = Table(*head, title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    entry(main)
