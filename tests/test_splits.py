"""The split of a corpus, its documents, and its files of tokens."""

from dataclasses import replace
from unicodedata import normalize

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, normalizers

from infini_retrofit.pipeline.files import write_manifest
from infini_retrofit.pipeline.tables import read_token_rows
from infini_retrofit.texts import splits as splits_module
from infini_retrofit.texts.splits import (
    SPLITS,
    Article,
    TokenizedArticle,
    cut_documents,
    cut_text,
    drop_copies,
    group_of,
    note_copies,
    read_articles,
    split_articles,
    tokenize,
    write_rows,
)
from tests.tiny import tiny_tokenizer
from tests.tiny_project import ROOT


def tokenized(title: str, num_tokens: int, first: int = 0) -> TokenizedArticle:
    ids = np.arange(first, first + num_tokens, dtype=np.int32)
    return TokenizedArticle(title, f"text of {title}", ids)


@pytest.mark.parametrize(
    ("num_articles", "shares", "counts"),
    [(20, (0.1, 0.1), (16, 2, 2)), (98, (0.16, 0.25), (57, 16, 25)), (6, (0.1, 0.1), (2, 2, 2))],
)
def test_splits_are_dealt_by_number(num_articles, shares, counts):
    for first in range(0, 500, 10):
        articles = [Article(f"{i}.txt", "text") for i in range(first, first + num_articles)]
        splits = split_articles(articles, *shares)
        assert tuple(len(splits[split]) for split in SPLITS) == counts
        assert {a for split in SPLITS for a in splits[split]} == set(articles)
        assert split_articles(articles[::-1], *shares) == splits


def test_the_first_documents_come_from_as_many_sources_as_possible():
    sources = {"a1": "a", "a2": "a", "a3": "a", "b1": "b", "b2": "b", "alone": ""}
    articles = [replace(tokenized(title, 10), source=s) for title, s in sources.items()]
    documents = cut_documents(articles, 4)
    first = [group_of(document) for document in documents[:3]]
    assert sorted(first) == ["a", "alone", "b"]
    of_a = [document for document in documents if document.source == "a"]
    assert {document.title for document in of_a[:3]} == {"a1", "a2", "a3"}
    assert len(documents) == 12


def test_articles_of_one_title_stay_together():
    articles = [Article(f"title {i % 9}", f"text {i}") for i in range(27)]
    splits = split_articles(articles, 0.3, 0.3)
    assert [len(splits[split]) for split in SPLITS] == [9, 9, 9]
    assert all(len({article.title for article in splits[split]}) == 3 for split in SPLITS)


def test_the_unicode_form_of_a_title_decides_nothing():
    titles = [f"caf\u00e9 {i}" for i in range(20)]
    composed = split_articles([Article(title, "") for title in titles], 0.2, 0.3)
    decomposed = split_articles([Article(normalize("NFD", t), "") for t in titles], 0.2, 0.3)
    for split in SPLITS:
        assert [normalize("NFC", a.title) for a in decomposed[split]] == [
            a.title for a in composed[split]
        ]
    of_both = [Article(form, "") for t in titles for form in (t, normalize("NFD", t))]
    both = split_articles(of_both, 0.2, 0.3)
    assert [len(both[split]) for split in SPLITS] == [20, 8, 12]
    named = [{normalize("NFC", a.title) for a in both[split]} for split in SPLITS]
    assert len(set.union(*named)) == sum(map(len, named))


COPIES = [
    Article("b", "caf\u00e9 au lait"),
    Article("a", "caf\u00e9 au lait"),
    Article("c", "cafe\u0301 au\nlait"),
    Article("Title", "Title\n\ncaf\u00e9 au lait"),
]


def test_of_equal_texts_one_is_kept_and_the_others_are_counted(capsys):
    articles = [*COPIES, Article("b", "another text"), Article("au lait", "caf\u00e9")]
    kept = drop_copies(articles)
    assert len(kept) == 3
    assert drop_copies(articles[::-1]) == kept
    assert capsys.readouterr().err.startswith("note: 3 of 6 articles are copies and left out, such")
    assert drop_copies(kept) == kept
    assert capsys.readouterr().err == ""


def test_copies_in_a_corpus_s_own_splits_are_told(capsys):
    other = Article("d", "another")
    note_copies({"train": [COPIES[0], other], "val": [other], "test": COPIES[1:]})
    assert capsys.readouterr().err.splitlines() == [
        "note: 1 texts of train have copies in val, as the corpus is split",
        "note: 1 texts of train have copies in test, as the corpus is split",
    ]


def with_prefix(tokenizer: Tokenizer) -> Tokenizer:
    """Put a space before every text, as the tokenizer of Llama 2 does."""
    tokenizer.normalizer = normalizers.Prepend(" ")
    return tokenizer


@pytest.mark.parametrize("kind", [lambda tokenizer: tokenizer, with_prefix])
def test_a_long_text_is_cut_where_its_tokens_stay_the_same(monkeypatch, kind):
    tokenizer = kind(tiny_tokenizer().backend_tokenizer)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    whole = tokenizer.encode(text, add_special_tokens=False).ids
    monkeypatch.setattr(splits_module, "PIECE_CHARS", 150)
    pieces = list(cut_text(tokenizer, text))
    assert len(pieces) > len(text) / 250
    short = Article("a", "short")
    articles = [short, short, Article("long", text), Article("empty", "")]
    made = list(tokenize(tokenizer, articles))
    assert [Article(article.title, article.text) for article in made] == articles
    assert made[2].input_ids.tolist() == whole
    monkeypatch.setattr(splits_module, "_find_cut", cut_anywhere)
    assert next(tokenize(tokenizer, articles[2:])).input_ids.tolist() != whole


def test_a_text_without_a_place_to_cut_is_cut_all_the_same(monkeypatch):
    monkeypatch.setattr(splits_module, "PIECE_CHARS", 150)
    monkeypatch.setattr(splits_module, "MAX_MORE_CHARS", 70)
    text = "\u3042" * 1000
    pieces = list(cut_text(tiny_tokenizer().backend_tokenizer, text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 220


def cut_anywhere(_tokenizer: Tokenizer, _text: str, begin: int) -> tuple[int, int]:
    return begin, begin


def test_a_flipped_bit_in_the_tokenizer_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    tiny_tokenizer().backend_tokenizer.save(str(path))
    write_manifest(tmp_path)
    splits_module.open_tokenizer(path)
    path.write_text(path.read_text().replace("e", "d", 1))
    with pytest.raises(ValueError, match=r"tokenizer\.json differs from its manifest"):
        splits_module.open_tokenizer(path)


def test_the_split_is_the_same_on_every_machine():
    splits = split_articles([Article(f"title {i}", "text") for i in range(40)], 0.2, 0.3)
    val = [f"title {i}" for i in (21, 38, 29, 24, 22, 37, 23, 36)]
    assert [article.title for article in splits["val"]] == val


def test_too_few_articles_are_refused():
    articles = [Article(f"title {i}", "text") for i in range(5)]
    with pytest.raises(ValueError, match="at least 2 articles, got train 1, val 2, test 2: add"):
        split_articles(articles, 0.2, 0.3)


def test_documents_are_whole_and_come_from_many_articles_first():
    articles = [tokenized("a", 11), tokenized("b", 4, 100), tokenized("c", 3, 200)]
    articles += [tokenized("d", 8, 300)]
    documents = cut_documents(articles, 4)
    pieces = {
        (article.title, part): article.input_ids[4 * part : 4 * part + 4].tolist()
        for article in articles
        for part in range(len(article.input_ids) // 4)
    }
    assert {(d.title, d.part): d.input_ids.tolist() for d in documents} == pieces
    assert [d.part for d in documents] == [0, 0, 0, 1, 1]
    assert [d.title for d in documents] == [d.title for d in cut_documents(articles[::-1], 4)]


def test_files_hold_the_rows_and_nothing_else(tmp_path):
    articles = [tokenized("a", 5), tokenized("b\u00e9", 1, 40), tokenized("c", 7, 90)]
    documents = cut_documents(articles, 2)
    write_rows(tmp_path, "val", articles)
    write_rows(tmp_path, "test", documents)
    write_manifest(tmp_path)
    read = read_articles(tmp_path, "val")
    assert [(a.title, a.text, a.input_ids.tolist()) for a in read] == [
        (a.title, a.text, a.input_ids.tolist()) for a in articles
    ]
    rows = read_token_rows(tmp_path / "test.parquet")
    assert [row.tolist() for row in rows] == [d.input_ids.tolist() for d in documents]
    assert all(row.dtype == np.int32 and row.flags.writeable for row in rows)
    assert pq.read_schema(tmp_path / "test.parquet").names == [
        *("title", "part", "input_ids", "source")
    ]
    with pytest.raises(FileNotFoundError, match="run `dvc repro prepare_longdocs`"):
        read_token_rows(tmp_path / "longdocs" / "test.parquet")
