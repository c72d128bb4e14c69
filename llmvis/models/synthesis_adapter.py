"""Our `Synthesizer` as a `Translator` and a `Generator`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from llmvis.models.load_synthesis import MakeOptions
from llmvis.models.protocols import SynthesisInfo
from llmvis.models.references import References
from llmvis.models.sampling import Sampling
from llmvis.models.synthesizer import BEGUN, FAITHFUL, REFERENCE, SAMPLED, Synthesizer


class SynthesizerAdapter:
    """Translates in one faithful step; fills masks, and makes pictures from words, in sampled ones.

    Pictures from words begin from the nearest known drawing (`References`) unless
    `options.reference` is 0.
    """

    def __init__(self, model: Synthesizer, info: SynthesisInfo, options: MakeOptions) -> None:
        self.info, self._model = info, model
        self._share = REFERENCE if options.reference is None else options.reference
        self._references = References() if self._share else None
        given = options.given()
        given.pop("reference", None)
        self._translation: Sampling = replace(FAITHFUL, **given)
        self._sampling: Sampling = replace(SAMPLED, **given)
        self._generation: Sampling = replace(BEGUN if self._share else SAMPLED, **given)

    def translate(
        self, pictures: np.ndarray, instructions: Sequence[str], *, seeds: Sequence[int], ids: Sequence[str],
        masks: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """See `Translator.translate`."""
        if masks is None:
            return self._model.translate(pictures, instructions, seeds=seeds, ids=ids, how=self._translation)
        return self._model.inpaint(pictures, masks, instructions, seeds=seeds, ids=ids, how=self._sampling)

    def generate(
        self, prompts: Sequence[str], *, negatives: Sequence[str | None], seeds: Sequence[int],
        ids: Sequence[str],
    ) -> np.ndarray:  # fmt: skip
        """See `Generator.generate`."""
        begin = None
        if self._references is not None:
            begin = [self._references.picture(number) for number in self._references.nearest(prompts)]
        return self._model.generate(
            prompts, negatives=[text or "" for text in negatives], seeds=seeds, ids=ids,
            how=self._generation, begin=begin, share=self._share,
        )  # fmt: skip
