"""Text in the form of the WikiText data sets -> articles in plain English.

WikiText puts spaces around every token, splits numbers and hyphenated words (` @-@ `), and marks
headings by equals signs: ` = Title = `, ` = = Section = = `.
"""

import re
from collections.abc import Iterable, Iterator

from infini_retrofit.texts.splits import Article

_HEADING = re.compile(r"\s*((?:= )+)(.*[^=\s])((?: =)+)\s*")
_REPAIRS = [
    (re.compile(r" @([-,.])@(?: |$)"), r"\1"),
    (re.compile(r'" ([^"]*?) "'), r'"\1"'),
    (re.compile(r"(?<=[\w>)]) '(s|t|d|m|re|ve|ll)\b"), r"'\1"),
    (re.compile(r"(?<=s) ' (?=[\w<])"), "' "),
    (re.compile(r"(?<!\S)' ([^']+) '(?!\w)"), r"'\1'"),
    (re.compile("(?<=\\d) ([\u2013/]) (?=\\d)"), r"\1"),
    (re.compile(r"(?<=\w) / (?=\w)"), "/"),
    (re.compile("\u00b0 (?=[CFNSEW]\\b)"), "\u00b0"),
    (re.compile("([(\\[{$\u00a3\u20ac]) "), r"\1"),
    (re.compile(r" (?=[.,;:!?%)\]}](?:[\s\"')\]]|$))"), ""),
    (re.compile(r" (?=[.,;:!?%)\]}](?:[.,;:!?%)\]}]|$))"), ""),
]


def is_wikitext(lines: Iterable[str]) -> bool:
    """Return whether the first line with text is the title of an article."""
    return _is_title(next(filter(str.strip, lines), ""))


def split_wikitext(lines: Iterable[str]) -> Iterator[Article]:
    """Cut lines at the titles of articles; earlier lines are dropped.

    The text of an article starts with its title; an empty line separates paragraphs.
    """
    title, body = "", []
    for line in lines:
        if _is_title(line):
            if title:
                yield _make_article(title, body)
            title, body = join_tokens(_HEADING.fullmatch(line)[2]), []
        else:
            body.append(line)
    if title:
        yield _make_article(title, body)


def join_tokens(line: str) -> str:
    """Remove the spaces that WikiText puts around tokens."""
    line = " ".join(line.split())
    for pattern, replacement in _REPAIRS:
        line = pattern.sub(replacement, line)
    return line


def _is_title(line: str) -> bool:
    """Return whether a line is the title of an article."""
    heading = _HEADING.fullmatch(line)
    return bool(heading) and heading[1].strip() == heading[3].strip() == "="


def _make_article(title: str, lines: list[str]) -> Article:
    """Assemble an article without the headings of empty sections."""
    paragraphs: list[tuple[int, str]] = []  # level (0 for text), text
    for line in filter(str.strip, [*lines, "= end ="]):
        heading = _HEADING.fullmatch(line)
        level = len(heading[1].split()) if heading else 0
        while level and paragraphs and paragraphs[-1][0] >= level:
            paragraphs.pop()
        paragraphs.append((level, join_tokens(heading[2] if heading else line)))
    return Article(title, "\n\n".join([title, *(text for _, text in paragraphs[:-1])]))
