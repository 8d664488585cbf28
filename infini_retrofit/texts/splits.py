"""A corpus on disk: articles in splits, tokenised, cut into documents.

Knows neither the source of the articles (`articles`) nor how they are cleaned (`wikimarkup`,
`wikitext`).
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import combinations, groupby, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from tokenizers import Tokenizer

from infini_retrofit.pipeline.beginnings import first_tokens
from infini_retrofit.pipeline.files import MANIFEST, check_made, verify_manifest
from infini_retrofit.pipeline.progress import note
from infini_retrofit.pipeline.tables import TokenIds, read_table, read_token_rows, write_table

SPLITS = ("train", "val", "test")
MIN_ARTICLES = 2  # in each split: a memory is also tested on another article's text
PIECE_CHARS = 1 << 15  # of a text that is encoded at once: memory is about 100 bytes a byte
MAX_MORE_CHARS = 1 << 20  # of a piece, where no place to cut is found
BATCH_PIECES = 16
_PLACE = re.compile(r"\b|(?<=\S)(?=\s)")  # where a text may be cut, if its tokens stay the same
_PLACES_TRIED, _SURROUNDINGS = 100, 100  # characters on each side of a place


@dataclass(frozen=True)
class Article:
    """One text; its title decides to which split it belongs.

    Attributes:
        source: what it shares with articles that it is not independent of, such as a package; "":
            it stands alone.
    """

    title: str
    text: str
    source: str = field(default="", kw_only=True)


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
    source: str = field(default="", kw_only=True)


Piece = TypeVar("Piece", Article, Document)


def group_of(piece: Article | Document) -> str:
    """Return what a piece shares with others that it is not independent of, or its title."""
    return piece.source or piece.title


def split_articles(
    articles: Sequence[Article], val_share: float, test_share: float
) -> dict[str, list[Article]]:
    """Deal articles to splits by number, in the order of a hash of their titles.

    Articles of one title stay together. The order in which they were read decides nothing.
    """
    in_order = sorted(articles, key=title_order)
    titles = list(dict.fromkeys(same_title(article.title) for article in in_order))
    num_val, num_test = (
        max(MIN_ARTICLES, int(share * len(titles) + 0.5)) for share in (val_share, test_share)
    )
    dealt = ["val"] * num_val + ["test"] * num_test + ["train"] * len(titles)
    split_of = dict(zip(titles, dealt, strict=False))
    splits = {
        split: [a for a in in_order if split_of[same_title(a.title)] == split] for split in SPLITS
    }
    check_splits(splits)
    return splits


def check_splits(splits: dict[str, list[Article]]) -> None:
    """Refuse a split of too few articles."""
    if min(map(len, splits.values())) < MIN_ARTICLES:
        counts = ", ".join(f"{split} {len(splits[split])}" for split in SPLITS)
        raise ValueError(
            f"each split must get at least {MIN_ARTICLES} articles, got {counts}: add articles"
        )


def drop_copies(articles: Sequence[Article]) -> list[Article]:
    """Keep one of several equal texts, whatever their titles and order."""
    first: dict[bytes, Article] = {}
    in_order = sorted(articles, key=title_order)
    copies = [a for a in in_order if first.setdefault(text_digest(a), a) is not a]
    if copies:
        note(
            f"{len(copies):,} of {len(articles):,} articles are copies and left out, "
            f"such as {copies[0].title} of {first[text_digest(copies[0])].title}"
        )
    return list(first.values())


def note_copies(splits: dict[str, list[Article]]) -> None:
    """Count the texts that stand in several splits of a corpus, whose splits are kept."""
    digests = {split: set(map(text_digest, splits[split])) for split in SPLITS}
    for one, other in combinations(SPLITS, 2):
        if copies := digests[one] & digests[other]:
            note(f"{len(copies):,} texts of {one} have copies in {other}, as the corpus is split")


def same_title(title: str) -> str:
    """Return the title in the Unicode form in which titles are compared."""
    return unicodedata.normalize("NFC", title)


def text_digest(article: Article) -> bytes:
    """Hash a text without its title line; Unicode form, spaces and line ends make no difference."""
    text = re.sub(r"\s+", " ", article.text.removeprefix(f"{article.title}\n\n"))
    return hashlib.sha256(unicodedata.normalize("NFC", text).encode()).digest()


def title_order(piece: Article | Document) -> tuple[bytes, str]:
    """Return a hash of the title that is equal in every Unicode form, and the title."""
    return hashlib.sha256(same_title(piece.title).encode()).digest(), piece.title


def by_turns(pieces: Iterable[Piece]) -> list[Piece]:
    """Return the first piece of every source, then the second of each, and so on."""
    seen: Counter[str] = Counter()
    turns = []
    for piece in pieces:
        source = group_of(piece)
        turns.append((seen[source], piece))
        seen[source] += 1
    return [piece for _, piece in sorted(turns, key=lambda turn: turn[0])]


def open_tokenizer(path: Path) -> Tokenizer:
    """Open the tokenizer.json of a base, without truncation and padding."""
    check_made(path, "dvc repro prepare_base")
    if (path.parent / MANIFEST).is_file():
        verify_manifest(path.parent, "dvc repro prepare_base", [path.name])
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenize(tokenizer: Tokenizer, articles: Sequence[Article]) -> Iterator[TokenizedArticle]:
    """Encode articles in batches of pieces of bounded length, each behind `first_tokens`."""
    first = np.array(first_tokens(tokenizer), np.int32)
    pieces = (
        (number, piece)
        for number, article in enumerate(articles)
        for piece in cut_text(tokenizer, article.text)
    )
    encoded = (
        (number, np.array(ids, np.int32))
        for batch in iter(lambda: list(islice(pieces, BATCH_PIECES)), [])
        for (number, _), ids in zip(batch, _encode(tokenizer, [p for _, p in batch]), strict=True)
    )
    for number, rows in groupby(encoded, key=lambda row: row[0]):
        article, input_ids = articles[number], np.concatenate([first, *(ids for _, ids in rows)])
        yield TokenizedArticle(article.title, article.text, input_ids, source=article.source)


def cut_text(tokenizer: Tokenizer, text: str) -> Iterator[str]:
    """Cut a long text into pieces whose tokens, one after another, are those of the text.

    A piece has about `PIECE_CHARS` characters. Where no place to cut is found, it has up to
    `MAX_MORE_CHARS` more, and tokens around its end may differ.
    """
    begin = 0
    while begin + PIECE_CHARS < len(text):
        end, next_begin = _find_cut(tokenizer, text, begin + PIECE_CHARS)
        yield text[begin:end]
        begin = next_begin
    if begin < len(text) or not text:
        yield text[begin:]


def _find_cut(tokenizer: Tokenizer, text: str, begin: int) -> tuple[int, int]:
    """Return where one piece ends and the next begins: the tokens around are the same.

    The second begins without its space for a tokenizer that puts one before every text.
    """
    end = min(begin + MAX_MORE_CHARS, len(text))
    for match in islice(_PLACE.finditer(text, begin, end), _PLACES_TRIED):
        place = match.start()
        left, right = text[place - _SURROUNDINGS : place], text[place : place + _SURROUNDINGS]
        for space in ("", " "):
            parts = [left + right, left, right.removeprefix(space)]
            whole, before, after = _encode(tokenizer, parts)
            if right.startswith(space) and whole == before + after:
                return place, place + len(space)
    return end, end


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def cut_documents(
    articles: Sequence[TokenizedArticle], tokens_per_document: int, num_first: int = 0
) -> list[Document]:
    """Cut articles into pieces of one length; the rest of each is dropped.

    Each begins with the first `num_first` tokens of its article, those before every text.

    The first pieces of all articles precede the second ones: the first N documents come from as
    many sources, and then articles, as possible. Each part is sorted by the hash of the titles.
    """
    length = tokens_per_document - num_first
    documents = [
        Document(a.title, part, np.concatenate([a.input_ids[:num_first], ids]), source=a.source)
        for a in articles
        for part, ids in enumerate(_pieces(a.input_ids[num_first:], length))
    ]
    return by_turns(sorted(documents, key=lambda piece: (piece.part, title_order(piece))))


def _pieces(ids: TokenIds, length: int) -> Iterator[TokenIds]:
    """Cut tokens into pieces of one length, without the rest."""
    return (ids[end - length : end] for end in range(length, len(ids) + 1, length))


def write_rows(folder: Path, split: str, rows: Sequence[TokenizedArticle | Document]) -> None:
    """Write one split with a row per article or document; the folder's manifest comes last."""
    columns = {field.name: [getattr(row, field.name) for row in rows] for field in fields(rows[0])}
    write_table(folder / f"{split}.parquet", columns)


def read_articles(folder: Path, split: str) -> list[TokenizedArticle]:
    """Read one split that `write_rows` wrote."""
    path = folder / f"{split}.parquet"
    texts = read_table(path, ["title", "text", "source"]).to_pylist()
    rows = zip(texts, read_token_rows(path), strict=True)
    return [TokenizedArticle(**text, input_ids=input_ids) for text, input_ids in rows]
