"""The stages prepare_wikitext and prepare_longdocs, from text files to files of tokens."""

import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import processors

from infini_retrofit.texts import hub
from infini_retrofit.texts.splits import SPLITS
from stages import prepare_longdocs, prepare_wikitext
from tests.tiny import tiny_tokenizer
from tests.tiny_project import ROOT, contents

NUM_TEXTS, TOKENS_PER_DOCUMENT = 40, 24
PARAMS = """
corpus: {sliding}
corpora:
  texts: {{source: files, path: texts, val_share: 0.3, test_share: 0.3}}
  books: {{source: files, path: books, val_share: 0.2, test_share: 0.5}}
  wiki: {{source: hub-splits, repo_id: a/b, revision: {revision}, files: "*.parquet"}}
longdocs: {{corpus: {corpus}, tokens_per_document: {tokens_per_document}, documents: {documents}}}
"""
OFFICIAL = {"train": 600, "val": 60, "test": 60}
Titles = dict[str, set[str]]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A project with a sliding text, and books of which half have the name of a text."""
    monkeypatch.chdir(tmp_path)
    for name, first in (("texts", 0), ("books", NUM_TEXTS // 2)):
        Path(name).mkdir()
        for i in range(first, first + NUM_TEXTS):
            text = " ".join(f"{name} {i}: the dog sleeps by the sea {j}." for j in range(1 + i % 9))
            Path(name, f"{i:02}.txt").write_text(text)
    write_tokenizer()
    write_params()
    prepare_wikitext.main()


def write_tokenizer() -> None:
    """Write a tokenizer whose defaults add a token, truncate and pad."""
    tokenizer = tiny_tokenizer().backend_tokenizer
    begin = [("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=begin
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=500)
    Path("models/base").mkdir(parents=True, exist_ok=True)
    tokenizer.save("models/base/tokenizer.json")


def write_params(**changes: object) -> None:
    defaults = {"corpus": "same", "documents": "all", "tokens_per_document": TOKENS_PER_DOCUMENT}
    defaults |= {"sliding": "texts", "revision": "a" * 40}
    Path("params.yaml").write_text(PARAMS.format(**defaults | changes))


def wikitext_rows(number: int) -> list[str]:
    """Return an article in the rows of WikiText."""
    title = f"{number:02}.txt" if number < NUM_TEXTS else f"Town {number}"
    lines = [f" wiki {number} had {i} @,@ 000 dogs by the sea . \n" for i in range(1 + number % 7)]
    return ["", f" = {title} = \n", "", *lines, ""]


@pytest.fixture
def wiki(tmp_path, monkeypatch):
    """A corpus of the Hub in its own splits, some of whose articles have the name of a text."""
    numbers = iter([13 * i % 720 for i in range(720)])  # each split has small ones
    (tmp_path / "hub").mkdir()
    titles = {}
    for split, name in zip(SPLITS, ("train", "validation", "test"), strict=True):
        rows = [wikitext_rows(next(numbers)) for _ in range(OFFICIAL[split])]
        table = pa.table({"text": [line for article in rows for line in article]})
        pq.write_table(table, tmp_path / f"hub/{name}-00000-of-00001.parquet")
        titles[split] = [article[1].strip(" =\n") for article in rows]
    found = tmp_path / "hub", sorted((tmp_path / "hub").iterdir())
    monkeypatch.setattr(hub, "fetch_snapshot", lambda *_, **__: found)
    return titles


def rows_of(name: str) -> dict[str, list[dict]]:
    return {s: pq.read_table(f"data/{name}/{s}.parquet").to_pylist() for s in SPLITS}


def documents_of(**params: object) -> dict[str, list[dict]]:
    """Run the stage prepare_longdocs with these parameters and read its files."""
    write_params(**params)
    prepare_longdocs.main()
    return rows_of("longdocs")


def test_a_corpus_keeps_its_own_splits_articles_and_order(wiki):
    write_params(sliding="wiki")
    prepare_wikitext.main()
    rows = rows_of("wikitext")
    assert {split: [row["title"] for row in rows[split]] for split in SPLITS} == wiki
    assert {split: len(rows[split]) for split in SPLITS} == OFFICIAL


def titles_of(rows: dict[str, list[dict]]) -> Titles:
    return {split: {row["title"] for row in rows[split]} for split in SPLITS}


def shared(*by_split: Titles) -> set[str]:
    """Return the titles that stand in more than one split of any of the outputs."""
    train, val, test = (set().union(*(of[split] for of in by_split)) for split in SPLITS)
    return (train & val) | (train & test) | (val & test)


def test_no_title_stands_in_two_splits():
    documents = documents_of()
    articles, of_documents = titles_of(rows_of("wikitext")), titles_of(documents)
    assert shared(articles, of_documents) == set()
    assert set().union(*articles.values()) == {f"{i:02}.txt" for i in range(NUM_TEXTS)}
    assert all(of_documents[s] and of_documents[s] <= articles[s] for s in SPLITS)
    pieces = [row["title"] for split in SPLITS for row in documents[split]]
    dealt_one_by_one = {split: set(pieces[i::3]) for i, split in enumerate(SPLITS)}
    assert shared(dealt_one_by_one)
    assert shared(articles, dealt_one_by_one)


def test_tokens_are_the_whole_text_after_what_its_tokenizer_puts_there():
    tokenizer = tiny_tokenizer()
    rows = [row for of_split in rows_of("wikitext").values() for row in of_split]
    assert len(rows) == NUM_TEXTS
    for row in rows:
        assert row["text"] == Path("texts", row["title"]).read_text()
        ids = tokenizer.encode(row["text"], add_special_tokens=False)
        assert row["input_ids"] == [tokenizer.eos_token_id, *ids]


def test_two_runs_give_equal_bytes_and_a_changed_text_changes_its_split_only():
    documents_of()
    before = contents(Path("data"))
    assert len(before) == 8  # six tables and two manifests
    prepare_wikitext.main()
    documents_of()
    assert contents(Path("data")) == before
    changed = min(titles_of(rows_of("wikitext"))["val"])
    Path("texts", changed).write_text("Another text.")
    prepare_wikitext.main()
    after = contents(Path("data"))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"wikitext/val.parquet", "wikitext/manifest.json"}


def test_the_stages_import_neither_torch_nor_transformers():
    names = {"torch", "transformers", "gensim", "tokenizers"}
    code = "import sys, stages.prepare_wikitext, stages.prepare_longdocs; "
    command = [sys.executable, "-c", f"{code} print(*({names} & set(sys.modules)))"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "tokenizers\n"


def test_documents_are_the_first_of_the_corpus_that_is_named():
    same = documents_of(corpus="same")
    assert documents_of(corpus="texts") == same  # the same corpus by its name
    fewer = documents_of(documents=2)
    assert fewer == {split: same[split][:2] for split in SPLITS}
    documents = documents_of(corpus="books")
    tokenizer = tiny_tokenizer()
    firsts = [row for split in SPLITS for row in documents[split] if row["part"] == 0]
    assert len(firsts) > NUM_TEXTS / 4
    for row in firsts:
        begin = f"books {int(row['title'].removesuffix('.txt'))}: the dog"
        assert tokenizer.decode(row["input_ids"], skip_special_tokens=True).startswith(begin)


@pytest.mark.usefixtures("wiki")
@pytest.mark.parametrize(
    ("sliding", "corpus"), [("texts", "books"), ("texts", "wiki"), ("wiki", "books")]
)
def test_a_title_of_both_corpora_never_stands_in_two_splits(monkeypatch, sliding, corpus):
    write_params(sliding=sliding)
    prepare_wikitext.main()
    articles = titles_of(rows_of("wikitext"))
    documents = titles_of(documents_of(sliding=sliding, corpus=corpus))
    in_both = set().union(*articles.values()) & set().union(*documents.values())
    assert in_both
    assert shared(articles, documents) == set()
    read = prepare_longdocs.read_other_corpus
    monkeypatch.setattr(prepare_longdocs, "read_other_corpus", lambda corpus, _: read(corpus, {}))
    leaked = shared(articles, titles_of(documents_of(sliding=sliding, corpus=corpus)))
    assert leaked
    assert {title[2:] for title in leaked} == {".txt"}


def test_a_text_of_both_corpora_never_stands_in_two_splits(capsys):
    for split, titles in titles_of(rows_of("wikitext")).items():
        for title in titles:
            text = Path("texts", title).read_text().replace(" ", "\n")
            Path("books", f"{split} {title}").write_text(text)
    documents = titles_of(documents_of(corpus="books"))
    for split in SPLITS:
        copies = {title.split()[0] for title in documents[split] if " " in title}
        assert copies == {split}
    assert re.search(r"note: \d+ of \d+ articles of test are left out", capsys.readouterr().err)


def test_the_stages_tell_how_much_they_made():
    assert prepare_wikitext.main().startswith("prepare_wikitext: train 16 articles with ")
    said = prepare_longdocs.main()
    rows = rows_of("longdocs")
    for split in SPLITS:
        num_articles = len({row["title"] for row in rows[split]})
        num_tokens = len(rows[split]) * TOKENS_PER_DOCUMENT
        counts = f"{len(rows[split])} from {num_articles} articles with {num_tokens:,} tokens"
        assert f", {split} {counts}" in said


def test_a_split_without_documents_is_refused_and_nothing_is_written():
    message = r"got 1000: the longest article of train has \d+ tokens"
    with pytest.raises(ValueError, match=message):
        documents_of(tokens_per_document=1000)
    assert not Path("data/longdocs").exists()
