"""A run's metrics as a picture of curves."""

from __future__ import annotations

import json
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

HIDDEN = {"time", "steps_per_second", "gan_weight"}


def draw_curves(metrics: Path, out: Path) -> bool:
    """Draws `metrics.jsonl`: one small plot for each metric, training and evaluation apart.

    False where matplotlib is missing: a bare machine that only trains has no need of it.
    """
    if find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for line in metrics.read_text().splitlines():
        told = json.loads(line)
        step, kind = told.pop("step"), told.pop("kind")
        for name, value in told.items():
            if name not in HIDDEN:
                found[f"{kind}: {name}"].append((step, value))
    columns = min(4, max(1, len(found)))
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.2 * rows), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for place, (name, points) in enumerate(sorted(found.items()), start=1):
        axes = figure.add_subplot(rows, columns, place)
        axes.plot(*zip(*points, strict=True), linewidth=1.2, marker="." if len(points) < 12 else None)
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
    canvas.print_figure(out, dpi=110)
    return True
