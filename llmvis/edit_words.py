"""One clause of English → the classic edit that it asks for, or none.

A clause must be understood to its last word. `tidy` brings spellings and the many words for "the
picture" to one form, an amount ("20 %", "a little") is taken out, and what is left must match a
rule as a whole. What it does not know: whole sentences (see `edits`), what an edit does to pixels.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from PIL import ImageColor

from llmvis.edit_steps import Blur, Crop, Ground, Plain, Posterise, Resize, Rotate, Step, Tone, Trim

_PHOTO = r"(?:picture|image|photo|photograph|pic)s?"
_DRAWING = r"(?:drawing|painting|illustration|scan|icon)s?"  # without "the" it may be a style to turn into
_THE = r"(?:the|this|that|my|these|all|all the|each|every) (?:whole |entire )?"
_TIDY = [
    (r"[’‘]", "'"),
    (r"×", "x"),
    (r" ?(?:percent|per cent|pct)\b", " %"),
    (r"\bcolor", "colour"),
    (r"\bgray", "grey"),
    (r"\bcenter", "centre"),
    (r"(poster|equal|normal)iz", r"\1is"),
    (r"\bblack ?(?:-?and-?|&|n) ?white\b|\bb ?(?:&|/) ?w\b", "grey"),
    (r"\bgrey[- ]?scale\b", "grey"),
    (rf"\b(?:{_THE}(?:{_PHOTO}|{_DRAWING})|{_PHOTO})\b", "it"),
    (r"\b(?:this|that|them|these|everything)\b", "it"),
]


def tidy(text: str) -> str:
    """Lower case, British spelling, single spaces, and `it` for every way to say "the picture"."""
    text = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    for pattern, replacement in _TIDY:
        text = re.sub(pattern, replacement, text)
    return text


_MANNERS = re.compile(
    r"^(?:(?:please|kindly|now|also|just|first|finally|then|can you|could you|would you|i want|i'd like|i would like"
    r"|you to) )+| (?:too|as well)$"
)

_NUMBER = r"\d+(?:\.\d+)?"
_LITTLE = r"just a bit|a (?:little|tiny|wee|small)(?: bit)?|a (?:bit|touch|tad|shade)|slightly|somewhat"
_MUCH = r"very much|much|very|a lot|a great deal|strongly|heavily|considerably|significantly|far"
_AMOUNT = re.compile(rf"(?:\bby )?(?:\b(?P<percent>{_NUMBER}) ?%|\b(?P<little>{_LITTLE})\b|\b(?:{_MUCH})\b)")
_ANY_AMOUNT = rf"(?:(?:by )?{_NUMBER} ?%|{_LITTLE}|{_MUCH})"

_DEFAULTS = {
    "brightness": (10, 25, 50),
    "contrast": (10, 25, 50),
    "colour": (15, 40, 80),
    "warmth": (5, 10, 20),
    "sharpness": (50, 100, 200),
    "blur": (0.5, 1, 3),
    "size": (10, 25, 50),
}
"""Percent for "a little", for no amount, and for "much"."""


@dataclass(frozen=True)
class _Amount:
    """How much: a percentage, or a place among the defaults of a quality."""

    percent: float | None = None
    place: int = 1

    def of(self, quality: str) -> float:
        return float(_DEFAULTS[quality][self.place]) if self.percent is None else self.percent


def _take_amount(clause: str) -> tuple[str, _Amount | None]:
    """The clause without its first amount, and that amount."""
    if (found := _AMOUNT.search(clause)) is None:
        return clause, None
    rest = " ".join((clause[: found.start()] + " " + clause[found.end() :]).split())
    if found["percent"]:
        return rest, _Amount(float(found["percent"]))
    return rest, _Amount(place=0 if found["little"] else 2)


_Maker = Callable[[re.Match[str], _Amount], Step | None]
_RULES: list[tuple[re.Pattern[str], bool, _Maker]] = []
"""Wording without its amount; whether it takes one; what it means. The first that matches decides."""

_LEAD = (  # before a description: "brighter", "make it brighter", "turn it into a negative"
    r"(?:(?:make|turn|render|have|want|get|set|give|convert|change|transform|put|show)(?: it)?"
    r"(?: look| appear| be)?(?: to| into| in| at)? |(?:it|in|into|to|at) )?"
)


def _rule(wording: str, make: _Maker, graded: bool = False) -> None:
    _RULES.append((re.compile(wording), graded, make))


_PLAIN = {
    "grey": rf"{_LEAD}(?:an? )?grey(?: it| version| tones)?|desaturate(?: it)?"
    r"|remove (?:all )?(?:the )?colours?(?: (?:from|of) it)?",
    "sepia": rf"(?:{_LEAD}|add |apply )(?:an? )?sepia(?: tones?| toned| effect| filter)?(?: it)?",
    "invert": rf"{_LEAD}(?:inverted|(?:an? )?negative)|invert(?: it)?(?:(?: all)?(?: the)? colours?)?(?: of it)?",
    "mirror": rf"{_LEAD}(?:mirrored|flipped)|horizontal flip"
    r"|(?:mirror|flip)(?: it)?(?: horizontally| left[- ](?:to[- ])?right| sideways)?",
    "flip upside down": r"(?:mirror|flip)(?: it)? (?:upside[- ]down|vertically|top[- ](?:to[- ])?bottom)"
    r"|vertical flip",
    "autocontrast": r"(?:(?:use|apply) )?auto(?:matic)?[- ]?contrast(?: it)?"
    r"|(?:stretch|normalise|auto-?adjust) (?:the )?contrast(?: of it)?",
    "equalise": r"equalise(?: it)?(?: (?:the )?(?:histogram|tones))?(?: of it)?",
}


def _named(name: str) -> _Maker:
    return lambda found, amount: Plain(name=name)


for _name, _wording in _PLAIN.items():
    _rule(_wording, _named(_name))

_MORE = r"increase|raise|boost|enhance|strengthen|turn up|add more|add|more|higher|stronger"
_LESS = r"decrease|reduce|lower|weaken|turn down|less|weaker"
_COLOURFUL = r"colourful|saturated|vivid|vibrant"


@dataclass(frozen=True, kw_only=True)
class _Words:
    """Wordings of a quality: descriptions, verbs for more and for less, nouns; empty where there are none."""

    more: str
    less: str = ""
    raises: str = ""
    lowers: str = ""
    noun: str


_QUALITIES = {
    "brightness": _Words(
        more=r"brighter|lighter|less dark",
        less=r"darker|dimmer|less bright",
        raises=r"(?:brighten|lighten)(?: up)?(?: it)?(?: up)?",
        lowers=r"(?:darken|dim)(?: it)?",
        noun=r"brightness|exposure",
    ),
    "contrast": _Words(
        more=r"more contrasty|contrastier",
        less=r"less contrasty",
        noun=r"contrast",
    ),
    "colour": _Words(
        more=rf"more (?:{_COLOURFUL})",
        less=rf"less (?:{_COLOURFUL})",
        raises=r"saturate(?: it)?",
        lowers=r"desaturate(?: it)?",
        noun=r"(?:colour )?saturation|colourfulness|vibrance",
    ),
    "warmth": _Words(
        more=r"warmer|less cold|less cool",
        less=r"cooler|colder|less warm",
        raises=r"warm(?: up)? it(?: up)?",
        lowers=r"cool(?: down)? it(?: down)?",
        noun=r"warmth",
    ),
    "sharpness": _Words(
        more=r"sharper|crisper|less blurry|less blurred", raises=r"sharpen(?: it)?", noun=r"sharpness"
    ),
    "blur": _Words(
        more=r"blurrier|blurry|blurred|more blurred|less sharp", raises=r"blur(?: it)?", noun=r"blur"
    ),
    "size": _Words(
        more=r"bigger|larger",
        less=r"smaller",
        raises=r"(?:enlarge|upscale)(?: it)?|(?:blow|scale)(?: it)? up(?: it)?",
        lowers=r"(?:shrink|downscale|downsize)(?: it)?|scale(?: it)? down(?: it)?",
        noun=r"size",
    ),
}
_NOUNS = "|".join(words.noun for words in _QUALITIES.values())


def _graded(quality: str, sign: int) -> _Maker:
    def make(found: re.Match[str], amount: _Amount) -> Step:
        percent = amount.of(quality)
        if quality == "blur":
            return Blur(amount=percent, unit="%")
        if quality == "size":
            return Resize(rule="%", first=100 + sign * percent)
        return Tone(quality=quality, percent=sign * percent)  # type: ignore[arg-type]

    return make


for _name, _words in _QUALITIES.items():
    for _sign, _described, _verb, _turn in (
        (1, _words.more, _words.raises, _MORE),
        (-1, _words.less, _words.lowers, _LESS),
    ):
        if _described:  # else there is no such direction
            _of_it = rf"(?: (?:the|its|it|it's))? (?:{_words.noun})(?: (?:of|in|to) it)?"
            _rule(f"{_LEAD}(?:{_described})", _graded(_name, _sign), True)
            _rule(rf"{_LEAD}(?:with )?(?:{_turn}){_of_it}", _graded(_name, _sign), True)
        if _verb:
            _rule(_verb, _graded(_name, _sign), True)

_TIMES = rf"(?P<times>twice|double|three times|triple|four times|half|{_NUMBER} ?(?:x|times))"
_TIMES_WORDS = {
    "twice": 2.0,
    "double": 2.0,
    "three times": 3.0,
    "triple": 3.0,
    "four times": 4.0,
    "half": 0.5,
}
_ITS_SIZE = r"(?:(?:as (?:large|big))|(?:the |its )?(?:original |current )?size)"
_RESIZE = r"(?:resize|scale|shrink|enlarge|downscale|downsize|upscale|reduce|blow)(?: it)?(?: up| down)?"


def _times(text: str) -> float:
    return _TIMES_WORDS.get(text) or float(text.removesuffix("times").removesuffix("x"))


def _scaled(found: re.Match[str], amount: _Amount) -> Step | None:
    times = _times(found["times"])
    down = re.search(r"shrink|down|reduce|smaller", found[0]) is not None
    if times < 1 and re.search(r"enlarge|up\b|bigger|larger", found[0]):
        return None  # "enlarge by half" may mean two things
    return Resize(rule="%", first=round(100 / times, 4) if down and times > 1 else 100 * times)


_rule(rf"{_LEAD}{_TIMES} (?:{_ITS_SIZE}|bigger|larger|smaller)", _scaled)
_rule(rf"{_LEAD}smaller by (?P<times>half)", _scaled)
_rule(rf"(?:{_RESIZE}(?: to| by)? |make it )?(?P<times>{_NUMBER} ?x)", _scaled)
_rule(rf"{_RESIZE}(?: to| by)? {_TIMES}(?: {_ITS_SIZE})?", _scaled)
_rule(rf"{_RESIZE} by a factor of (?P<times>{_NUMBER})", _scaled)
_rule(
    rf"(?:resize|scale)(?: it)?|(?:{_RESIZE}|(?:{_MORE}|{_LESS}) (?:the|its) size(?: of it)?) to",
    lambda found, amount: Resize(rule="%", first=amount.percent) if amount.percent is not None else None,
    True,
)
_BRIGHT_AS = {"bright": "brightness", "contrasty": "contrast", "colourful": "colour", "saturated": "colour"}
_rule(
    rf"{_LEAD}{_TIMES} as (?P<what>{'|'.join(_BRIGHT_AS)})",
    lambda found, amount: _graded(_BRIGHT_AS[found["what"]], 1)(
        found, _Amount(100 * (_times(found["times"]) - 1))
    ),
)

_TO_SIZE = rf"(?:(?:{_RESIZE}|make it) (?:to )?|to )?"
_SIDES = {"wide": "px wide", "width": "px wide", "high": "px high", "tall": "px high", "height": "px high"}


def _to_side(found: re.Match[str], amount: _Amount) -> Step:
    rule = _SIDES.get(found["side"] or "", "px")
    return Resize(rule=rule, first=int(found["pixels"]))  # type: ignore[arg-type]


_rule(
    rf"{_TO_SIZE}(?P<pixels>\d+) ?(?:px|pixels?)"
    r"(?: (?:in )?(?P<side>wide|width|high|tall|height)| on (?:the|its) longe(?:r|st) side)?",
    _to_side,
)
_rule(rf"{_RESIZE} to (?P<pixels>\d+)(?P<side>)", _to_side)
_rule(
    rf"{_TO_SIZE}(?:a )?(?P<side>width|height) (?:of )?(?P<pixels>\d+)(?: ?(?:px|pixels?))?",
    _to_side,
)
_rule(
    rf"{_TO_SIZE}(\d+) ?(?:px )?(?:x|by) ?(\d+)(?: ?(?:px|pixels?))?",
    lambda found, amount: Resize(rule="x", first=int(found[1]), second=int(found[2])),
)
_rule(
    rf"(?:blur(?: it)?|add (?:a )?blur)(?: by| of)? ({_NUMBER}) ?(?:px|pixels?)",
    lambda found, amount: Blur(amount=float(found[1]), unit="px"),
)

_WAY = r"(?: (?:to the )?(?P<way{}>right|clockwise|left|anti-?clockwise|counter-?clockwise))"
_ROTATE = r"(?:rotate|turn)(?: it)?"


def _turned(found: re.Match[str], amount: _Amount) -> Step:
    told = found.groupdict()
    degrees = float(told.get("degrees") or 90)
    if (told.get("way1") or told.get("way2") or "right") not in ("right", "clockwise"):
        degrees = -degrees
    return Rotate(degrees=degrees if -180 < degrees <= 180 else 180 - (180 - degrees) % 360)


_rule(rf"{_ROTATE}{_WAY.format(1)}(?: (?:by )?(?:a )?quarter(?: turn)?)?", _turned)
_rule(rf"{_ROTATE}(?: by)?(?: a| one)? quarter(?: turn)?{_WAY.format(1)}?", _turned)
_rule(
    rf"{_ROTATE}{_WAY.format(1)}?(?: by)? (?P<degrees>-?{_NUMBER}) ?(?:degrees?|deg|°){_WAY.format(2)}?",
    _turned,
)
_rule(
    rf"(?:{_ROTATE} )?upside[- ]down|{_ROTATE}(?: by)?(?: a)? half turn",
    lambda found, amount: Rotate(degrees=180.0),
)

_rule(
    r"crop(?: it)?(?: to| into| as)?(?: a| the)?(?: central| centre)? square|(?:a )?square crop|make it (?:a )?square",
    lambda found, amount: Crop(ratio=(1, 1)),
)
_rule(
    r"(?:crop(?: it)?(?: to)?|make it|to) (?:an? )?(?:aspect )?(?:ratio )?(?:of )?(\d+) ?: ?(\d+)"
    r"(?: (?:aspect|aspect ratio|ratio|format|proportions|crop))?",
    lambda found, amount: Crop(ratio=(int(found[1]), int(found[2]))),
)
_rule(
    r"trim(?: it)?|trim(?: away| off)? (?:the |its )?(?:borders?|margins?)(?: (?:of|from|around) it)?"
    r"|(?:trim|crop|cut|remove|crop out)(?: away| off)? (?:the |its |all )?(?:white|blank|empty|transparent)"
    r" (?:borders?|margins?|edges|space)(?: (?:of|from|around) it)?",
    lambda found, amount: Trim(),
)
_rule(
    r"posterise(?: it)?(?: to (\d+) (?:levels?|tones|shades|colours)(?: per channel| each)?)?",
    lambda found, amount: Posterise(levels=int(found[1] or 4)),
)

_HEX = r"#(?:[0-9a-f]{3}){1,2}"
_COLOURS = rf"(?P<colour>{_HEX}|white|black|grey|red|green|blue|yellow|orange|pink|purple|brown)"


def _on_ground(found: re.Match[str], amount: _Amount) -> Step:
    red, green, blue = ImageColor.getrgb(found["colour"])[:3]
    return Ground(colour=(red, green, blue))


_rule(rf"(?:put it )?on (?P<colour>{_HEX}|white|black)", _on_ground)
_rule(
    rf"(?:put it )?on (?:an? )?(?:plain |solid )?{_COLOURS} (?:ground|background|backdrop)",
    _on_ground,
)
_rule(
    r"fill (?:the )?(?:transparent (?:parts|areas|pixels|background|ground)|transparency) with " + _COLOURS,
    _on_ground,
)

_SHARED = re.compile(
    rf"(?P<before>{_ANY_AMOUNT} )?\b(?P<turn>{_MORE}|{_LESS})(?: the)? (?P<one>{_NOUNS}) and (?:the )?(?P<two>{_NOUNS})"
    rf"(?P<after> {_ANY_AMOUNT})?"
)
_BETWEEN = re.compile(
    r"\s*(?:[;!]|[,.](?!\d))\s*(?:and then |and |then )?|\s+(?:and then|and also|and|then|after that|plus|&|\+)\s+"
)


def clauses_of(text: str) -> list[str]:
    """A tidy sentence → its clauses, manners left out.

    Two nouns that share words get them each: "increase contrast and saturation by 20 %".
    """

    def apart(found: re.Match[str]) -> str:
        words = {name: found[name] or "" for name in ("before", "turn", "after")}
        each = [f"{words['before']}{words['turn']} {found[n]}{words['after']}" for n in ("one", "two")]
        return ", ".join(each)

    text = re.sub(r",? please\b", "", _SHARED.sub(apart, text))
    return [_MANNERS.sub("", part) for part in _BETWEEN.split(text) if part]


def step_of(clause: str) -> Step | None:
    """What a tidy clause asks for; None where it is no classic edit.

    Raises `UserError` where it is one with an absurd amount.
    """
    rest, amount = _take_amount(clause)
    for wording, graded, make in _RULES:
        if (graded or amount is None) and (found := wording.fullmatch(rest)):
            return make(found, amount or _Amount())
    return None
