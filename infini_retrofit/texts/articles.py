"""Read clean articles: gensim's sample, the Hub, or the user's files.

Holds the whole corpus in memory. Slow imports stand inside the function of their source.
"""

import bz2
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from infini_retrofit.pipeline.files import given_path, sha256
from infini_retrofit.pipeline.progress import note
from infini_retrofit.texts.corpora import (
    Corpus,
    CorpusShares,
    GensimCorpus,
    HubSplits,
    PackagesCorpus,
)
from infini_retrofit.texts.packages import read_packages
from infini_retrofit.texts.splits import (
    SPLITS,
    Article,
    check_splits,
    drop_copies,
    note_copies,
    same_title,
    split_articles,
)
from infini_retrofit.texts.wikimarkup import clean_article
from infini_retrofit.texts.wikitext import is_wikitext, split_wikitext

SAMPLE_FILE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SAMPLE_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
TITLE_COLUMNS = ("title", "short_book_title")  # the second is that of PG-19
_CONTROLS = re.compile("[\0-\x06\x0e-\x1a\x1c-\x1f\x7f]")  # no text has them, says file(1)
_NO_ARTICLE = re.compile(r"#redirect|.*\{\{(?:disambiguation|geodis)[|}]", re.I | re.S)


def read_splits(corpus: Corpus) -> dict[str, list[Article]]:
    """Read a corpus in its own splits, or deal its articles, without copies, to splits."""
    if isinstance(corpus, PackagesCorpus):
        return read_packages(corpus)
    if not isinstance(corpus, CorpusShares):
        return read_own_splits(corpus)
    return split_articles(drop_copies(read_corpus(corpus)), corpus.val_share, corpus.test_share)


def read_corpus(corpus: CorpusShares) -> list[Article]:
    """Read all articles of a corpus; an error names the file at fault."""
    if isinstance(corpus, GensimCorpus):
        return read_gensim_sample()
    if isinstance(corpus, HubSplits):
        return _read_parquets(fetch_parquet(corpus))
    return read_files(given_path(corpus.path))


def read_gensim_sample() -> list[Article]:
    """Read the Wikipedia sample that gensim ships for its own tests."""
    from gensim.test.utils import datapath

    path = Path(datapath(SAMPLE_FILE))
    if (digest := sha256(path)) != SAMPLE_SHA256:
        raise ValueError(f"{path} must have the sha256 {SAMPLE_SHA256}, got {digest}")
    return read_dump(path)


def read_dump(path: Path) -> list[Article]:
    """Read a bz2 MediaWiki dump without redirects and lists of homonyms."""
    from gensim.corpora.wikicorpus import extract_pages

    with bz2.open(path) as file:
        pages = list(extract_pages(file, filter_namespaces=("0",)))
    texts = {page[0]: clean_article(page[1]) for page in pages if not _NO_ARTICLE.match(page[1])}
    return [Article(title, f"{title}\n\n{text}") for title, text in texts.items() if text]


def read_own_splits(corpus: HubSplits) -> dict[str, list[Article]]:
    """Read the files of each split, which begins their names, in their order."""
    paths = fetch_parquet(corpus)
    of_split = {split: [p for p in paths if p.name.startswith(split)] for split in SPLITS}
    if not all(of_split.values()) or sum(map(len, of_split.values())) < len(paths):
        raise ValueError(
            "corpora.<preset>.files must match files whose names begin with train, val and test, "
            f"and no others, got {', '.join(path.name for path in paths)}"
        )
    splits = {split: _read_parquets(of_split[split]) for split in SPLITS}
    check_splits(splits)
    note_copies(splits)
    return splits


def fetch_parquet(corpus: HubSplits) -> list[Path]:
    """Download the parquet files of a data set in the pinned revision."""
    from infini_retrofit.texts.hub import fetch_snapshot

    _, paths = fetch_snapshot(corpus.repo_id, corpus.revision, [corpus.files], repo_type="dataset")
    if not paths:
        raise ValueError(
            f"corpora.<preset>.files must match parquet files in {corpus.repo_id}, "
            f"got {corpus.files!r}"
        )
    return paths


def read_files(path: Path) -> list[Article]:
    """Read text files (UTF-8) and parquet files below a path.

    A parquet file has a column `text` and may have a column `title`. Each text file or row is one
    article; text in the form of WikiText is cut at the titles. An article without a title is named
    after its file below `path`. Hidden files and folders and those behind linked folders are not
    read.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path.absolute()} is missing: it must hold the texts of corpora.<preset>"
        )
    root = path if path.is_dir() else path.parent
    files, unread = _find_files(path)
    told = ", ".join(f"{number:,} {kind}" for kind, number in sorted(unread.items()))
    if not files:
        raise ValueError(
            f"corpora.<preset>.path must hold *.txt or *.parquet files, got {path}: "
            f"{told or 'an empty folder'}"
        )
    if unread:
        note(f"not read in {path}: {told}")
    articles: list[Article] = []
    for file in files:
        # Systems store names in several Unicode forms, and some in bytes that are no text.
        name = same_title(file.relative_to(root).as_posix()).encode(errors="backslashreplace")
        articles += _assemble(_READERS[file.suffix](file, name.decode()), file)
    return articles


def _find_files(path: Path) -> tuple[list[Path], Counter[str]]:
    """List the files to read, in order, and count by kind what is not read."""
    if path.is_file():
        return ([path], Counter()) if path.suffix in _READERS else ([], Counter([path.suffix]))
    files, unread = [], Counter()
    for folder, folders, names in os.walk(path, onerror=_raise):
        for entry in (Path(folder, name) for name in folders + names):
            if entry.name.startswith("."):
                unread["hidden files or folders"] += 1
            elif entry.is_dir():
                unread["links to folders"] += entry.is_symlink()
            elif not entry.is_file():
                unread["broken links or devices"] += 1
            elif entry.suffix in _READERS:
                files.append(entry)
            else:
                unread[entry.suffix or "without an ending"] += 1
        folders[:] = [name for name in folders if not name.startswith(".")]
    return sorted(files), +unread


def _raise(error: OSError) -> NoReturn:
    raise error


def _read_parquets(paths: list[Path]) -> list[Article]:
    """Read parquet files one after another; an article may go on in the next one."""
    rows = [row for path in paths for row in _read_parquet(path, path.name)]
    return _assemble(rows, paths[0].parent)


def _read_text(path: Path, name: str) -> list[Article]:
    return [Article(name, _decode(path.read_bytes(), str(path)))]


def _read_parquet(path: Path, name: str) -> list[Article]:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            title_column = next((c for c in TITLE_COLUMNS if c in schema.names), None)
            columns = [column for column in ("text", title_column) if column in schema.names]
            table = file.read(columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{path} must be a parquet file, got one that cannot be read: {error}"
        ) from error
    try:
        # Arrow makes bytes of every type of text, and text of numbers as well.
        texts = table["text"].cast(pa.large_binary())
        titles = table[title_column].cast(pa.large_string()) if title_column else texts[:0]
    except (pa.ArrowException, KeyError) as error:
        found = [f"{c.name} ({c.type})" for c in schema if not columns or c.name in columns]
        raise ValueError(
            f"{path} must have a column text (and may have a column title) of strings, "
            f"got {', '.join(found) or 'none'}"
        ) from error
    names = _decode_rows(titles.cast(pa.large_binary()), path) or [""] * len(texts)
    return [
        Article(title or f"{name} row {i}", text)
        for i, (title, text) in enumerate(zip(names, _decode_rows(texts, path), strict=True))
    ]


_READERS: dict[str, Callable[[Path, str], list[Article]]] = {
    ".txt": _read_text,
    ".parquet": _read_parquet,
}


def _decode_rows(column: pa.ChunkedArray, path: Path) -> list[str]:
    rows = enumerate(column.to_pylist())
    return [_decode(content or b"", f"{path} row {i}") for i, content in rows]


def _decode(content: bytes, place: str) -> str:
    """Decode UTF-8 without byte-order marks; refuse other encodings and binary files."""
    try:
        text = content.decode().replace("\ufeff", "")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{place} must be UTF-8 text: {error}, in line {line}") from error
    controls = [match.start() for match in _CONTROLS.finditer(text)]
    if "\0" in text or 100 * len(controls) > len(text):
        line = text.count("\n", 0, controls[0]) + 1
        raise ValueError(
            f"{place} must be UTF-8 text, got control characters from line {line} on, as UTF-16 "
            "and binary files have"
        )
    return text


def _assemble(rows: list[Article], path: Path) -> list[Article]:
    """Cut WikiText at its titles, or drop empty rows, repeated empty lines, spaces at line ends."""
    lines = [line for row in rows for line in row.text.splitlines() or [""]]
    if is_wikitext(lines):
        return list(split_wikitext(lines))
    articles = []
    for row in rows:
        text = "\n".join(line.rstrip() for line in row.text.splitlines())
        if text := re.sub(r"\n{3,}", "\n\n", text).strip():
            articles.append(Article(row.title, text))
    if not articles:
        raise ValueError(f"{path} must hold text, got an empty file")
    if len(articles) < len(rows):
        note(f"{len(rows) - len(articles):,} of {len(rows):,} rows of {path} hold no text")
    return articles
