"""Vectors after CLIP's for the benchmarks of search, and times taken in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def unit(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


class Collection:
    """Pictures and texts in one space, with a gap between them: clusters of clusters on a sphere."""

    def __init__(self, rows: int, dim: int) -> None:
        chance = np.random.default_rng(0)
        coarse = chance.standard_normal((64, dim), np.float32)
        fine = coarse[chance.integers(0, 64, 4096)] + chance.standard_normal((4096, dim), np.float32)
        self._gap = unit(chance.standard_normal((1, dim)))
        pictures = fine[chance.integers(0, 4096, rows)]
        pictures += 1.5 * chance.standard_normal((rows, dim), np.float32)
        self.pictures = unit(unit(pictures) + 0.5 * self._gap)

    def texts(self, rows: np.ndarray, seed: int) -> np.ndarray:
        """A text for each of these pictures: near it, across the gap, with noise as long as 0.8 of it."""
        dim = self.pictures.shape[1]
        noise = np.random.default_rng(seed).standard_normal((len(rows), dim)) / dim**0.5
        return unit(self.pictures[rows] - self._gap + 0.8 * noise)


def seconds(runs: int, *calls: Callable[[], Any], rest: float = 0.1) -> list[list[float]]:
    """All times of each; they run in turn, so that a busy minute falls on all.

    rest: seconds between them. Threads of a library for matrices wait, busily, for a moment after their work, and
    would take the cores from the next.
    """
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(runs):
        for call, times in zip(calls, found, strict=True):
            time.sleep(rest)
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
    return found


def median(times: list[float]) -> float:
    return statistics.median(times)
