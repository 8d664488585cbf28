"""Stage `prepare_longdocs`: cut documents of equal length.

A document is in the split in which the sliding text has its article.

Reads:  params.yaml (longdocs, corpora), data/wikitext/{train,val,test}.parquet,
        models/base/tokenizer.json
Writes: data/longdocs/{train,val,test}.parquet
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from infini_retrofit.pipeline.guard import run_stage
from infini_retrofit.pipeline.params import load_choice, load_section
from infini_retrofit.pipeline.progress import progress
from infini_retrofit.texts.articles import read_splits
from infini_retrofit.texts.corpora import CORPORA, SAME, LongdocsParams
from infini_retrofit.texts.splits import (
    SPLITS,
    Article,
    Document,
    TokenizedArticle,
    cut_documents,
    open_tokenizer,
    read_articles,
    title_order,
    tokenize,
    write_rows,
)

TOKENIZER = Path("models/base/tokenizer.json")
WIKITEXT = Path("data/wikitext")
LONGDOCS = Path("data/longdocs")


def main() -> str:
    """Run the stage and return what it made."""
    params = load_section(LongdocsParams, "longdocs")
    tokenizer = open_tokenizer(TOKENIZER)
    articles = {split: read_articles(WIKITEXT, split) for split in SPLITS}
    if params.corpus != SAME:
        split_of = {article.title: split for split in SPLITS for article in articles[split]}
        articles = {
            split: list(take_enough(tokenize(tokenizer, of_split), params))
            for split, of_split in read_other_corpus(split_of).items()
        }
    check_lengths(articles, params.tokens_per_document)
    most = None if params.documents == "all" else params.documents
    documents = {
        split: cut_documents(articles[split], params.tokens_per_document)[:most] for split in SPLITS
    }
    check_sources(documents["test"], params.tokens_per_document)
    for split in SPLITS:
        write_rows(LONGDOCS, split, documents[split])
    made = ", ".join(f"{split} {len(documents[split]):,}" for split in SPLITS)
    return f"prepare_longdocs: {made} documents of {params.tokens_per_document:,} tokens"


def read_other_corpus(split_of: dict[str, str]) -> dict[str, list[Article]]:
    """Read the documents' own corpus without articles of another split, in `title_order`.

    Args:
        split_of: the split of each title of the sliding text. The two corpora may share an
            article and put it into different splits.
    """
    splits = read_splits(load_choice(CORPORA, "longdocs.corpus", "corpora"))
    return {
        split: [
            a for a in sorted(of_split, key=title_order) if split_of.get(a.title, split) == split
        ]
        for split, of_split in splits.items()
    }


def take_enough(
    articles: Iterable[TokenizedArticle], params: LongdocsParams
) -> Iterator[TokenizedArticle]:
    """Yield articles until enough are long: `cut_documents` takes all first parts first."""
    found = 0
    for article in progress(articles, "tokenise documents", "articles"):
        yield article
        found += len(article.input_ids) >= params.tokens_per_document
        if found == params.documents:
            return


def check_lengths(articles: dict[str, list[TokenizedArticle]], tokens_per_document: int) -> None:
    """Refuse a length that leaves a split without documents."""
    for split, of_split in articles.items():
        longest = max((len(article.input_ids) for article in of_split), default=0)
        if longest < tokens_per_document:
            raise ValueError(
                f"longdocs.tokens_per_document must leave a document in each split, "
                f"got {tokens_per_document}: the longest article of {split} has {longest} tokens"
            )


def check_sources(documents: list[Document], tokens_per_document: int) -> None:
    """Refuse test documents of a single article, whose memories cannot be swapped."""
    sources = {document.title for document in documents}
    if len(sources) < 2:
        raise ValueError(
            f"longdocs.tokens_per_document must leave documents of at least 2 articles in test, "
            f"whose memories can be swapped, got {tokens_per_document}: {len(sources)} is that long"
        )


if __name__ == "__main__":
    run_stage(main)
