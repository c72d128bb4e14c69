"""Search on a GPU: the same answers as the processor's. Marked tests need one; the rest is what does not."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
from test_approximate import DIM, KINDS, PICTURES, ROWS, brute_force, found, lists_of, make, texts

from llmvis.index import ann, gpu, open_index
from llmvis.index.exact import FEW_QUERIES

QUERIES = texts(np.arange(0, ROWS, 60), 5)


def half_precision() -> faiss.Index:
    """On the processor what `GpuIndexFlat` keeps on a GPU: vectors as fp16."""
    return faiss.IndexScalarQuantizer(DIM, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)


def test_lists_of_shards_are_merged_to_what_was_made_in_one_go(tmp_path: Path) -> None:
    blob = ann.train(PICTURES[:4000], "IVF64,SQ8")
    parts = lists_of(tmp_path, blob, [0, 1, 2000, 3333, ROWS])
    scores, rows = parts.search(QUERIES, 30, 7)  # which leaves the lists of the last one in the trained index
    whole = gpu.merged(parts._index, parts._lists)
    assert whole.ntotal == ROWS and parts._index.ntotal == 0
    whole.nprobe = 7
    np.testing.assert_array_equal(whole.search(QUERIES, 30)[1], rows)
    np.testing.assert_array_equal(parts.search(QUERIES, 30, 7)[1], rows)
    np.testing.assert_allclose(whole.search(QUERIES, 30)[0], scores, atol=1e-6)


def test_what_is_proposed_is_proven_or_searched_for_again(tmp_path: Path) -> None:
    make(tmp_path, "flat")
    true = brute_force(QUERIES, 10, np.arange(ROWS))
    codes = PICTURES.astype(np.float16)
    index, longest = gpu.fill(half_precision(), [codes[:2500], codes[2500:]])
    assert longest == pytest.approx(1, abs=1e-3)
    proposed, others = gpu.propose(index, longest, QUERIES, 10)
    with open_index(str(tmp_path)) as opened:
        np.testing.assert_array_equal(opened._proven(proposed, others, QUERIES, 10)[1], true)
        scores = opened.search(QUERIES, 37)[0]
        assert (others >= scores[:, 36]).all(), "no other row has more"
        assert (others < scores[:, 9]).mean() > 0.9, (
            "and it is seldom that one could have more than the tenth"
        )
        wrong = proposed + 1  # not even near, and said to be possibly so
        np.testing.assert_array_equal(opened._proven(wrong % ROWS, others + 9, QUERIES, 10)[1], true)


def test_a_few_vectors_are_all_proposed() -> None:
    index, longest = gpu.fill(half_precision(), [PICTURES[:20].astype(np.float16)])
    rows, others = gpu.propose(index, longest, QUERIES, 10)
    assert rows.shape == (len(QUERIES), 20) and (others == -np.inf).all()


gpu_only = pytest.mark.skipif(not gpu.available(), reason="needs a GPU and faiss-gpu")


@pytest.mark.gpu
@gpu_only
@pytest.mark.parametrize("kind", ["flat", *KINDS])
def test_a_gpu_finds_what_the_processor_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    make(tmp_path, kind)
    assert len(QUERIES) > FEW_QUERIES
    with open_index(str(tmp_path)) as index:
        exact, near = index.search(QUERIES, 10, exact=True), index.search(QUERIES, 10)
    monkeypatch.setattr(gpu, "available", lambda: False)
    with open_index(str(tmp_path)) as index:
        np.testing.assert_array_equal(exact[1], index.search(QUERIES, 10, exact=True)[1])
        np.testing.assert_allclose(exact[0], index.search(QUERIES, 10, exact=True)[0], atol=1e-6)
        assert found(near[1], index.search(QUERIES, 10)[1]) >= 0.99  # of lists codes may round otherwise


@pytest.mark.gpu
@gpu_only
def test_k_means_on_a_gpu_is_as_good() -> None:
    errors = []
    for on_gpu in (False, True):
        ivf = faiss.index_factory(DIM, "IVF64,Flat", faiss.METRIC_INNER_PRODUCT)
        if on_gpu:
            gpu.assign_on_gpu(ivf)
        ivf.train(PICTURES)
        errors.append(float(ivf.quantizer.search(PICTURES, 1)[0].mean()))
    assert errors[1] == pytest.approx(errors[0], rel=0.01)
