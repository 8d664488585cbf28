"""Wiki markup -> plain text that reads like an encyclopedia.

Paragraphs are parted by one empty line; headings and list items (`- item`) are plain lines.
Tables, pictures with their captions, footnotes, and sections that only list sources go. Knows
nothing of files: text in, text out.
"""

import html
import re
from dataclasses import dataclass, field

from infini_retrofit.texts.wikitemplates import render_template

_DROPPED_SECTION = re.compile(
    "(?:selected |primary |secondary )?(?:references|sources|notes|footnotes|citations"
    "|bibliography|further reading)(?:(?: and |, )(?:references|sources|notes|footnotes|citations"
    "|bibliography|further reading))*|works cited|see also|(?:external|other) (?:links|resources)"
    "|(?:image )?gallery|images"
)
_HIDDEN_PREFIX = re.compile("file|image|category|media|template")
_SISTER_PREFIX = re.compile(
    "wikt|wiktionary|s|wikisource|w|wp|wikipedia|q|wikiquote|commons|species|doi|hdl"
)
_LANGUAGE_LINK = re.compile(r"(?:[a-z]{2,3}|simple|[a-z]{2,3}-[a-z-]+):\S")
_BREAK = "\ue002"  # stands for <br> until a paragraph is put together

_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.S)
_EMPTY_REF = re.compile(r"<ref\b[^<>]*/>", re.I)
_BLOCK = re.compile(
    r"<(ref|references|gallery|timeline|imagemap|source|syntaxhighlight|pre|score|table|hiero)\b"
    r"[^<>]*>.*?</\1\s*>",
    re.S | re.I,
)
_LITERAL = re.compile(r"<(math|nowiki|chem)\b[^<>]*(?<!/)>(.*?)</\1\s*>", re.S | re.I)
_TABLE = re.compile(r"^[:*# \t]*\{\|(?:(?!^[:*# \t]*\{\|).)*?^\s*\|\}(?!\})", re.S | re.M)
_UNNESTED = r"((?:(?!\{\{|\}\}|\[\[|\]\]).)*)"
_TEMPLATE = re.compile(r"\{\{" + _UNNESTED + r"\}\}", re.S)
_LINK = re.compile(r"\[\[" + _UNNESTED + r"\]\]", re.S)
_URL_LINK = re.compile(r"\[(?:https?:|ftp:|mailto:)?//[^\s\[\]]+(?:[ \t]+([^\[\]\n]*))?\]")
_POEM = re.compile(r"<poem\b[^<>]*>(.*?)</poem>", re.S | re.I)
_RAISED = re.compile(r"<sup\b[^<>]*>(.*?)</sup>", re.S | re.I)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_HEADING = re.compile(r"^(={1,6})\s*(.*?)\s*=+\s*$")
_EMPTY_PARENTHESES = re.compile(r"\((?:e\.g\.|i\.e\.|cf\.|[Ss]ee|see also)?\s*\)|\[\s*\]")
_SPACES = re.compile("[ \t\u00a0\u2000-\u200a\u202f\u3000]+")
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2028-\u202e\u2060\ufeff\ufffc]")


@dataclass
class _Section:
    """A heading and the paragraphs up to the next heading; level 1 is the lead."""

    level: int
    title: str
    paragraphs: list[str] = field(default_factory=list)


def clean_article(markup: str) -> str:
    """Turn one article's wiki markup into plain text, without the article's title."""
    text = _COMMENT.sub("", markup)
    text, literals = _put_literals_aside(text)
    text = _BLOCK.sub("", _EMPTY_REF.sub("", text))
    text = _strip_tags(_resolve_nested(_repeat(_TABLE, "\n", text)))
    sections = _drop_empty(_drop_by_title(_read_sections(text)))
    blocks = [block for section in sections for block in (section.title, *section.paragraphs)]
    text = "\n\n".join(filter(None, blocks))
    return re.sub("\ue000(\\d+)\ue001", lambda match: literals[int(match[1])], text).strip()


def _put_literals_aside(text: str) -> tuple[str, list[str]]:
    """Replace formulas and `nowiki` by marks, so that their braces are not read as markup."""
    literals: list[str] = []

    def keep(match: re.Match[str]) -> str:
        is_formula = match[1].lower() == "math"
        literals.append(_formula(match[2]) if is_formula else html.unescape(match[2]))
        return f"\ue000{len(literals) - 1}\ue001"

    return _LITERAL.sub(keep, text), literals


def _formula(latex: str) -> str:
    """Write a formula on one line: between dollars where it needs LaTeX, else plain."""
    latex = re.sub(r"^\{([^{}]*)\}$", r"\1", " ".join(latex.split()).strip("~ "))
    latex = latex.replace("{{", "{ {").replace("}}", "} }")
    return f"${latex}$" if re.search(r"[\\{}^_]", latex) else latex


def _repeat(pattern: re.Pattern[str], replacement: str, text: str) -> str:
    """Replace from the inside out until nothing is left to replace."""
    count = 1
    while count:
        text, count = pattern.subn(replacement, text)
    return text


def _resolve_nested(text: str) -> str:
    """Render links and templates from the inside out; what never closes loses its brackets."""
    before = None
    while before != text:
        before = text
        text = _URL_LINK.sub(lambda match: match[1] or "", text)
        text = _LINK.sub(lambda match: _render_link(match[1]), text)
        text = _TEMPLATE.sub(lambda match: render_template(match[1]), text)
    text = re.sub(r"^[^\n]*\[\[(?:File|Image):[^\n]*", "", text, flags=re.M)
    return re.sub(r"\[\[|\]\]|\{\{|\}\}", "", text)


def _render_link(body: str) -> str:
    """Return what a reader sees of `[[body]]`: nothing for pictures and categories."""
    target, pipe, label = body.partition("|")
    target = target.strip()
    prefix = target.partition(":")[0].strip().lower() if ":" in target else ""
    if _HIDDEN_PREFIX.fullmatch(prefix):
        return ""
    if target.startswith(":"):
        return label or target.lstrip(":")
    if _SISTER_PREFIX.fullmatch(prefix):
        target = target.rpartition(":")[2]
    elif _LANGUAGE_LINK.match(target) and not label:
        return ""
    if pipe and not label:
        return re.sub(r"\s*\([^()]*\)$", "", target)
    return label or target


def _strip_tags(text: str) -> str:
    """Remove HTML tags, keeping line breaks, raised figures and the text between the tags."""
    text = _POEM.sub(lambda match: f"\n\n{'<br>'.join(match[1].strip().splitlines())}\n\n", text)
    text = _RAISED.sub(_raise, text)
    text = re.sub(r"<br\s*/?\s*>", _BREAK, text, flags=re.I)
    text = re.sub(r"</?(?:blockquote|div|center|p|ol|ul)\b[^<>]*>", "\n\n", text, flags=re.I)
    text = re.sub(r"<li\b[^<>]*>", "\n* ", text, flags=re.I)
    return _TAG.sub("", text)


def _raise(match: re.Match[str]) -> str:
    """Write a superscript: powers with a caret, ordinals and charges as they are."""
    body = match[1].strip().replace("''", "")
    if body in ("2", "3"):
        return {"2": "\u00b2", "3": "\u00b3"}[body]
    if not re.search(r"\d|^[a-z]$", body) or re.search("[-+\u2212]$", body):
        return body
    return f"^{body}" if re.fullmatch("[-+\u2212]?[\\w.]+", body) else f"^({body})"


def _read_sections(text: str) -> list[_Section]:
    """Cut the text at its headings, and each part into paragraphs."""
    sections = [_Section(1, "")]
    lines: list[str] = []
    for line in text.splitlines():
        heading = _HEADING.match(_remove_emphasis(line.strip()))
        if not heading:
            lines.append(line)
            continue
        sections[-1].paragraphs = _read_paragraphs(lines)
        sections.append(_Section(len(heading[1]), _tidy(heading[2])))
        lines = []
    sections[-1].paragraphs = _read_paragraphs(lines)
    return sections


def _read_paragraphs(lines: list[str]) -> list[str]:
    """Join lines to paragraphs as a wiki does; a list is one paragraph with a line an item."""
    paragraphs: list[str] = []
    previous = ""
    for line in lines:
        kind, text = _read_line(line)
        if not text:
            previous = previous if kind == "item" else ""
            continue
        if kind == previous:
            joint = "\n" if kind != "text" else "" if text[0] in ",;.)" else " "
            paragraphs[-1] += joint + text
        else:
            paragraphs.append(text)
        previous = kind
    return paragraphs


def _read_line(line: str) -> tuple[str, str]:
    """Return the kind of a line (text, item, term, indented) and its text, empty if none."""
    indented = line.startswith((" ", ":"))
    line = line.strip()
    if line.startswith(("|", "!", "{|", "----", "__", "Source:", "Sources:")):
        return "text", ""
    marks = re.match(r"[*#:;]*", line)[0]
    pieces = [_tidy(_remove_emphasis(piece)) for piece in line[len(marks) :].split(_BREAK)]
    text = "\n".join(piece for piece in pieces if re.search("[^\\W_]|\ue000", piece))
    if "*" in marks or "#" in marks:
        orphaned = not text or text[0] in ".,;:)"
        return "item", "" if orphaned else "- " + text
    if ";" in marks:
        return "term", text
    return "indented" if indented else "text", text


def _remove_emphasis(line: str) -> str:
    """Remove marks of italics and bold, but not the apostrophe in `''Iliad'''s`.

    Where neither italics nor bold close, one mark of three is an apostrophe and a mark of two.
    """
    runs = [len(run) for run in re.findall("'{2,}", line)]
    num_bold, num_italic = (sum(run in (size, 5) for run in runs) for size in (3, 2))
    if num_bold % 2 and num_italic % 2:
        line = re.sub(r"(?<=\w)'''(?!')", "'", line, count=1)
    return re.sub("'{2,}", "", line)


def _tidy(text: str) -> str:
    """Decode entities and mend the punctuation around what was removed."""
    text = html.unescape(html.unescape(text))
    text = _SPACES.sub(" ", _INVISIBLE.sub("", text))
    text = re.sub(r"\((?:\s*[,;:])*\s*", "(", text)
    text = re.sub(r"(?:\s*[,;:])*\s*\)", ")", text)
    text = _repeat(_EMPTY_PARENTHESES, "", text)
    text = re.sub(r"(?:\s*[,;])+\s*;|;(?:\s*[,;])+", ";", text)
    text = re.sub(r",(?:\s*,)+", ",", text)
    text = re.sub(r"[,;:]+(?=\.(?:\s|$))", "", text)
    text = re.sub("\\s+(?=[,;:.!?](?:[\\s\"')\u201d\u2019]|$))", "", text)
    return _SPACES.sub(" ", text).strip()


def _drop_by_title(sections: list[_Section]) -> list[_Section]:
    """Drop sections that only list sources or links, with the sections below them."""
    kept, dropped_level = [], 99
    for section in sections:
        if section.level <= dropped_level:
            listed = _DROPPED_SECTION.fullmatch(section.title.lower().rstrip(":"))
            dropped_level = section.level if listed else 99
        if dropped_level == 99:
            kept.append(section)
    return kept


def _drop_empty(sections: list[_Section]) -> list[_Section]:
    """Drop what announces nothing: headings without text, last lines that end with a colon."""
    kept: list[_Section] = []
    for section in reversed(sections):
        has_children = kept and kept[-1].level > section.level
        while section.paragraphs and not has_children and _announces(section.paragraphs[-1]):
            section.paragraphs.pop()
        if section.paragraphs or has_children:
            kept.append(section)
    return kept[::-1]


def _announces(paragraph: str) -> bool:
    """Tell whether a paragraph only leads up to a table or list after it."""
    return paragraph.endswith(":") and len(paragraph) < 200
