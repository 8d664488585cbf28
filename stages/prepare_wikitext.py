"""Stage `prepare_wikitext`: clean, split and tokenise the corpus.

Reads:  params.yaml (corpus, corpora), models/base/tokenizer.json
Writes: data/wikitext/{train,val,test}.parquet
"""

from pathlib import Path

from tqdm import tqdm

from infini_retrofit.pipeline.guard import run_stage
from infini_retrofit.pipeline.params import load_choice
from infini_retrofit.texts.articles import read_corpus
from infini_retrofit.texts.corpora import CORPORA
from infini_retrofit.texts.splits import load_tokenizer, split_articles, tokenize, write_articles

TOKENIZER = Path("models/base/tokenizer.json")
WIKITEXT = Path("data/wikitext")


def main() -> None:
    """Run the stage."""
    corpus = load_choice(CORPORA, "corpus", "corpora")
    tokenizer = load_tokenizer(TOKENIZER)
    splits = split_articles(read_corpus(corpus), corpus.val_share, corpus.test_share)
    for split, articles in splits.items():
        tokenized = tokenize(tokenizer, articles)
        progress = tqdm(tokenized, f"tokenise {split}", len(articles), unit=" articles")
        write_articles(WIKITEXT, split, list(progress))


if __name__ == "__main__":
    run_stage(main)
