"""Names and keywords in nine languages → English, for a language model that reads only English.

The embedded collection carries its names and keywords in ten languages. That is a
dictionary: a name stands beside the English name of the same picture, and a keyword
beside the English word that goes with nearly the same pictures (highest Dice
coefficient). A query is rewritten only if it is not English already; what is not in the
dictionary stays as it is. It covers things, not sentences: verbs, grammar and whatever has
no emoji are outside it. A multilingual language model needs none of this.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from llmvis.data import EMOJI_LANGUAGES, load_emoji

_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")  # kana, han, hangul
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
_MIN_DICE = 0.3  # below this, two keywords only happen to meet
_MAX_WORDS = 6  # longest phrase looked up


class Glossary:
    """Foreign phrase → English phrase, and the set of words that are English already."""

    def __init__(self, phrases: Mapping[str, str], english: Iterable[str]) -> None:
        self._english = set(english)
        self._phrases = {phrase: text for phrase, text in phrases.items() if phrase not in self._english}
        self._longest = max((len(phrase) for phrase in self._phrases if _UNSPACED.search(phrase)), default=0)

    def __len__(self) -> int:
        return len(self._phrases)

    @staticmethod
    @cache
    def packaged() -> Glossary:
        """The glossary of the embedded collection."""
        return Glossary.from_rows(load_emoji().drop_columns(["image"]).to_pylist())

    @staticmethod
    def from_rows(rows: list[dict[str, Any]]) -> Glossary:
        """Build it from rows with `caption`, `keywords`, `name_<language>` and `keywords_<language>`."""
        english_of_row = [{_plain(word) for word in [row["caption"], *row["keywords"]]} for row in rows]
        english_count = Counter(word for words in english_of_row for word in words)
        phrases: dict[str, str] = {}
        for language in EMOJI_LANGUAGES:
            rows_of: dict[str, list[int]] = defaultdict(list)
            for i, row in enumerate(rows):
                for keyword in row[f"keywords_{language}"]:
                    rows_of[_plain(keyword)].append(i)
            for keyword, members in rows_of.items():
                shared = Counter(word for i in members for word in english_of_row[i])
                dice = {word: 2 * n / (len(members) + english_count[word]) for word, n in shared.items()}
                best = max(dice, key=lambda word: (dice[word], -len(word), word))
                if dice[best] >= _MIN_DICE:
                    phrases.setdefault(keyword, best)
        for language in EMOJI_LANGUAGES:  # a name is surer than a keyword
            for row in rows:
                if name := row[f"name_{language}"]:
                    phrases[_plain(name)] = row["caption"]
        words = {word for texts in english_of_row for text in texts for word in [text, *_WORD.findall(text)]}
        return Glossary(phrases, words)

    def to_english(self, text: str) -> str:
        """Rewrite the phrases that are known, longest first; English text comes back unchanged."""
        plain = _plain(text)
        if _UNSPACED.search(plain):
            return self._unspaced(plain)
        words = _WORD.findall(plain)
        if plain in self._english or not words:
            return text
        if plain in self._phrases:
            return self._phrases[plain]
        if 2 * sum(word in self._english for word in words) > len(words):
            return text  # most words are English: a foreign one among them is a name
        return self._spaced(words) or text

    def _spaced(self, words: list[str]) -> str:
        out, i, found = [], 0, False
        while i < len(words):
            for length in range(min(_MAX_WORDS, len(words) - i), 0, -1):
                phrase = " ".join(words[i : i + length])
                if phrase in self._phrases:
                    out.append(self._phrases[phrase])
                    found = True
                    break
            else:
                length = 1
                out.append(words[i])
            i += length
        return " ".join(out) if found else ""

    def _unspaced(self, text: str) -> str:
        out, i = [], 0
        while i < len(text):
            for length in range(min(self._longest, len(text) - i), 0, -1):
                if text[i : i + length] in self._phrases:
                    out.append(f" {self._phrases[text[i : i + length]]} ")
                    break
            else:
                length = 1
                out.append(text[i])
            i += length
        return " ".join("".join(out).split())


def _plain(text: str) -> str:
    """Lower case, one space between words, one form of each accented letter."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().replace(":", " ").split())
