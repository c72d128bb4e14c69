"""What would make an index better, by its manifest: compacting, another kind, training it anew.

Lists are trained once, and rows that are added later go into the lists that are there. Where they are
many, or unlike the first ones, lists grow long and uneven, and more must be read for the same recall.
Arithmetic on a manifest; reads no file.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llmvis.index.planner import FLAT_ROWS

GROWN = 4.0
"""Times the rows that it was trained for: by 4·√N, half as many lists as there should be."""
WORSE_FIT = 1.25
"""Times the mean distance, 1 - cosine, to a list's centroid."""
DEARER = 2.0
"""Times the vectors that a query reads for its recall."""

MANY_DEAD = 0.25
"""Share of rows from which compacting is worth its time."""


def advice(manifest: dict[str, Any], uri: str) -> list[str]:
    """A line for each thing to do, with the command; none where all is well."""
    lines, rows = [], manifest["rows"]
    again = f"python -m jobs.index --out {uri} --compact"
    dead = manifest["deleted"]["rows"] if "deleted" in manifest else 0
    if dead and dead >= MANY_DEAD * rows:
        lines.append(f"{dead / rows:.0%} of the rows in its files are deleted; take them out: {again}")
    if manifest["kind"] == "flat" and rows - dead > FLAT_ROWS:
        lines.append(
            f"{rows - dead:,} vectors are many for exact search; compress them: {again} --kind ivf_sq8"
        )
    if why := (drift(manifest) or {}).get("why"):
        lines.append(f"{why}; train it anew on its own vectors: {again} --retrain")
    return lines


def drift(manifest: dict[str, Any]) -> dict[str, Any] | None:
    """How far it has drifted: `grown`, `distance`, `cost`, each as a ratio to when it was trained, and `why` or None.

    `distance` is that of rows added since, None where there are none. None for an exact index, or one that
    does not say how it was when it was trained.
    """
    trained = manifest.get("trained", {})
    if not all(trained.get(name) for name in ("rows", "fit", "share_of_exact")):
        return None
    version = trained["name"].removeprefix("shards/").removesuffix(".trained")
    added = [s for s in manifest["shards"] if not s["lists"]["name"].startswith(f"shards/{version}-")]
    grown = manifest["rows"] / trained["rows"]
    # a query of a grown index reads more, but also a smaller share: what counts is the share
    cost = manifest["tuned"]["share_of_exact"] / trained["share_of_exact"]
    distance = None
    if added:
        fit = np.average([s["lists"]["fit"] for s in added], weights=[s["rows"] for s in added])
        distance = float(1 - fit) / max(1 - trained["fit"], 1e-6)
    why = []
    if grown >= GROWN:
        why.append(f"it holds {grown:.1f} times the vectors that its lists were made for")
    if distance is not None and distance >= WORSE_FIT:
        why.append(f"vectors added since lie {distance:.2f} times as far from its lists' centres")
    if cost >= DEARER:
        why.append(f"a query reads {cost:.1f} times the share of it for the same recall")
    return {
        "grown": round(grown, 3),
        "distance": None if distance is None else round(distance, 3),
        "cost": round(cost, 3),
        "why": "; ".join(why) or None,
    }
