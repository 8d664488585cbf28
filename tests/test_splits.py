"""The split of a corpus, its documents, and its files of tokens."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from infini_retrofit.pipeline.files import read_token_rows
from infini_retrofit.texts.splits import (
    SPLITS,
    Article,
    TokenizedArticle,
    cut_documents,
    read_articles,
    split_articles,
    write_articles,
    write_documents,
)


def tokenized(title: str, num_tokens: int, first: int = 0) -> TokenizedArticle:
    ids = np.arange(first, first + num_tokens, dtype=np.int32)
    return TokenizedArticle(title, f"text of {title}", ids)


def test_an_article_stays_in_its_split_when_others_come():
    articles = [Article(f"title {i}", "text") for i in range(1000)]
    of_all = split_articles(articles, 0.2, 0.3)
    of_some = split_articles(articles[::-3], 0.2, 0.3)
    for split in SPLITS:
        assert set(of_some[split]) <= set(of_all[split])
        assert of_some[split] == [a for a in of_all[split] if a in set(of_some[split])]
    shares = [len(of_all[split]) / 1000 for split in SPLITS]
    assert shares == pytest.approx([0.5, 0.2, 0.3], abs=0.05)


def test_the_split_is_the_same_on_every_machine():
    splits = split_articles([Article(f"title {i}", "text") for i in range(40)], 0.2, 0.3)
    val = [f"title {i}" for i in (21, 38, 29, 24, 22, 37, 23, 36)]
    assert [article.title for article in splits["val"]] == val


def test_too_few_articles_are_refused():
    articles = [Article(f"title {i}", "text") for i in range(3)]
    with pytest.raises(ValueError, match=r"at least 2 articles, got train \d, val \d, test \d"):
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
    write_articles(tmp_path, "val", articles)
    write_documents(tmp_path, "test", documents)
    read = read_articles(tmp_path, "val")
    assert [(a.title, a.text, a.input_ids.tolist()) for a in read] == [
        (a.title, a.text, a.input_ids.tolist()) for a in articles
    ]
    rows = read_token_rows(tmp_path / "test.parquet")
    assert [row.tolist() for row in rows] == [d.input_ids.tolist() for d in documents]
    assert all(row.dtype == np.int32 and row.flags.writeable for row in rows)
    assert pq.read_schema(tmp_path / "test.parquet").names == ["title", "part", "input_ids"]
    with pytest.raises(FileNotFoundError, match="run `dvc repro prepare_longdocs`"):
        read_token_rows(tmp_path / "longdocs" / "test.parquet")
