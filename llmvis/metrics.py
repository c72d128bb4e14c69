"""Metrics of retrieval and of pictures, as pure functions on arrays. They know nothing of models, files or data.

Shape legend: Q queries, N pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def target_ranks(scores_QN: np.ndarray, targets_Q: np.ndarray) -> np.ndarray:
    """Rank (1 is best) of each query's right picture: float64 (Q,).

    Ties count as the mean of the places they share, so a constant score earns chance, not rank 1.

    Args:
        scores_QN: higher is better.
        targets_Q: column of the right picture of each query.
    """
    right = scores_QN[np.arange(len(targets_Q)), targets_Q][:, None]
    above = (scores_QN > right).sum(1)
    ties = (scores_QN == right).sum(1) - 1
    ranks: np.ndarray = 1.0 + above + ties / 2.0
    return ranks


def recall_at(ranks_Q: np.ndarray, k: int) -> float:
    """Share of queries, in per cent, whose right picture is among the first k."""
    return float(100.0 * np.mean(ranks_Q <= k))


def retrieval_summary(ranks_Q: np.ndarray) -> dict[str, float]:
    """`r_at_1`, `r_at_5`, `r_at_10` in per cent and `median_rank`."""
    summary = {f"r_at_{k}": recall_at(ranks_Q, k) for k in (1, 5, 10)}
    return summary | {"median_rank": float(np.median(ranks_Q))}


def retrieval_scores(
    texts_QD: np.ndarray, images_ND: np.ndarray, targets_Q: np.ndarray | None = None
) -> dict[str, float]:
    """`retrieval_summary` of unit-norm embeddings; the right picture of query i is `targets_Q[i]`, or i."""
    targets = np.arange(len(texts_QD)) if targets_Q is None else targets_Q
    return retrieval_summary(target_ranks(texts_QD @ images_ND.T, targets))


def psnr(made_BCHW: np.ndarray, real_BCHW: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each picture in dB, float64 (B,): 10 · log10(1 / MSE), values in 0 … 1.

    An exact copy counts as 100 dB, not infinity, so that a mean stays a number.
    """
    difference = made_BCHW.astype(np.float64) - real_BCHW.astype(np.float64)
    mse = (difference**2).mean(axis=tuple(range(1, difference.ndim)))
    decibels: np.ndarray = 10 * np.log10(1 / np.maximum(mse, 1e-10))
    return decibels


def mean_and_spread(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean of each metric over runs, and beside it `<metric>_sd`, the sample standard deviation."""
    out: dict[str, float] = {}
    for name in runs[0]:
        values = np.array([run[name] for run in runs])
        out[name] = float(values.mean())
        if len(runs) > 1:
            out[f"{name}_sd"] = float(values.std(ddof=1))
    return out
