"""Text in the form of the WikiText data sets -> articles in plain English.

WikiText puts spaces around every token, splits numbers and hyphenated words (` @-@ `), and marks
headings by equals signs: ` = Title = `, ` = = Section = = `. A heading stands between blank lines;
other lines of this form, such as formulas, are text.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import chain

from infini_retrofit.texts.splits import Article

_HEADING = re.compile(r"\s*(=(?: =)*) (?!=)(.*[^=\s]) \1\s*")
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
    return next(_read_lines(lines), (0, ""))[0] == 1


def split_wikitext(lines: Iterable[str]) -> Iterator[Article]:
    """Cut lines at the titles of articles; earlier lines are dropped.

    The text of an article starts with its title; an empty line separates paragraphs. The headings
    of empty sections are dropped.
    """
    paragraphs: list[tuple[int, str]] = []  # level and text, of one article
    for level, text in chain(_read_lines(lines), [(1, "")]):
        while level and len(paragraphs) > 1 and paragraphs[-1][0] >= level:
            paragraphs.pop()
        if level == 1:
            if paragraphs:
                yield Article(paragraphs[0][1], "\n\n".join(text for _, text in paragraphs))
            paragraphs = [(level, text)]
        elif paragraphs:
            paragraphs.append((level, text))


def join_tokens(line: str) -> str:
    """Remove the spaces that WikiText puts around tokens."""
    line = " ".join(line.split())
    for pattern, replacement in _REPAIRS:
        line = pattern.sub(replacement, line)
    return line


def _read_lines(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield level (0: text, 1: title, 2: section) and text of each line that is not blank."""
    before, line = "", ""
    for after in chain(lines, [""]):
        heading = _HEADING.fullmatch(line)
        if heading and not before.strip() and not after.strip():
            yield heading[1].count("="), join_tokens(heading[2])
        elif line.strip():
            yield 0, join_tokens(line)
        before, line = line, after
