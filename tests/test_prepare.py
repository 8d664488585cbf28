"""The stages prepare_wikitext and prepare_longdocs, from text files to files of tokens."""

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tokenizers import processors

from infini_retrofit.pipeline.files import read_token_rows
from infini_retrofit.texts.splits import SPLITS, read_articles
from stages import prepare_longdocs, prepare_wikitext
from tests.tiny import tiny_tokenizer

NUM_ARTICLES = 40
TOKENS_PER_DOCUMENT = 32
PARAMS = """
corpus: mine
corpora:
  mine:
    source: files
    path: texts
    val_share: 0.3
    test_share: 0.3
longdocs:
  corpus: same
  tokens_per_document: {tokens_per_document}
  documents: all
"""


def write_params(tokens_per_document: int = TOKENS_PER_DOCUMENT) -> None:
    Path("params.yaml").write_text(PARAMS.format(tokens_per_document=tokens_per_document))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make a project folder with texts of different lengths, and a tokenizer that would cut."""
    monkeypatch.chdir(tmp_path)
    write_params()
    Path("texts").mkdir()
    for i in range(NUM_ARTICLES):
        text = " ".join(f"The dog {i} sleeps by the sea {j}." for j in range(3 + i % 7))
        Path(f"texts/{i:02}.txt").write_text(text)
    tokenizer = tiny_tokenizer().backend_tokenizer
    begin = [("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=begin
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=500)
    Path("models/base").mkdir(parents=True)
    tokenizer.save("models/base/tokenizer.json")
    return tmp_path


def titles(name: str) -> dict[str, set[str]]:
    files = {split: Path(f"data/{name}/{split}.parquet") for split in SPLITS}
    return {
        split: set(pq.read_table(path, columns=["title"])["title"].to_pylist())
        for split, path in files.items()
    }


def shared(*by_split: dict[str, set[str]]) -> set[str]:
    """Return the titles that stand in more than one split, in any of the outputs."""
    all_of = {split: set().union(*(of[split] for of in by_split)) for split in SPLITS}
    train, val, test = all_of.values()
    return (train & val) | (train & test) | (val & test)


def test_no_title_stands_in_two_splits_of_both_outputs(folder):
    prepare_wikitext.main()
    prepare_longdocs.main()
    articles, documents = titles("wikitext"), titles("longdocs")
    assert shared(articles, documents) == set()
    assert set().union(*articles.values()) == {f"{i:02}.txt" for i in range(NUM_ARTICLES)}
    assert all(documents[split] and documents[split] <= articles[split] for split in SPLITS)


def test_pieces_dealt_out_one_by_one_would_be_noticed(folder):
    prepare_wikitext.main()
    prepare_longdocs.main()
    pieces = [
        title
        for split in SPLITS
        for title in pq.read_table(f"data/longdocs/{split}.parquet")["title"].to_pylist()
    ]
    dealt = {split: set(pieces[i::3]) for i, split in enumerate(SPLITS)}
    assert shared(dealt) != set()
    assert shared(titles("wikitext"), dealt) != set()


def test_tokens_are_the_whole_text_and_nothing_else(folder):
    prepare_wikitext.main()
    tokenizer = tiny_tokenizer()
    articles = [
        article for split in SPLITS for article in read_articles(Path("data/wikitext"), split)
    ]
    assert len(articles) == NUM_ARTICLES
    for article in articles:
        assert article.text == Path("texts", article.title).read_text()
        assert article.input_ids.tolist() == tokenizer.encode(
            article.text, add_special_tokens=False
        )


def test_documents_are_exact_pieces_in_the_order_of_parts(folder):
    prepare_wikitext.main()
    prepare_longdocs.main()
    for split in SPLITS:
        tokens = {
            a.title: a.input_ids.tolist() for a in read_articles(Path("data/wikitext"), split)
        }
        path = Path(f"data/longdocs/{split}.parquet")
        table = pq.read_table(path)
        parts = table["part"].to_pylist()
        assert parts == sorted(parts)
        assert max(parts) > 0
        assert len(parts) == sum(len(ids) // TOKENS_PER_DOCUMENT for ids in tokens.values())
        for title, part, row in zip(
            table["title"].to_pylist(), parts, read_token_rows(path), strict=True
        ):
            begin = part * TOKENS_PER_DOCUMENT
            assert row.tolist() == tokens[title][begin : begin + TOKENS_PER_DOCUMENT]
            assert len(row) == TOKENS_PER_DOCUMENT


def test_two_runs_give_equal_bytes(folder):
    contents = []
    for _ in range(2):
        prepare_wikitext.main()
        prepare_longdocs.main()
        files = sorted(Path("data").rglob("*"))
        contents.append({str(file): file.read_bytes() for file in files if file.is_file()})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 6


def test_another_text_gives_other_bytes_in_its_split_only(folder):
    prepare_wikitext.main()
    before = {split: Path(f"data/wikitext/{split}.parquet").read_bytes() for split in SPLITS}
    changed = next(iter(titles("wikitext")["val"]))
    Path("texts", changed).write_text("Another text.")
    prepare_wikitext.main()
    after = {split: Path(f"data/wikitext/{split}.parquet").read_bytes() for split in SPLITS}
    assert [split for split in SPLITS if before[split] != after[split]] == ["val"]


def test_too_few_articles_leave_earlier_results_untouched(folder):
    prepare_wikitext.main()
    before = Path("data/wikitext/train.parquet").read_bytes()
    for path in sorted(Path("texts").iterdir())[3:]:
        path.unlink()
    with pytest.raises(ValueError, match="at least 2 articles"):
        prepare_wikitext.main()
    assert Path("data/wikitext/train.parquet").read_bytes() == before


def test_documents_longer_than_every_article_are_refused_before_anything_is_written(folder):
    prepare_wikitext.main()
    write_params(tokens_per_document=100_000)
    with pytest.raises(
        ValueError, match=r"got 100000: the longest article of train has \d+ tokens"
    ):
        prepare_longdocs.main()
    assert not Path("data/longdocs").exists()


def test_documents_of_one_test_article_are_refused_because_none_could_be_swapped(folder):
    prepare_wikitext.main()
    lengths = {
        split: sorted(len(a.input_ids) for a in read_articles(Path("data/wikitext"), split))
        for split in SPLITS
    }
    longest = sorted(lengths["test"])[-1]
    only = Path("texts", next(iter(titles("wikitext")["test"])))
    only.write_text(only.read_text() * 40)
    for split in ("train", "val"):
        other = Path("texts", next(iter(titles("wikitext")[split])))
        other.write_text(other.read_text() * 40)
    prepare_wikitext.main()
    write_params(tokens_per_document=longest + 1)
    with pytest.raises(ValueError, match=rf"2 articles in test, .* got {longest + 1}: 1 is that"):
        prepare_longdocs.main()
    assert not Path("data/longdocs").exists()
    write_params(tokens_per_document=lengths["test"][-2])
    prepare_longdocs.main()


def test_what_is_missing_names_the_stage_that_makes_it(folder):
    with pytest.raises(FileNotFoundError, match="run `dvc repro prepare_wikitext`"):
        prepare_longdocs.main()
    Path("models/base/tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="run `dvc repro prepare_base`"):
        prepare_wikitext.main()


def test_the_stages_import_neither_torch_nor_transformers():
    code = (
        "import sys, stages.prepare_wikitext, stages.prepare_longdocs;"
        "sys.exit(sorted({'torch', 'transformers', 'gensim', 'tokenizers'} & set(sys.modules))"
        "!= ['tokenizers'])"
    )
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
