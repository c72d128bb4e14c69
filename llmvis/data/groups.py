"""Leak groups and the fixed split of the embedded collection.

Pictures that are drawings of the same thing must sit on one side of a split, or a score
measures memory: the man, the woman and the person of one job; twenty-four clock faces;
flags. A group is a connected component over three kinds of link: the same name once
gender words are gone, the same series, and nearly the same pixels. This module knows
nothing of fonts, files or models.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

# (series, what its names or code points look like). A series is one group.
_SERIES = [
    ("clock-face", r"o.clock$|-thirty$"),
    ("zodiac", r"^(Aries|Taurus|Gemini|Cancer|Leo|Virgo|Libra|Scorpio)$"),
    ("zodiac", r"^(Sagittarius|Capricorn|Aquarius|Pisces|Ophiuchus)$"),
    ("button", r"^keycap|^input |\bbutton\b"),
    ("arrow", r"\barrow\b|arrows\b"),
    ("family", r"^family|^couple with heart|^kiss(:|$)|holding hands$"),
    ("moon", r"\bmoon\b"),
    ("heart", r"^(?!.*face).*\bhearts?$|^heart |^(two|beating|growing|revolving|sparkling) heart"),
    ("circle-square", r"\b(circle|square|diamond)s?$"),
    ("cat-face", r"^cat (face|with)|\bcat with|^(grinning|kissing|weary|crying|pouting) cat$"),
    ("monkey-face", r"^(see|hear|speak)-no-evil monkey|^monkey face"),
    ("globe", r"^globe"),
    ("book", r"^(open|closed|green|blue|orange|red) book$|^books$|notebook|^ledger$"),
    ("mailbox", r"mailbox"),
    ("envelope", r"envelope|^e-mail|love letter|incoming|^(in|out)box tray"),
    ("lock", r"^(un)?locked|^lock"),
    ("speaker", r"speaker"),
    ("medal", r"place medal"),
    ("hourglass", r"^hourglass"),
    ("bank-note", r"banknote"),
    ("person-walking", r"\b(walking|running|kneeling|standing)\b"),
    ("hair", r": (red|curly|white|blond) hair|: bald|: beard|^(man|woman|person|boy|girl|child)$|^old(er)? "),
    ("pointing-hand", r"index pointing|hand with index|palm (up|down)|(left|right)wards? (pushing )?hand"),
    ("fist", r"\bfist\b"),
    ("mark", r"\b(question|exclamation)\b.*mark"),
    ("note", r"^musical notes?$"),
    ("chess-cards", r"^(spade|heart|club|diamond) suit$"),
    ("train", r"^(railway|tram) car$|^(tram|light rail|metro|monorail|station|locomotive)$"),
    ("train", r"^(mountain railway|(high-speed |bullet )?train)$"),
    ("car", r"^(oncoming )?(automobile|taxi|bus|police car)$"),
    ("sun-cloud", r"^(sun|cloud)\b.*(cloud|rain|snow|lightning|sun)"),
    ("bag", r"^(handbag|purse|clutch bag|shopping bags)$"),
    ("arithmetic", r"^(plus|minus|divide|multiply|heavy equals sign)$"),
    ("chart", r"^(bar chart|chart (in|de)creasing.*)$"),
    ("snowman", r"^snowman"),
    ("head-cover", r"^(woman|man|person).*(turban|veil)"),
    ("merfolk", r"^(merman|mermaid|merperson)$"),
    ("royalty", r"^(prince|princess|person with crown)$"),
    ("claus", r"(Santa|Claus)$"),
]  # fmt: skip
_GENDER = re.compile(r"\b(man|woman|men|women|person|people|boy|girl|male|female)\b")
_FLAG = re.compile(r"^flag: ")
_MAX_HELD_OUT = 6  # a bigger group always trains: one series must not dominate a score


def variant_key(name: str) -> str:
    """The name without gender words, hair and skin tone: 'woman firefighter' → 'firefighter'."""
    return " ".join(_GENDER.sub(" ", name.split(":")[0] if not _FLAG.match(name) else name).split())


def series_of(name: str) -> str | None:
    """The series a name belongs to, if any. Country flags are one series of their own."""
    if _FLAG.match(name):
        return "country-flag"
    return next((series for series, pattern in _SERIES if re.search(pattern, name)), None)


def leak_groups(names: Sequence[str], pixels: np.ndarray, near: float) -> list[str]:
    """Group id of each picture.

    Args:
        names: N English names.
        pixels: float32 (N, P), small pictures, centred and of unit norm.
        near: two pictures whose dot product is above this are the same drawing.

    Returns:
        N ids; an id is the name of the group's first member, or of its series.
    """
    parent = list(range(len(names)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, name in enumerate(names):
        keys = [f"name:{variant_key(name)}"]
        if series := series_of(name):
            keys.append(f"series:{series}")
        for key in keys:
            parent[find(i)] = find(first.setdefault(key, i))
    for i, j in np.argwhere(np.triu(pixels @ pixels.T > near, k=1)):
        parent[find(int(i))] = find(int(j))

    members: dict[int, list[int]] = defaultdict(list)
    for i in range(len(names)):
        members[find(i)].append(i)
    label = {}
    for root, rows in members.items():
        known = Counter(s for i in rows if (s := series_of(names[i])))
        label[root] = known.most_common(1)[0][0] if known else names[rows[0]]
    return [label[find(i)] for i in range(len(names))]


def split_of(groups: Sequence[str], categories: Sequence[str], test: float, validation: float) -> list[str]:
    """train, validation or test for each picture; whole groups move together.

    Inside a category the groups are ordered by a hash of their name, which is fixed for
    ever, and dealt to test, then to validation, until the wanted fraction of rows is there.
    """
    size = Counter(groups)
    category = dict(zip(reversed(groups), reversed(categories), strict=True))  # of the first member
    rows = Counter(category[g] for g in groups)
    side: dict[str, str] = {}
    dealt: Counter[tuple[str, str]] = Counter()
    for group in sorted(size, key=lambda g: hashlib.sha256(g.encode()).hexdigest()):
        side[group] = "train"
        if size[group] > _MAX_HELD_OUT:
            continue
        for name, fraction in (("test", test), ("validation", validation)):
            if dealt[category[group], name] + size[group] <= fraction * rows[category[group]]:
                side[group] = name
                dealt[category[group], name] += size[group]
                break
    return [side[g] for g in groups]
