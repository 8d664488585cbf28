"""Stage `prepare_longdocs`: documents of one length from the same split of the articles.

Reads:  params.yaml (longdocs), data/wikitext/{train,val,test}.parquet
Writes: data/longdocs/{train,val,test}.parquet
"""

from pathlib import Path

from infini_retrofit.corpus import (
    SPLITS,
    LongdocsParams,
    TokenizedArticle,
    cut_documents,
    read_articles,
    write_documents,
)
from infini_retrofit.params import load_section
from infini_retrofit.pipeline import run_stage

WIKITEXT = Path("data/wikitext")
LONGDOCS = Path("data/longdocs")


def main() -> None:
    """Run the stage."""
    params = load_section(LongdocsParams, "longdocs")
    articles = {split: read_articles(WIKITEXT, split) for split in SPLITS}
    check_lengths(articles, params.tokens_per_document)
    for split in SPLITS:
        documents = cut_documents(articles[split], params.tokens_per_document)
        write_documents(LONGDOCS, split, documents)


def check_lengths(articles: dict[str, list[TokenizedArticle]], tokens_per_document: int) -> None:
    """Refuse a length that no article of some split reaches, before anything is written."""
    for split, of_split in articles.items():
        longest = max(len(article.input_ids) for article in of_split)
        if longest < tokens_per_document:
            raise ValueError(
                f"longdocs.tokens_per_document must leave a document in each split, "
                f"got {tokens_per_document}: the longest article of {split} has {longest} tokens"
            )
    sources = sum(len(article.input_ids) >= tokens_per_document for article in articles["test"])
    if sources < 2:
        raise ValueError(
            f"longdocs.tokens_per_document must leave documents of at least 2 articles in test, "
            f"whose memories can be swapped, got {tokens_per_document}: {sources} is that long"
        )


if __name__ == "__main__":
    run_stage(main)
