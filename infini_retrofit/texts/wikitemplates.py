"""What a reader sees of the templates of wiki markup that stand inside a sentence.

Knows nothing of links, tables and sections. A template that is not listed here renders as
nothing: infoboxes, navigation boxes, citations, maintenance notes.
"""

import calendar
import re
from collections.abc import Callable

_CONSTANTS = {
    "ndash": "\u2013",
    "mdash": "\u2014",
    "mdashb": "\u2014",
    "snd": " \u2013 ",
    "snds": " \u2013 ",
    "spaced ndash": " \u2013 ",
    "spaced en dash": " \u2013 ",
    "nbsp": " ",
    "spaces": " ",
    "space": " ",
    "\u00b7": " \u00b7 ",
    "'": "'",
    "'s": "'s",
    "' \"": "'\"",
    '-"': '"',
    "=": "&#61;",  # decoded later: here it would make a named argument of what surrounds it
    "!": "&#124;",
    "eqm": "\u21cc",
    "sic": "[sic]",
    "carbon": "C",
    "hydrogen": "H",
    "oxygen": "O",
    "currentyear": "2016",  # the year of the sample
}

_UNITS = {
    "mi": "miles",
    "sqmi": "square miles",
    "sq mi": "square miles",
    "km2": "km\u00b2",
    "m2": "m\u00b2",
    "m3": "m\u00b3",
    "km3": "km\u00b3",
    "g/cm3": "g/cm\u00b3",
    "sqft": "square feet",
    "acre": "acres",
    "ft": "feet",
    "in": "inches",
    "yd": "yards",
    "nmi": "nautical miles",
    "C": "\u00b0C",
    "F": "\u00b0F",
    "K": "K",
    "c": "\u00b0C",
    "f": "\u00b0F",
    "C-change": "\u00b0C",
    "C change": "\u00b0C",
    "oilbbl": "barrels",
    "Moilbbl": "million barrels",
    "e6oilbbl": "million barrels",
    "e9oilbbl": "billion barrels",
    "oilbbl/d": "barrels per day",
    "ST": "short tons",
    "LT": "long tons",
    "t": "tonnes",
    "ha": "hectares",
    "lb": "pounds",
    "impgal": "imperial gallons",
    "USgal": "US gallons",
    "USgal/d": "US gallons per day",
}
_RANGE_WORDS = {
    "-": "\u2013",
    "\u2013": "\u2013",
    "to": " to ",
    "to(-)": " to ",
    "and": " and ",
    "or": " or ",
    "x": " \u00d7 ",
    "by": " by ",
    "+/-": " \u00b1 ",
}


def render_template(body: str) -> str:
    """Render what stands between `{{` and `}}`, in which nothing may be nested any more."""
    name, *arguments = body.split("|")
    name = name.strip().lower().replace("_", " ")
    positional, named = _read_arguments(arguments)
    if name in _CONSTANTS:
        return _CONSTANTS[name]
    if name.startswith("formatnum:"):
        return _group_digits(name.partition(":")[2].strip())
    if not positional:
        return ""
    if _FIRST.fullmatch(name):
        return positional[0]
    if _LAST.fullmatch(name):
        return positional[-1]
    if _QUOTE.fullmatch(name):
        return f"\n\n{positional[0]}\n\n"
    return _RENDERERS[name](positional, named) if name in _RENDERERS else ""


def _read_arguments(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Tell `key=value` from positional arguments; `1=` and `text=` count as positional."""
    positional, named = [], {}
    for argument in arguments:
        match = re.match(r"\s*([A-Za-z][\w -]{0,20}|\d)\s*=(.*)", argument, re.DOTALL)
        if not match:
            positional.append(argument.strip())
        elif match[1].isdigit() or match[1].strip() == "text":
            positional.append(match[2].strip())
        else:
            named[match[1].strip()] = match[2].strip()
    return positional, named


def _group_digits(number: str) -> str:
    """Write 1300 as 1,300, and leave anything but a plain number as it is."""
    whole, point, decimals = number.partition(".")
    if not whole.isascii() or not whole.isdigit() or len(whole) < 4:
        return number
    return f"{int(whole):,}{point}{decimals}"


def _convert(positional: list[str], named: dict[str, str]) -> str:
    """Render `{{convert|5|to|10|km|mi}}` as `5 to 10 km`: the article's own unit only."""
    if named.get("disp") in ("table", "number") or len(positional) < 2:
        return _group_digits(positional[0])
    quantity, rest = _group_digits(positional[0]), positional[1:]
    while len(rest) > 2 and rest[0] in _RANGE_WORDS:
        quantity += _RANGE_WORDS[rest[0]] + _group_digits(rest[1])
        rest = rest[2:]
    if named.get("adj") in ("on", "mid"):
        return f"{quantity}-{rest[0].replace('sqmi', 'square-mile').replace('mi', 'mile')}"
    unit = _UNITS.get(rest[0], rest[0])
    if len(rest) > 2 and rest[0] == "ft" and rest[2] == "in":
        return f"{quantity} ft {rest[1]} in"
    return f"{quantity} {unit}"


def _value(positional: list[str], named: dict[str, str]) -> str:
    """Render `{{val|6.24|e=18|u=C}}`."""
    number = _group_digits(positional[0])
    if len(positional) > 1:
        second = positional[1]
        number += second if second.startswith("(") else f" \u00b1 {second}"
    power = f"\u00d710^{named['e']}" if "e" in named else ""
    return f"{number}{power} {named.get('u', '')}".strip()


def _fraction(positional: list[str], named: dict[str, str]) -> str:
    """Render `{{frac|3}}`, `{{frac|3|2}}` and `{{frac|1|3|2}}`."""
    if len(positional) == 1:
        return f"1/{positional[0]}"
    return " ".join([*positional[:-2], "/".join(positional[-2:])])


def _as_of(positional: list[str], named: dict[str, str]) -> str:
    """Render `{{as of|2015|6|30}}`."""
    year, month, day = [*positional, "", ""][:3]
    if month.isdigit() and 1 <= int(month) <= 12:
        month = calendar.month_name[int(month)]
    words = "as of" if "lc" in named else "As of"
    return " ".join(part for part in (words, day, month, year) if part)


def _japanese(positional: list[str], named: dict[str, str]) -> str:
    """Render `{{nihongo|English|kanji|romaji}}`."""
    english, *rest = positional[:3]
    japanese = ", ".join(part for part in rest if part)
    return f"{english} ({japanese})" if english and japanese else english or japanese


def _coordinates(positional: list[str], named: dict[str, str]) -> str:
    """Render coordinates inside a sentence; those that belong to the title render as nothing."""
    if named.get("display") == "title":
        return ""
    parts = " ".join(part for part in positional if re.fullmatch(r"[\d.-]+|[NESW]", part))
    parts = re.sub(r"([\d.]+) ([\d.]+) ([\d.]+) ([NESW])", "\\1\u00b0\\2'\\3\"\\4", parts)
    parts = re.sub(r"([\d.]+) ([\d.]+) ([NESW])", "\\1\u00b0\\2'\\3", parts)
    return re.sub(r"([\d.]+) ([NESW])", "\\1\u00b0\\2", parts)


Renderer = Callable[[list[str], dict[str, str]], str]

_FIRST = re.compile(
    "lang-.+|nowrap|small|smaller|big|large|larger|vr|keypress|noitalic|linktext|nq|ipa|midsize"
    "|center|vanchor|flag|flagcountry|railgauge|unicode|nobold|script|sup|sub|mvar|math"
)
_LAST = re.compile("lang|transl|transliteration|rtl-lang|native name|script/.+")
_QUOTE = re.compile("[bcr]?quote|blockquote|quotation|poemquote")

_RENDERERS: dict[str, Renderer] = {
    "convert": _convert,
    "cvt": _convert,
    "frac": _fraction,
    "sfrac": _fraction,
    "hlist": lambda positional, named: ", ".join(positional),
    "ubl": lambda positional, named: ", ".join(positional),
    "val": _value,
    "as of": _as_of,
    "nihongo": _japanese,
    "coord": _coordinates,
    "chem": lambda positional, named: "".join(positional),
    "angbr": lambda positional, named: f"\u27e8{positional[0]}\u27e9",
    "ill": lambda positional, named: (positional + positional)[1],
    "e": lambda positional, named: f"\u00d710^{positional[0]}",
    "circa": lambda positional, named: f"c. {positional[0]}",
    "us$": lambda positional, named: f"US${positional[0]}",
    "us patent": lambda positional, named: f"U.S. patent {positional[0]}",
    "format price": lambda positional, named: _group_digits(positional[0]),
    "inflation": lambda positional, named: positional[min(1, len(positional) - 1)],
    "nuclide2": lambda positional, named: "-".join(positional[:2]),
    "oldstyledate": lambda positional, named: " ".join(positional[:2]),
    "columns-list": lambda positional, named: f"\n{positional[-1]}\n",
    "music": lambda positional, named: {"flat": "\u266d", "sharp": "\u266f"}.get(positional[0], ""),
    "uss": lambda positional, named: f"USS {positional[0]}",
    "hms": lambda positional, named: f"HMS {positional[0]}",
    "mv": lambda positional, named: f"MV {positional[0]}",
    "sc": lambda positional, named: positional[0].upper(),
    "bibleref": lambda positional, named: " ".join(positional[:2]),
}
