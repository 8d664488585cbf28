"""Stage `prepare_wikitext`: clean, split and tokenise the corpus.

Reads:  params.yaml (corpus, corpora), models/base/tokenizer.json
Writes: data/wikitext/{train,val,test}.parquet
"""

from pathlib import Path

from tqdm import tqdm

from infini_retrofit.pipeline.guard import run_stage
from infini_retrofit.pipeline.params import load_choice
from infini_retrofit.texts.articles import read_splits
from infini_retrofit.texts.corpora import CORPORA
from infini_retrofit.texts.splits import open_tokenizer, tokenize, write_articles

TOKENIZER = Path("models/base/tokenizer.json")
WIKITEXT = Path("data/wikitext")


def main() -> None:
    """Run the stage."""
    corpus = load_choice(CORPORA, "corpus", "corpora")
    tokenizer = open_tokenizer(TOKENIZER)
    for split, articles in read_splits(corpus).items():
        tokenized = tokenize(tokenizer, articles)
        progress = tqdm(tokenized, f"tokenise {split}", len(articles), unit=" articles")
        write_articles(WIKITEXT, split, list(progress))


if __name__ == "__main__":
    run_stage(main)
