"""A corpus on disk: articles in splits, tokenised, cut into documents.

Knows neither the source of the articles (`articles`) nor how they are cleaned (`wikimarkup`,
`wikitext`).
"""

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from infini_retrofit.pipeline.files import (
    TokenIds,
    check_made,
    read_table,
    read_token_rows,
    whole_file,
)

SPLITS = ("train", "val", "test")
MIN_ARTICLES = 2  # in each split: a memory is also tested on another article's text
BATCH_ARTICLES = 16
_TYPES = {  # of the columns on disk
    "title": pa.string(),
    "text": pa.large_string(),
    "part": pa.int32(),
    "input_ids": pa.large_list(pa.int32()),
}


@dataclass(frozen=True)
class Article:
    """One text; its title decides to which split it belongs."""

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
    """Deal articles to splits by number, in the order of a hash of their titles.

    Articles of one title stay together. The order in which they were read decides nothing.
    """
    in_order = sorted(articles, key=title_order)
    titles = list(dict.fromkeys(article.title for article in in_order))
    num_val, num_test = (
        max(MIN_ARTICLES, int(share * len(titles) + 0.5)) for share in (val_share, test_share)
    )
    dealt = ["val"] * num_val + ["test"] * num_test + ["train"] * len(titles)
    split_of = dict(zip(titles, dealt, strict=False))
    splits = {split: [a for a in in_order if split_of[a.title] == split] for split in SPLITS}
    check_splits(splits)
    return splits


def check_splits(splits: dict[str, list[Article]]) -> None:
    """Refuse a split of too few articles."""
    if min(map(len, splits.values())) < MIN_ARTICLES:
        counts = ", ".join(f"{split} {len(splits[split])}" for split in SPLITS)
        raise ValueError(
            f"each split must get at least {MIN_ARTICLES} articles, got {counts}: add articles"
        )


def title_order(piece: Article | Document) -> tuple[bytes, str]:
    """Return a hash of the title that is equal in every Unicode form, and the title."""
    normalized = unicodedata.normalize("NFC", piece.title)
    return hashlib.sha256(normalized.encode()).digest(), piece.title


def open_tokenizer(path: Path) -> Tokenizer:
    """Open a tokenizer.json without truncation and padding."""
    check_made(path, "dvc repro prepare_base")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenize(tokenizer: Tokenizer, articles: Sequence[Article]) -> Iterator[TokenizedArticle]:
    """Encode articles batch by batch, without special tokens."""
    for begin in range(0, len(articles), BATCH_ARTICLES):
        batch = articles[begin : begin + BATCH_ARTICLES]
        texts = [article.text for article in batch]
        encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
        for article, encoding in zip(batch, encodings, strict=True):
            input_ids = np.array(encoding.ids, np.int32)
            yield TokenizedArticle(article.title, article.text, input_ids)


def cut_documents(articles: Sequence[TokenizedArticle], tokens_per_document: int) -> list[Document]:
    """Cut articles into pieces of one length; the rest of each is dropped.

    The first pieces of all articles precede the second ones: the first N documents come from as
    many articles as possible. Each part is sorted by the hash of the titles.
    """
    length = tokens_per_document
    documents = [
        Document(article.title, part, article.input_ids[part * length : (part + 1) * length])
        for article in articles
        for part in range(len(article.input_ids) // length)
    ]
    return sorted(documents, key=lambda document: (document.part, title_order(document)))


def write_rows(folder: Path, split: str, rows: Sequence[TokenizedArticle | Document]) -> None:
    """Write one split with a row per article or document, in equal bytes each time."""
    columns = {field.name: [getattr(row, field.name) for row in rows] for field in fields(rows[0])}
    table = pa.table({name: pa.array(values, _TYPES[name]) for name, values in columns.items()})
    with whole_file(folder / f"{split}.parquet") as path:
        pq.write_table(table, path, compression="zstd")


def read_articles(folder: Path, split: str) -> list[TokenizedArticle]:
    """Read one split that `write_rows` wrote."""
    path = folder / f"{split}.parquet"
    texts = read_table(path, ["title", "text"]).to_pylist()
    rows = zip(texts, read_token_rows(path), strict=True)
    return [TokenizedArticle(**text, input_ids=input_ids) for text, input_ids in rows]
