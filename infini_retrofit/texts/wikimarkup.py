"""Wiki markup -> plain text, for the Wikipedia sample that gensim ships, and for it alone.

The sample is pinned by its hash: markup that it lacks has no rule here. Paragraphs are separated
by an empty line; headings and list items (`- item`) are plain lines. Knows nothing of files.
"""

import calendar
import html
import re
from itertools import count

_FORMULA = re.compile(r"<math\b[^<>]*>(.*?)</math>", re.S)
_TABLE = re.compile(r"^\{\|.*?^\|\}", re.S | re.M)
_UNNESTED = r"((?:(?!\{\{|\}\}|\[\[|\]\]).)*)"
_TEMPLATE = re.compile(r"\{\{" + _UNNESTED + r"\}\}", re.S)
_LINK = re.compile(r"\[\[" + _UNNESTED + r"\]\]", re.S)
_URL_LINK = re.compile(r"\[(?:https?|ftp)://[^\s\[\]]+(?: ([^\[\]]*))?\]")
_POEM = re.compile("<poem>(.*?)</poem>", re.S)
_BREAK = "\ue002"  # stands for <br> until a paragraph is put together
_DROPPED_SECTION = re.compile(
    "(?:selected )?bibliography|references|sources|further reading|see also|external links|gallery"
)
_ANNOUNCEMENT = re.compile(".{,198}:", re.S)  # of a table, which was removed
_Section = tuple[int, str, list[str]]  # level of the heading (the lead's is 1), title, paragraphs


def clean_article(markup: str) -> str:
    """Turn the wiki markup of one article into plain text without its title.

    Tables, pictures, captions, footnotes and sections that only list sources are dropped.
    """
    text = re.sub("<!--.*?-->", "", markup, flags=re.S)
    formulas = [_formula(latex) for latex in _FORMULA.findall(text)]
    places = count()
    text = _FORMULA.sub(lambda _: f"\ue000{next(places)}\ue001", text)  # braces are no markup there
    text = re.sub(r"<ref\b[^<>]*/>", "", text)
    text = re.sub(r"<(ref|gallery|source)\b[^<>]*>.*?</\1>", "", text, flags=re.S)
    sections = _drop_sections(_read_sections(_strip_tags(_resolve_nested(text))))
    blocks = [block for _, title, paragraphs in sections for block in (title, *paragraphs)]
    text = "\n\n".join(filter(None, blocks))
    return re.sub("\ue000(\\d+)\ue001", lambda match: formulas[int(match[1])], text).strip()


def _formula(latex: str) -> str:
    """Write a formula on one line, between dollars if it needs LaTeX."""
    latex = re.sub(r"^\{([^{}]*)\}$", r"\1", " ".join(latex.split()).strip("~ "))
    latex = latex.replace("{{", "{ {").replace("}}", "} }")
    return f"${latex}$" if re.search(r"[\\{}^_]", latex) else latex


def _resolve_nested(text: str) -> str:
    """Remove tables and render links and templates, from the inside out."""
    before = None
    while before != text:
        before = text
        text = _TABLE.sub("\n", text)
        text = _URL_LINK.sub(lambda match: match[1] or "", text)
        text = _LINK.sub(_render_link, text)
        text = _TEMPLATE.sub(lambda match: render_template(match[1]), text)
    return text


def _render_link(link: re.Match[str]) -> str:
    """Return the visible text of `[[target|label]]`; pictures have none."""
    target, _, label = link[1].partition("|")
    return "" if target.startswith(("File:", "Image:")) else label or target


def _strip_tags(text: str) -> str:
    """Remove HTML tags, but keep line breaks, superscripts and the text."""
    text = _POEM.sub(lambda poem: f"\n\n{_BREAK.join(poem[1].strip().splitlines())}\n\n", text)
    text = re.sub("<sup>(.*?)</sup>", _superscript, text)
    text = re.sub("<br ?/?>", _BREAK, text)
    text = re.sub(r"</?blockquote\b[^<>]*>", "\n\n", text)
    text = re.sub(r"<li\b[^<>]*>", "\n* ", text)
    return re.sub("</?[a-zA-Z][^<>]*>", "", text)


def _superscript(match: re.Match[str]) -> str:
    """Write a superscript: powers with a caret, ordinals and charges without."""
    body = match[1]
    if body in ("2", "3"):
        return "\u00b2" if body == "2" else "\u00b3"
    is_power = re.search(r"\d|^[a-z]$", body) and not re.search("[-+\u2212]$", body)
    return f"^{body}" if is_power else body


def _read_sections(text: str) -> list[_Section]:
    """Cut the text at its headings, and each part into paragraphs."""
    parts: list[_Section] = [(1, "", [])]
    for line in text.splitlines():
        if heading := re.fullmatch("(=+)(.*?)=+", _remove_emphasis(line.strip())):
            parts.append((len(heading[1]), _tidy(heading[2]), []))
        else:
            parts[-1][2].append(line)
    return [(level, title, _read_paragraphs(lines)) for level, title, lines in parts]


def _read_paragraphs(lines: list[str]) -> list[str]:
    """Join lines to paragraphs; a list is a paragraph with a line per item."""
    paragraphs: list[str] = []
    previous = ""
    for kind, text in map(_read_line, lines):
        if not text:
            previous = previous if kind == "item" else ""
            continue
        if kind == previous:
            joint = "\n" if kind != "text" else "" if text[0] == "," else " "
            paragraphs[-1] += joint + text
        else:
            paragraphs.append(text)
        previous = kind
    return paragraphs


def _read_line(line: str) -> tuple[str, str]:
    """Return the kind of a line (text, item, term, indented) and its text."""
    kind = "indented" if line.startswith((" ", ":")) else "text"
    line = line.strip()
    if line.startswith(("|", "__", "Sources:")):
        return "text", ""
    marks = re.match("[*#:;]*", line)[0]
    pieces = [_tidy(_remove_emphasis(piece)) for piece in line[len(marks) :].split(_BREAK)]
    text = "\n".join(piece for piece in pieces if re.search(r"[^\W_]", piece))
    if re.search("[*#]", marks):
        return "item", "" if text[:1] in ("", ".") else "- " + text
    return "term" if ";" in marks else kind, text


def _remove_emphasis(line: str) -> str:
    """Remove italics and bold, but not the apostrophe in `''Iliad'''s`.

    In a line with an unclosed mark of three, one such mark is an apostrophe and a mark of two.
    """
    runs = [len(run) for run in re.findall("'{2,}", line)]
    if sum(run in (3, 5) for run in runs) % 2:
        line = re.sub(r"(?<=\w)'''", "'", line)
    return re.sub("'{2,}", "", line)


def _tidy(text: str) -> str:
    """Decode entities and repair the punctuation around removed markup."""
    text = " ".join(html.unescape(text).split())
    text = re.sub(r"\([\s,;]*", "(", text)
    text = re.sub(r"[\s,;]*\)", ")", text)
    text = re.sub(r"\((?:e\.g\.)?\)|\[\]", "", text)
    text = re.sub(r'\s+(?=[,;:.!?](?:[\s"]|$))', "", text)
    return " ".join(text.split())


def _drop_sections(sections: list[_Section]) -> list[_Section]:
    """Drop lists of sources or links, announcements of removed tables, and empty sections."""
    named, dropped_level = [], 99
    for section in sections:
        if section[0] <= dropped_level:
            is_dropped = _DROPPED_SECTION.fullmatch(section[1].lower())
            dropped_level = section[0] if is_dropped else 99
        if dropped_level == 99:
            named.append(section)
    kept: list[_Section] = []
    for level, title, paragraphs in reversed(named):
        has_children = kept and kept[-1][0] > level
        while not has_children and paragraphs and _ANNOUNCEMENT.fullmatch(paragraphs[-1]):
            paragraphs.pop()
        if paragraphs or has_children:
            kept.append((level, title, paragraphs))
    return kept[::-1]


# The visible text of templates by name: {0} and {1} are the first and second positional argument.
# A template without an entry and without a rule in `render_template` renders as nothing:
# infoboxes, navigation boxes, citations, maintenance notes.
# fmt: off
_TEMPLATES = {
    "ndash": "\u2013", "mdashb": "\u2014", "snd": " \u2013 ", "spaced ndash": " \u2013 ",
    "nbsp": " ", "spaces": " ", "'": "'", "'s": "'s", "' \"": "'\"", '-"': '"',
    "eqm": "\u21cc", "sic": "[sic]", "carbon": "C", "hydrogen": "H",
    "angbr": "\u27e8{0}\u27e9", "e": "\u00d710^{0}", "us$": "US${0}",
    "us patent": "U.S. patent {0}", "uss": "USS {0}", "hms": "HMS {0}",
    "ill": "{1}", "inflation": "{1}", "oldstyledate": "{0} {1}", "bibleref": "{0} {1}",
    "music": "\u266d", "currentyear": "2016",  # the sample is of 2016 and has flats only
}
_UNITS = {
    "mi": "miles", "nmi": "nautical miles", "ft": "feet", "in": "inches",
    "sqmi": "square miles", "acre": "acres", "m2": "m\u00b2", "km2": "km\u00b2", "m3": "m\u00b3",
    "C": "\u00b0C", "C-change": "\u00b0C", "lb": "pounds", "LT": "long tons", "USgal": "US gallons",
    "oilbbl": "barrels", "Moilbbl": "million barrels", "oilbbl/d": "barrels per day",
}
# fmt: on
_FIRST = re.compile(
    "lang-.+|nowrap|small|smaller|big|large|vr|linktext|nq|ipa|midsize|vanchor|flag|railgauge|script"
)
_LAST = re.compile("lang|transl|rtl-lang|script/.+|columns-list")
_RANGE_WORDS = {"-": "\u2013", "\u2013": "\u2013", "to": " to ", "and": " and ", "by": " by "}


def render_template(body: str) -> str:
    """Return the visible text of `{{body}}`, which holds no other markup."""
    name, *arguments = body.split("|")
    name = name.strip().lower()
    positional, named = _read_arguments(arguments)
    if name in _TEMPLATES:
        return _TEMPLATES[name].format(*positional)
    if name.startswith("formatnum:"):
        return _group_digits(name.partition(":")[2].strip())
    if _FIRST.fullmatch(name):
        return positional[0]
    if _LAST.fullmatch(name):
        return positional[-1]
    if name in ("quote", "bquote", "quotation"):
        return f"\n\n{positional[0]}\n\n"
    return _RENDERERS[name](positional, named) if name in _RENDERERS else ""


def _read_arguments(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Separate named from positional arguments, which `1=` and `text=` are."""
    positional, named = [], {}
    for argument in arguments:
        match = re.match(r"\s*(\w+)\s*=(.*)", argument, re.S)
        if not match:
            positional.append(argument.strip())
        elif match[1].isdigit() or match[1] == "text":
            positional.append(match[2].strip())
        else:
            named[match[1]] = match[2].strip()
    return positional, named


def _group_digits(number: str) -> str:
    """Write 1300 as 1,300; anything but a plain number stays as it is."""
    whole, point, decimals = number.partition(".")
    return f"{int(whole):,}{point}{decimals}" if whole.isdecimal() else number


def _convert(positional: list[str], named: dict[str, str]) -> str:
    """Render `{{convert|5|to|10|km|mi}}` in its first unit: `5 to 10 km`."""
    quantity, rest = _group_digits(positional[0]), positional[1:]
    if rest[0] in _RANGE_WORDS:
        quantity += _RANGE_WORDS[rest[0]] + _group_digits(rest[1])
        rest = rest[2:]
    if named.get("adj") == "on":
        return f"{quantity}-{rest[0].replace('mi', 'mile')}"
    if rest[2:3] == ["in"]:
        return f"{quantity} ft {rest[1]} in"
    return f"{quantity} {_UNITS.get(rest[0], rest[0])}"


def _value(positional: list[str], named: dict[str, str]) -> str:
    """Render `{{val|6.24|e=18|u=C}}`."""
    power = f"\u00d710^{named['e']}" if "e" in named else ""
    return f"{_group_digits(positional[0])}{power} {named.get('u', '')}".strip()


def _as_of(positional: list[str], named: dict[str, str]) -> str:
    """Render `{{as of|2015|6|30}}`."""
    year, month, day = [*positional, "", ""][:3]
    if month.isdigit():
        month = calendar.month_name[int(month)]
    words = "as of" if "lc" in named else "As of"
    return " ".join(filter(None, (words, day, month, year)))


def _coordinates(positional: list[str], named: dict[str, str]) -> str:
    """Render coordinates inside a sentence; those of the title are hidden."""
    if named.get("display") == "title":
        return ""
    parts = " ".join(part for part in positional if re.fullmatch(r"[\d.]+|[NESW]", part))
    return re.sub(r"([\d.]+) ([\d.]+) ([NESW])", "\\1\u00b0\\2'\\3", parts)


# fmt: off
_RENDERERS = {
    "convert": _convert, "val": _value, "as of": _as_of, "coord": _coordinates,
    "frac": lambda positional, named: "/".join(["1", *positional][-2:]),  # {{frac|3}} is 1/3
    "sfrac": lambda positional, named: "/".join(positional),
    "nihongo": lambda positional, named: f"{positional[0]} ({', '.join(positional[1:])})",
    "hlist": lambda positional, named: ", ".join(positional),
    "chem": lambda positional, named: "".join(positional),
    "nuclide2": lambda positional, named: "-".join(positional),
    "format price": lambda positional, named: _group_digits(positional[0]),
    "sc": lambda positional, named: positional[0].upper(),
}
# fmt: on
