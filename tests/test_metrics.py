"""Metrics against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from llmvis.metrics import mean_and_spread, recall_at, retrieval_scores, retrieval_summary, target_ranks


def test_ranks_count_what_scores_higher() -> None:
    scores = np.array([[0.9, 0.1, 0.5], [0.2, 0.3, 0.8], [0.1, 0.2, 0.0]])
    assert target_ranks(scores, np.array([0, 1, 2])).tolist() == [1.0, 2.0, 3.0]


def test_ties_share_the_mean_place_so_a_constant_score_earns_chance() -> None:
    ranks = target_ranks(np.zeros((4, 5)), np.arange(4))
    assert ranks.tolist() == [3.0] * 4
    assert recall_at(ranks, 1) == 0.0


def test_a_target_may_be_any_column() -> None:
    assert target_ranks(np.array([[0.1, 0.2, 0.9]]), np.array([0])).tolist() == [3.0]


def test_summary_by_hand() -> None:
    summary = retrieval_summary(np.array([1, 2, 6, 11]))
    assert summary == {"r_at_1": 25.0, "r_at_5": 50.0, "r_at_10": 75.0, "median_rank": 4.0}


def test_scores_of_equal_embeddings_are_perfect() -> None:
    assert retrieval_scores(np.eye(12), np.eye(12))["r_at_1"] == 100.0


def test_mean_and_sample_deviation() -> None:
    assert mean_and_spread([{"r": 1.0}, {"r": 3.0}]) == {"r": 2.0, "r_sd": pytest.approx(2**0.5)}
    assert mean_and_spread([{"r": 1.0}]) == {"r": 1.0}
