"""Long documents of another corpus than the sliding text: as many as asked for, and no leak."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from infini_retrofit.texts.splits import SPLITS, tokenize
from stages import prepare_longdocs, prepare_wikitext
from tests.tiny import tiny_tokenizer

NUM_TEXTS, TOKENS_PER_DOCUMENT = 40, 24
PARAMS = """
corpus: texts
corpora:
  texts: {{source: files, path: texts, val_share: 0.3, test_share: 0.3}}
  books: {{source: files, path: books, val_share: 0.2, test_share: 0.5}}
longdocs:
  corpus: {corpus}
  tokens_per_document: {tokens_per_document}
  documents: {documents}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A project with a sliding text, and books of which half have the name of a text."""
    monkeypatch.chdir(tmp_path)
    for name, first in (("texts", 0), ("books", NUM_TEXTS // 2)):
        Path(name).mkdir()
        for i in range(first, first + NUM_TEXTS):
            text = " ".join(f"{name} {i}: the dog sleeps by the sea {j}." for j in range(1 + i % 9))
            Path(name, f"{i:02}.txt").write_text(text)
    Path("models/base").mkdir(parents=True)
    tiny_tokenizer().backend_tokenizer.save("models/base/tokenizer.json")
    write_params()
    prepare_wikitext.main()
    return tmp_path


def write_params(
    corpus: str = "same",
    documents: int | str = "all",
    tokens_per_document: int = TOKENS_PER_DOCUMENT,
) -> None:
    names = {"corpus": corpus, "documents": documents, "tokens_per_document": tokens_per_document}
    Path("params.yaml").write_text(PARAMS.format(**names))


def documents_of(**params: object) -> dict[str, list[dict]]:
    """Run the stage with these parameters and read what it wrote."""
    write_params(**params)
    prepare_longdocs.main()
    return {s: pq.read_table(f"data/longdocs/{s}.parquet").to_pylist() for s in SPLITS}


def leaked(documents: dict[str, list[dict]]) -> set[str]:
    """Return the titles of documents that stand in another split of the sliding text."""
    split_of = {
        title: split
        for split in SPLITS
        for title in pq.read_table(f"data/wikitext/{split}.parquet")["title"].to_pylist()
    }
    titles = {(row["title"], split) for split in SPLITS for row in documents[split]}
    return {title for title, split in titles if split_of.get(title, split) != split}


def test_the_same_corpus_by_its_name_gives_the_same_documents():
    assert documents_of(corpus="texts") == documents_of(corpus="same")


def test_documents_come_from_the_other_corpus_only():
    documents = documents_of(corpus="books")
    assert documents != documents_of(corpus="same")
    tokenizer = tiny_tokenizer()
    firsts = [row for split in SPLITS for row in documents[split] if row["part"] == 0]
    assert len(firsts) > NUM_TEXTS / 4
    for row in firsts:
        begin = f"books {int(row['title'].removesuffix('.txt'))}: the dog"
        assert tokenizer.decode(row["input_ids"]).startswith(begin)


def test_a_text_of_both_corpora_never_stands_in_two_splits(monkeypatch):
    documents = documents_of(corpus="books")
    assert leaked(documents) == set()
    in_both = {f"{i:02}.txt" for i in range(NUM_TEXTS // 2, NUM_TEXTS)}
    assert in_both & {row["title"] for split in SPLITS for row in documents[split]}
    read = prepare_longdocs.read_other_corpus
    monkeypatch.setattr(prepare_longdocs, "read_other_corpus", lambda _: read({}))
    assert leaked(documents_of(corpus="books")) <= in_both
    assert leaked(documents_of(corpus="books"))


@pytest.mark.parametrize("corpus", ["same", "books"])
@pytest.mark.parametrize("most", [2, 7])
def test_fewer_documents_are_the_first_of_all(corpus, most):
    of_all = documents_of(corpus=corpus)
    assert documents_of(corpus=corpus, documents=most) == {
        split: of_all[split][:most] for split in SPLITS
    }


def test_no_more_is_tokenised_than_is_asked_for(monkeypatch):
    taken = []

    def counting(tokenizer, articles):
        for article in tokenize(tokenizer, articles):
            taken.append(article.title)
            yield article

    monkeypatch.setattr(prepare_longdocs, "tokenize", counting)
    documents_of(corpus="books", documents=2)
    few = len(taken)
    documents_of(corpus="books")
    assert 6 <= few < 15
    assert len(taken) - few > 30


def test_a_split_that_is_left_without_documents_is_refused_and_nothing_is_written():
    write_params(corpus="books", tokens_per_document=1000)
    with pytest.raises(ValueError, match=r"got 1000: the longest article of train has \d+ tokens"):
        prepare_longdocs.main()
    assert not Path("data/longdocs").exists()


def test_test_documents_of_one_article_are_refused(monkeypatch):
    read = prepare_longdocs.read_other_corpus
    monkeypatch.setattr(
        prepare_longdocs,
        "read_other_corpus",
        lambda split_of: {**(of := read(split_of)), "test": of["test"][:1] * 3},
    )
    write_params(corpus="books", tokens_per_document=2, documents=2)
    with pytest.raises(ValueError, match=r"at least 2 articles in test, .* got 2: 1 is that long"):
        prepare_longdocs.main()
    assert not Path("data/longdocs").exists()
