"""A corpus after it was read: its split, its documents, and its files of tokens.

Knows neither which text it is (`corpora`) nor where that comes from (`articles`) nor how it is
cleaned (`wikimarkup`, `wikitext`).
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from infini_retrofit.pipeline.files import TokenIds, check_made, read_token_rows
from infini_retrofit.pipeline.files import read_table as _read_table

SPLITS = ("train", "val", "test")
MIN_ARTICLES = 2  # in each split: a memory is also tried on another article's text


@dataclass(frozen=True)
class Article:
    """One text, to stay in one split as a whole; `title` decides in which."""

    title: str
    text: str


@dataclass(frozen=True)
class TokenizedArticle(Article):
    """An article with its tokens, without any special token."""

    input_ids: TokenIds


@dataclass(frozen=True)
class Document:
    """Piece number `part` of an article, counted from 0."""

    title: str
    part: int
    input_ids: TokenIds


def split_articles(
    articles: Sequence[Article], val_share: float, test_share: float
) -> dict[str, list[Article]]:
    """Deal articles to splits by a hash of their titles, and sort each split by that hash.

    An article stays where it is when others are added or removed.

    Raises:
        ValueError: if a split gets fewer than `MIN_ARTICLES`.
    """
    splits: dict[str, list[Article]] = {split: [] for split in SPLITS}
    for article in sorted(articles, key=lambda article: _title_hash(article.title)):
        place = _title_hash(article.title)
        in_val, in_test = place < val_share, place < val_share + test_share
        splits["val" if in_val else "test" if in_test else "train"].append(article)
    if min(map(len, splits.values())) < MIN_ARTICLES:
        counts = ", ".join(f"{split} {len(splits[split])}" for split in SPLITS)
        raise ValueError(
            f"the corpus must give each split at least {MIN_ARTICLES} articles, got {counts}: "
            "add articles, or raise the share (corpora.<preset>.val_share, test_share)"
        )
    return splits


def cut_documents(articles: Sequence[TokenizedArticle], tokens_per_document: int) -> list[Document]:
    """Cut articles into pieces of one length, dropping tails.

    First pieces of all articles come first, then second pieces: so the first N documents come
    from as many articles as possible. Inside a part the order is that of the titles' hashes.
    """
    documents = [
        Document(article.title, part, article.input_ids[begin : begin + tokens_per_document])
        for article in articles
        for part, begin in enumerate(
            range(0, len(article.input_ids) - tokens_per_document + 1, tokens_per_document)
        )
    ]
    return sorted(documents, key=lambda document: (document.part, _title_hash(document.title)))


def write_articles(folder: Path, split: str, articles: Sequence[TokenizedArticle]) -> None:
    """Write one split, a row an article; equal articles give equal bytes."""
    columns = {
        "title": pa.array([article.title for article in articles], pa.string()),
        "text": pa.array([article.text for article in articles], pa.large_string()),
        "input_ids": _token_column([article.input_ids for article in articles]),
    }
    _write_table(folder / f"{split}.parquet", columns)


def write_documents(folder: Path, split: str, documents: Sequence[Document]) -> None:
    """Write one split, a row a document; equal documents give equal bytes."""
    columns = {
        "title": pa.array([document.title for document in documents], pa.string()),
        "part": pa.array([document.part for document in documents], pa.int32()),
        "input_ids": _token_column([document.input_ids for document in documents]),
    }
    _write_table(folder / f"{split}.parquet", columns)


def read_articles(folder: Path, split: str) -> list[TokenizedArticle]:
    """Read one split that `write_articles` wrote.

    Raises:
        FileNotFoundError: if the file is missing; the stage that makes it is named.
    """
    path = folder / f"{split}.parquet"
    table = _read_table(path, ["title", "text"])
    titles, texts = table["title"].to_pylist(), table["text"].to_pylist()
    rows = zip(titles, texts, read_token_rows(path), strict=True)
    return [TokenizedArticle(title, text, input_ids) for title, text, input_ids in rows]


def _title_hash(title: str) -> float:
    """Map a title to [0, 1), evenly and the same on every machine."""
    return int.from_bytes(hashlib.sha256(title.encode()).digest()[:6], "big") / 2**48


def _token_column(rows: Sequence[TokenIds]) -> pa.Array:
    """Make a column of lists."""
    return pa.array(list(rows), pa.large_list(pa.int32()))


def _write_table(path: Path, columns: dict[str, Any]) -> None:
    """Write a parquet file under another name first, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    pq.write_table(pa.table(columns), partial, compression="zstd")
    partial.replace(path)


BATCH_ARTICLES = 16


def load_tokenizer(path: Path) -> Tokenizer:
    """Open a tokenizer.json, to be used without cutting or padding.

    Raises:
        FileNotFoundError: if the file is missing; the stage that makes it is named.
    """
    check_made(path, "dvc repro prepare_base")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenize(tokenizer: Tokenizer, articles: Sequence[Article]) -> Iterator[TokenizedArticle]:
    """Encode articles as they are asked for, without special tokens: nothing is added anywhere."""
    for begin in range(0, len(articles), BATCH_ARTICLES):
        batch = articles[begin : begin + BATCH_ARTICLES]
        encodings = tokenizer.encode_batch(
            [article.text for article in batch], add_special_tokens=False
        )
        for article, encoding in zip(batch, encodings, strict=True):
            input_ids = np.array(encoding.ids, np.int32)
            yield TokenizedArticle(article.title, article.text, input_ids)
