"""Enhancements by their words: "remove the noise", "deblur it", "upscale 2x" → which of three tasks.

They stand between classic edits, which compute (`edits`), and the synthesis model, which makes
things up: a small network puts back what noise, blur or a small size took away
(`models.restorer`). The border to the classic edits is sharp and lies in the words:

    sharper, sharpen, less blurred       unsharp masking, a classic edit
    deblur, remove the blur              the network
    2x, twice as large, enlarge it       resampling, a classic edit
    upscale 2x, super-resolve, … with detail   the network, always to twice the size

What it does not know: other factors than 2, several tasks in one instruction, parts of a picture,
other languages, pixels, models.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

from llmvis.edit_words import clauses_of, tidy
from llmvis.edits import MAX_WORDING
from llmvis.images import MAX_PIXELS
from llmvis.schema import UserError

Task = Literal["denoise", "deblur", "enlarge"]
TASKS: tuple[Task, ...] = get_args(Task)
"""In the order in which the network knows them; a new one goes to the end."""

_NOISE = r"(?:(?:image|colour|digital|sensor|film) )?(?:noise|grain)"
_BLUR = r"(?:blur|blurriness)"
_REMOVE = r"(?:remove|reduce|take (?:away|out)|get rid of|clean(?: up)?|filter out|suppress|undo|correct)"
_OF_IT = r"(?: (?:from|of|in) it)?"
_LEAD = r"(?:(?:make|turn|render|get) it )?"
_TWO = r"(?:2 ?x|x ?2|twice|double|two times|2 times|two-?fold|(?:by )?(?:a )?factor (?:of )?(?:2|two)|by (?:2|two))"
_ITS_SIZE = r"(?: (?:(?:as )?(?:large|big)|(?:the |its )?(?:original |current )?size|larger|bigger))?"
_GROW = r"(?:enlarge|upscale|upsample|resize|scale(?: up)?|double|blow up|magnify)"
_DETAIL = (
    r"(?:with|in|and add|adding|keeping) (?:more |fine |finer |full |sharp |crisp )?(?:details?|sharpness)"
)

_WORDINGS: dict[Task, str] = {
    "denoise": rf"de-?noise(?: it)?|{_REMOVE} (?:all )?(?:the |its )?{_NOISE}{_OF_IT}"
    rf"|(?:noise|grain) (?:reduction|removal)|{_LEAD}(?:less (?:noisy|grainy)|noise-?free)|less {_NOISE}",
    "deblur": rf"(?:de-?blur|un-?blur)(?: it)?|{_REMOVE} (?:all )?(?:the |its )?{_BLUR}{_OF_IT}|blur removal",
    "enlarge": rf"super[- ]?resol(?:ve|ution)(?: it)?(?: (?:to |by )?{_TWO}{_ITS_SIZE})?"
    rf"|(?:upscale|upsample)(?: it)?(?: to| by)? {_TWO}{_ITS_SIZE}"
    rf"|{_TWO} (?:super[- ]?resolution|upscal(?:e|ing)|upsampling)"
    rf"|{_GROW}(?: it)?(?:(?: to| by)? {_TWO}{_ITS_SIZE})? {_DETAIL}"
    rf"|(?:make it )?{_TWO}{_ITS_SIZE} {_DETAIL}",
}
_RULES = {task: re.compile(wording) for task, wording in _WORDINGS.items()}


def parse_enhancement(instruction: str) -> Task | None:
    """The task that an instruction asks for, if it asks for one and nothing else; else None.

    Spelling, manners ("please", "can you") and the many words for "the picture" do not matter. As
    with classic edits nothing is guessed: one word too many, and the answer is None.
    """
    if len(instruction) > MAX_WORDING:
        return None
    clauses = clauses_of(tidy(instruction).rstrip(" ?"))
    if len(clauses) != 1:
        return None
    return next((task for task, rule in _RULES.items() if rule.fullmatch(clauses[0])), None)


def check_size(task: Task, width: int, height: int, *, region: bool) -> None:
    """Raises `UserError` where a picture of this size can't be given the task; region: only a part is to change."""
    if task != "enlarge":
        return
    if region:
        raise UserError(
            f"enlarging would make {width} x {height} into {2 * width} x {2 * height}: in a region use no edit that "
            "changes the size; denoise and deblur work there"
        )
    if 4 * width * height > MAX_PIXELS:
        raise UserError(
            f"{2 * width} x {2 * height} is more than {MAX_PIXELS:,} pixels: enlarge smaller pictures"
        )
