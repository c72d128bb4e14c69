"""Classic edits by their words: "a little brighter and crop to 16:9" → what Pillow does, exactly.

`parse_edit` reads an instruction and says either what it means, step by step, or that it is
no classic edit and so work for a model. It reads whole clauses: a word that it does not know
makes it give up, so "make the sky brighter" is never taken for "make it brighter". What it does
not know: English beyond its own wordings, parts of a picture, other languages, files, models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from llmvis.edit_steps import Step
from llmvis.edit_words import clauses_of, step_of, tidy
from llmvis.schema import UserError

MAX_WORDING = 300
"""Characters; a longer instruction is no classic edit."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Classic edits, one after the other. Comparable, hashable, picklable; the same on any machine."""

    steps: tuple[Step, ...]

    @property
    def changes_size(self) -> bool:
        """Whether the result may have another width or height."""
        return any(step.changes_size for step in self.steps)

    def __call__(self, image: Image.Image) -> Image.Image:
        """RGB or RGBA picture → a new picture; the mode stays, but for `on … ground`, which gives RGB.

        Raises `UserError` for another mode, and for a size that is too large.
        """
        if image.mode not in ("RGB", "RGBA"):
            raise UserError(f"a picture of mode {image.mode}: convert it to RGB or RGBA")
        for step in self.steps:
            image = step(image)
        return image

    def describe(self) -> str:
        """The canonical wording: `parse_edit(edit.describe()) == edit`."""
        return ", then ".join(step.describe() for step in self.steps)


def apply_region(original: Image.Image, edited: Image.Image, mask: Image.Image) -> Image.Image:
    """The edited picture where the mask is 255, the original where it is 0, a mix between.

    Args:
        original: RGB or RGBA.
        edited: RGB or RGBA, of the same size.
        mask: mode L, of the same size.

    Returns:
        RGB, or RGBA where one of the two is; colours are mixed in proportion to their alpha
        (premultiplied; Porter and Duff 1984), so a transparent side gives no colour away.

    Raises `UserError` for another size or another mode of the mask.
    """
    if edited.size != original.size:
        raise UserError(
            f"the edit made {original.width} x {original.height} into {edited.width} x {edited.height}: in a "
            "region use no edit that changes the size (bigger, smaller, resize, rotate, crop, trim)"
        )
    if mask.mode != "L" or mask.size != original.size:
        raise UserError(
            f"the mask is {mask.mode}, {mask.width} x {mask.height}: make it one channel of 0 to 255 (mode L), "
            f"{original.width} x {original.height} like the picture"
        )
    if original.mode == edited.mode == "RGB":
        return Image.composite(edited, original, mask)
    old, new = (np.asarray(image.convert("RGBA")) for image in (original, edited))
    share = np.asarray(mask, np.float32)[..., None] / 255
    weights = (1 - share) * old[..., 3:], share * new[..., 3:]
    alpha = weights[0] + weights[1]
    colour = (weights[0] * old[..., :3] + weights[1] * new[..., :3]) / np.maximum(alpha, 1e-6)
    mixed = np.concatenate([colour, alpha], axis=2).round().astype(np.uint8)
    # where one side has it all, its bytes, hidden colours too
    return Image.fromarray(np.where(share == 0, old, np.where(share == 1, new, mixed)))


def parse_edit(instruction: str) -> Edit | None:
    """What an instruction asks for, if every clause of it is a classic edit; else None.

    Clauses are joined by "and", "then", commas or full stops, and are done in their order.
    Amounts are optional ("by 20 %", "a little", "much", "to 512 px", "2x"). Nothing is guessed: a
    word too many, or a thing that is not the whole picture, and the answer is None.

    Raises `UserError` for an amount out of all reason, naming what is possible.
    """
    if len(instruction) > MAX_WORDING:
        return None
    steps = [step_of(clause) for clause in clauses_of(tidy(instruction))]
    known = tuple(step for step in steps if step is not None)
    return Edit(steps=known) if known and len(known) == len(steps) else None


def known_edits() -> list[tuple[str, str]]:
    """For help texts: an example wording of each classic edit, and what it does."""
    return list(_KNOWN)


_KNOWN = (
    ("black and white", "grey by luma"),
    ("20 % brighter", "or darker; also a little, much, twice as bright"),
    ("increase the contrast", "or reduce; away from or towards the mean grey"),
    ("more colourful", "or less; away from or towards grey"),
    ("a little warmer", "or cooler; more red and less blue, or the other way round"),
    ("sharpen it", "unsharp masking"),
    ("blur by 3 px", "Gaussian; an amount in % is of the shorter side"),
    ("twice as large", "or half size, 50 % bigger, 3x smaller"),
    ("resize to 512 px", "the longer side; also 512 px wide, 512 px high, 512x384"),
    ("mirror it", "left becomes right"),
    ("flip it upside down", "top becomes bottom"),
    ("rotate left", "or right, or by any number of degrees, clockwise or anticlockwise"),
    ("crop to a square", "from the middle"),
    ("crop to 16:9", "from the middle, any proportions"),
    ("trim the white border", "transparent ones too"),
    ("invert the colours", "a negative"),
    ("sepia", "brown tones"),
    ("posterise to 4 levels", "per channel"),
    ("autocontrast", "darkest to black and lightest to white, hues kept"),
    ("equalise", "a flat histogram per channel"),
    ("on a white background", "under transparent parts; also black, a colour, #rrggbb"),
)
