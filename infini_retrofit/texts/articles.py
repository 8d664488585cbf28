"""Read clean articles: gensim's sample, the Hub, or the user's files.

Holds the whole corpus in memory. Slow imports stand inside the function of their source.
"""

import bz2
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from infini_retrofit.pipeline.files import sha256
from infini_retrofit.texts.corpora import Corpus, CorpusShares, GensimCorpus, HubSplits
from infini_retrofit.texts.splits import SPLITS, Article, check_splits, split_articles
from infini_retrofit.texts.wikimarkup import clean_article
from infini_retrofit.texts.wikitext import is_wikitext, split_wikitext

SAMPLE_FILE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
SAMPLE_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
TITLE_COLUMNS = ("title", "short_book_title")  # the second is that of PG-19
_NO_ARTICLE = re.compile(r"#redirect|.*\{\{(?:disambiguation|geodis)[|}]", re.I | re.S)


def read_splits(corpus: Corpus) -> dict[str, list[Article]]:
    """Read a corpus in its own splits, or deal its articles to splits."""
    if not isinstance(corpus, CorpusShares):
        return read_own_splits(corpus)
    return split_articles(read_corpus(corpus), corpus.val_share, corpus.test_share)


def read_corpus(corpus: CorpusShares) -> list[Article]:
    """Read all articles of a corpus; an error names the file at fault."""
    if isinstance(corpus, GensimCorpus):
        return read_gensim_sample()
    if isinstance(corpus, HubSplits):
        return _read_parquets(fetch_parquet(corpus))
    return read_files(Path(corpus.path))


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
    after its file below `path`.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: it must hold the texts of corpora.<preset>")
    root = path if path.is_dir() else path.parent
    found = sorted(path.rglob("*")) if path.is_dir() else [path]
    articles: list[Article] = []
    for file in filter(Path.is_file, found):
        if read := {".txt": _read_text, ".parquet": _read_parquet}.get(file.suffix):
            articles += _assemble(read(file, file.relative_to(root).as_posix()), file)
    if not articles:
        raise ValueError(f"corpora.<preset>.path must hold *.txt or *.parquet files, got {path}")
    return articles


def _read_parquets(paths: list[Path]) -> list[Article]:
    """Read parquet files one after another; an article may go on in the next one."""
    rows = [row for path in paths for row in _read_parquet(path, path.name)]
    return _assemble(rows, paths[0].parent)


def _read_text(path: Path, name: str) -> list[Article]:
    try:
        return [Article(name, path.read_text(encoding="utf-8-sig"))]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}") from error


def _read_parquet(path: Path, name: str) -> list[Article]:
    try:
        names = pq.read_schema(path).names
        title_column = next((column for column in TITLE_COLUMNS if column in names), None)
        columns = [column for column in ("text", title_column) if column in names]
        table = pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} must be a parquet file, got one that cannot be read") from error
    kinds = {str(table[column].type) for column in columns}
    if "text" not in columns or kinds - {"string", "large_string"}:
        raise ValueError(
            f"{path} must have a column text (and may have a column title) of strings, "
            f"got {', '.join(map(str, names))}"
        )
    return [
        Article(row.get(title_column) or f"{name} row {i}", row["text"] or "")
        for i, row in enumerate(table.to_pylist())
    ]


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
    return articles
